"""Train TRL 1.12's PPOTrainer on the benchmark's files, in that version's own environment: `FOLDER SEED`."""

import sys
from pathlib import Path

import torch
import transformers
from learning_world import (
    KeepWeights,
    PraiseModel,
    load_policy,
    load_tokenizer,
    load_value,
    read_praise,
    read_prompts,
    read_settings,
)


def main(folder, seed):
    import trl
    from datasets import Dataset
    from trl.experimental.ppo import PPOConfig, PPOTrainer

    settings, tokenizer, policy = read_settings(folder), load_tokenizer(folder), load_policy(folder)
    rows = read_prompts(folder, "train")
    prompts = Dataset.from_list([{"input_ids": row["input_ids"]} for row in rows])
    run = Path(folder) / "runs" / f"trl112_{seed}"
    transformers.set_seed(seed)  # the trainer draws its minibatches with numpy, which it does not seed
    args = PPOConfig(
        output_dir=str(run / "trainer"),
        seed=seed,
        total_episodes=settings.updates * settings.batch,
        per_device_train_batch_size=settings.batch,
        num_mini_batches=settings.minibatches,
        num_ppo_epochs=settings.epochs,
        gradient_accumulation_steps=1,
        local_rollout_forward_batch_size=settings.batch,
        response_length=settings.completion_length,
        stop_token="eos",
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_epsilon=settings.adam_epsilon,
        kl_coef=settings.kl_coef,
        gamma=settings.gamma,
        lam=settings.gae_lambda,
        cliprange=settings.clip,
        cliprange_value=settings.value_clip,
        vf_coef=settings.vf_coef,
        whiten_rewards=settings.whiten_rewards,
        num_sample_generations=0,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    keep = KeepWeights(policy, run, settings, steps_per_update=1)
    trainer = PPOTrainer(
        args=args,
        processing_class=tokenizer,
        model=policy,
        ref_model=load_policy(folder),
        reward_model=PraiseModel(read_praise(folder), len(tokenizer), len(rows[0]["input_ids"]), settings.score_scale),
        value_model=load_value(folder),
        train_dataset=prompts,
        eval_dataset=prompts.select(range(settings.batch)),
        callbacks=[keep],
    )
    trainer.train()
    keep.finish(trainer.optimizer.optimizer, episodes=trainer.state.episode, trl=trl.__version__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1], int(sys.argv[2]))
