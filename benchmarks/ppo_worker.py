"""Train this project's PPOTrainer on the benchmark's files: `FOLDER SEED`."""

import sys
from pathlib import Path

import torch
from learning_world import (
    KeepWeights,
    load_policy,
    load_tokenizer,
    praise_share,
    read_praise,
    read_prompts,
    read_settings,
)


def train(folder, seed):
    import trl
    from datasets import Dataset

    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.trainer import PPOTrainer

    settings, praise, policy = read_settings(folder), read_praise(folder), load_policy(folder)
    prompts = Dataset.from_list([{"prompt": row["prompt"]} for row in read_prompts(folder, "train")])
    run = Path(folder) / "runs" / f"ours_{seed}"

    def reward(completion_ids, **kwargs):
        return [settings.score_scale * praise_share(ids, praise) for ids in completion_ids]

    args = PPOConfig(
        output_dir=str(run / "trainer"),
        seed=seed,
        max_steps=settings.updates * settings.steps_per_update,
        per_device_train_batch_size=settings.minibatch,
        steps_per_generation=settings.minibatches,
        num_iterations=settings.epochs,
        gradient_accumulation_steps=1,
        max_completion_length=settings.completion_length,
        temperature=settings.temperature,
        learning_rate=settings.learning_rate,
        critic_learning_rate=settings.learning_rate,
        lr_scheduler_type="constant",
        adam_epsilon=settings.adam_epsilon,
        max_grad_norm=1e9,  # TRL 1.12 does not clip gradients, whatever it is told
        kl_coef=settings.kl_coef,
        gamma=settings.gamma,
        gae_lambda=settings.gae_lambda,
        epsilon=settings.clip,
        value_clip=settings.value_clip,
        vf_coef=settings.vf_coef,
        whiten_rewards=settings.whiten_rewards,
        critic="model",
        bf16=False,
        activation_checkpointing=False,
        use_cpu=True,
        report_to="none",
        save_strategy="no",
        logging_steps=settings.steps_per_update,
        disable_tqdm=True,
        dataloader_pin_memory=False,
    )
    keep = KeepWeights(policy, run, settings, settings.steps_per_update)
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=reward,
        args=args,
        train_dataset=prompts,
        processing_class=load_tokenizer(folder),
        critic_model=str(Path(folder) / "value"),
        callbacks=[keep],
    )
    trainer.train()
    keep.finish(trainer.optimizer.optimizer, episodes=settings.updates * settings.batch, trl=trl.__version__)


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(sys.argv[1], int(sys.argv[2]))
