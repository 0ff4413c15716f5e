"""Train one method of the learning-per-token benchmark in a process of its own: `PLACE METHOD LEARNING_RATE SEED`.

It runs in two environments, so this project is imported only where it is measured.
"""

import json
import sys
from pathlib import Path

import datasets
import torch
import transformers
from per_token_world import (
    EPOCHS,
    MINIBATCHES,
    ROLLOUT,
    Keep,
    load_scorer,
    load_tokenizer_of,
    load_writer,
    read_task,
    scores,
)

GROUP = 8  # completions of a prompt, for GRPO and RLOO
EVERY = 4  # rollouts between kept weights


def common(run, task, learning_rate, seed):
    """Settings that all trainers share."""
    return {
        "output_dir": str(run / "trainer"),
        "seed": seed,
        "learning_rate": learning_rate,
        "lr_scheduler_type": "constant",
        "temperature": 1.0,
        "bf16": False,
        "use_cpu": True,
        "report_to": "none",
        "save_strategy": "no",
        "logging_steps": MINIBATCHES * EPOCHS,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
    }


def grpo_like(place, method, run, learning_rate, seed):
    """PPO of this project, and TRL's GRPO and RLOO: they share an engine."""
    import trl

    task, tokenizer = read_task(place), load_tokenizer_of(place)
    settings = common(run, task, learning_rate, seed) | {
        "per_device_train_batch_size": ROLLOUT // MINIBATCHES,
        "steps_per_generation": MINIBATCHES,
        "num_iterations": EPOCHS,
        "max_steps": task.rollouts * MINIBATCHES * EPOCHS,
        "max_completion_length": task.completion_length,
    }
    rows = datasets.Dataset.from_dict({"prompt": json.loads((place / "train.json").read_text())})
    shared = {"train_dataset": rows, "processing_class": tokenizer}
    if method.startswith("ppo_"):
        from rlhf_recipes import PPOConfig, PPOTrainer
        from rlhf_recipes.models import load_causal_lm, load_policy

        policy = load_policy(load_causal_lm(str(place / "base")), str(place / "sft"))
        adapter, half = method != "ppo_head", policy.config.num_hidden_layers // 2
        config = PPOConfig(
            critic="adapter" if adapter else "head",
            critic_init="reward" if adapter else "policy",
            critic_layers=half if method == "ppo_adapter_half" else None,
            critic_learning_rate=learning_rate if method == "ppo_adapter_slow" else None,
            kl_coef=task.kl_coef,
            gae_lambda=1.0,
            vf_coef=0.5,
            missing_eos_penalty=task.missing_eos_penalty,
            activation_checkpointing=False,
            **settings,
        )
        trainer = PPOTrainer(policy, str(place / "reward"), config, **shared)
    else:
        policy, scorer = load_writer(place, trainable=True), load_scorer(place)
        penalty = task.missing_eos_penalty or 0.0

        def reward(prompts, completion_ids, **kwargs):
            prompt_ids = [tokenizer(prompt)["input_ids"] for prompt in prompts]
            found = scores(scorer, prompt_ids, completion_ids, tokenizer.pad_token_id)
            unended = [ids[-1] != tokenizer.eos_token_id for ids in completion_ids]
            return [score - penalty * cut for score, cut in zip(found, unended, strict=True)]

        name = method.upper()
        options = {"activation_checkpointing": False} if method == "grpo" else {"gradient_checkpointing": False}
        config = getattr(trl, f"{name}Config")(beta=task.kl_coef, num_generations=GROUP, **options, **settings)
        trainer = getattr(trl, f"{name}Trainer")(policy, reward, config, **shared)
    keep = Keep(policy, run, MINIBATCHES * EPOCHS, EVERY)
    trainer.add_callback(keep)
    rollout = trainer._generate_and_score_completions

    def counted(inputs):
        batch = rollout(inputs)
        keep.tokens += int(batch["completion_mask"].sum())
        return batch

    trainer._generate_and_score_completions = counted
    trainer.train()
    keep.finish(trl=trl.__version__)


def trl112(place, method, run, learning_rate, seed):
    """PPO of TRL 1.12: policy, reference, critic (that starts as the reward model) and reward model apart."""
    import trl
    from trl.experimental.ppo import PPOConfig, PPOTrainer, ppo_trainer

    task, tokenizer = read_task(place), load_tokenizer_of(place)
    prompts = json.loads((place / "train.json").read_text())
    padded = tokenizer(prompts, padding=True)["input_ids"]
    rows = datasets.Dataset.from_dict({"input_ids": padded})
    policy = load_writer(place, trainable=True)
    config = PPOConfig(
        total_episodes=task.rollouts * ROLLOUT,
        per_device_train_batch_size=ROLLOUT,
        gradient_accumulation_steps=1,
        num_mini_batches=MINIBATCHES,
        num_ppo_epochs=EPOCHS,
        local_rollout_forward_batch_size=ROLLOUT,
        response_length=task.completion_length,
        stop_token="eos",
        kl_coef=task.kl_coef,
        lam=1.0,
        vf_coef=0.5,
        missing_eos_penalty=task.missing_eos_penalty,
        num_sample_generations=0,
        gradient_checkpointing=False,
        **common(run, task, learning_rate, seed),
    )
    keep = Keep(policy, run, 1, EVERY)
    generation = ppo_trainer.batch_generation

    def counted(model, queries, *args):
        texts, logits = generation(model, queries, *args)
        ends = (texts[:, queries.shape[1] :] == tokenizer.eos_token_id).int()
        keep.tokens += int((ends.cumsum(1) - ends == 0).sum())
        return texts, logits

    ppo_trainer.batch_generation = counted
    trainer = PPOTrainer(
        args=config,
        processing_class=tokenizer,
        model=policy,
        ref_model=load_writer(place),
        reward_model=load_scorer(place),
        value_model=load_scorer(place, trainable=True),
        train_dataset=rows,
        eval_dataset=rows.select(range(ROLLOUT)),
        callbacks=[keep],
    )
    trainer.train()
    keep.finish(trl=trl.__version__)


def main(place, method, learning_rate, seed):
    place, seed = Path(place), int(seed)
    run = place / "runs" / f"{method}_{learning_rate}_{seed}"
    run.mkdir(parents=True, exist_ok=True)
    transformers.set_seed(seed)  # TRL 1.12 draws its minibatches with numpy, which it does not seed
    datasets.disable_progress_bars()
    (trl112 if method == "trl112" else grpo_like)(place, method, run, float(learning_rate), seed)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
