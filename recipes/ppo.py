"""Stage 3: PPO against the reward model, and the comparison of the policy with its reference.

accelerate launch recipes/ppo.py --config recipes/quickstart/ppo.yaml [--learning_rate 1e-5]
"""

from trl import ModelConfig

from rlhf_recipes import PPOConfig
from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.ppo.arguments import PPOArguments

ARGUMENTS = (PPOArguments, DataArguments, PPOConfig, ModelConfig)


def main(ppo_args: PPOArguments, data_args: DataArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    # Imported here, so that --help does not wait for them.
    from pathlib import Path

    from datasets import Dataset

    from rlhf_recipes import PPOTrainer
    from rlhf_recipes.checkpoints import check_output_dir, is_finished
    from rlhf_recipes.data import load_rows, to_prompts
    from rlhf_recipes.data.instructions import instructions_as_chats
    from rlhf_recipes.data.splits import load_splits
    from rlhf_recipes.data.synthetic import GoldScore
    from rlhf_recipes.evaluation.policy import evaluate_policy, write_evaluation
    from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer, lora_config, quantization_config
    from rlhf_recipes.rewards import EnsembleReward, RemoteReward
    from rlhf_recipes.tracking import log_outputs, stage_config, start_run

    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Prompts, and the policy: the SFT adapter on the (4-bit) base, or a fresh adapter on the bare base.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)

    def to_rows(dataset: Dataset, *, drop_bad_rows: bool = False) -> Dataset:
        dataset = instructions_as_chats(dataset, tokenizer.chat_template)
        return to_prompts(dataset, prompt_words=ppo_args.prompt_words, drop_bad_rows=drop_bad_rows)

    rows = load_splits(data_args, to_rows)
    policy = load_causal_lm(
        model_args.model_name_or_path,
        quantization_config=quantization_config(model_args),
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **source,
    )
    if ppo_args.sft_adapter is not None:
        policy = load_policy(policy, ppo_args.sft_adapter, training_args.adapter_tolerance)

    # 2. Rewards: add your own functions to this list, and their weights to `reward_weights`. The judge has weight 0:
    #    it is logged beside the reward, and PPO does not see it.
    reward_funcs = [] if ppo_args.reward_adapter is None else [ppo_args.reward_adapter]
    if ppo_args.reward_adapters is not None:
        reward_funcs.append(
            EnsembleReward(ppo_args.reward_adapters, ppo_args.reward_ensemble, ppo_args.reward_ensemble_k)
        )
    if ppo_args.reward_url is not None:
        reward_funcs.append(RemoteReward(ppo_args.reward_url))
    if not reward_funcs:
        raise ValueError(
            "PPO needs a reward: set `reward_adapter`, `reward_adapters` or `reward_url`, or add functions to "
            "`reward_funcs` in this script."
        )
    weights = training_args.reward_weights or [1.0] * len(reward_funcs)
    gold = ppo_args.gold_score
    if gold is not None:
        reward_funcs.append(GoldScore.from_file(gold) if gold.endswith(".json") else gold)
        training_args.reward_weights = [*weights, 0.0]

    # 3. Train.
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        peft_config=lora_config(model_args, "CAUSAL_LM") if ppo_args.sft_adapter is None else None,
        critic_model=ppo_args.critic_model,
        ptx_dataset=None if ppo_args.ptx_dataset is None else load_rows(ppo_args.ptx_dataset, split="train"),
    )
    judge = None if gold is None else trainer.reward_func_names[len(reward_funcs) - 1]
    add_hooks(trainer, rows["test"], ppo_args, judge)
    run = start_run(
        recipe=Path(training_args.output_dir).resolve().parent.name,
        stage="ppo",
        output_dir=training_args.output_dir,
        config=stage_config(ppo_args, data_args, training_args, model_args),
        parent=[path for path in (ppo_args.sft_adapter, ppo_args.reward_adapter) if path is not None]
        + (ppo_args.reward_adapters or []),
        report_to=training_args.report_to,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    # 4. Is the policy better than its reference on prompts that no stage has seen?
    evaluation = evaluate_policy(trainer, rows["test"], gold=judge, rows=ppo_args.evaluation_rows)
    if trainer.is_world_process_zero():
        print(write_evaluation(evaluation, training_args.output_dir))
    log_outputs(run, training_args.output_dir)
    trainer.end()


def add_hooks(trainer, rows, ppo_args: PPOArguments, judge: str | None) -> None:
    """Watch the training: on held-out prompts, how the score grows with the KL, and for signs of a hacked reward."""
    from rlhf_recipes.evaluation.callbacks import FrontierTracker, PolicyEvaluation, RewardHackingAlarm
    from rlhf_recipes.evaluation.hacking_signs import AlarmLimits

    if ppo_args.evaluation_steps is not None:
        trainer.add_callback(PolicyEvaluation(trainer, rows, ppo_args.evaluation_steps, gold=judge, at_end=False))
    trainer.add_callback(FrontierTracker(trainer, gold=judge))
    if ppo_args.alarm != "off":
        limits = AlarmLimits(kl_budget=ppo_args.alarm_kl_budget)
        trainer.add_callback(RewardHackingAlarm(trainer, gold=judge, action=ppo_args.alarm, limits=limits))


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
