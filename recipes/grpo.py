"""Stage 3, without a critic: TRL's GRPO or RLOO against the rewards of PPO, and its comparison with the reference.

accelerate launch recipes/grpo.py --config recipes/grpo_rloo/grpo.yaml [--algorithm rloo] [--beta 0.04]
"""

from functools import partial

from rlhf_recipes import GroupArguments, GRPOAdapterConfig, RLOOAdapterConfig
from rlhf_recipes.config import DataArguments, parse_stage, read_setting

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig

ARGUMENTS = (GroupArguments, DataArguments, GRPOAdapterConfig, ModelConfig)
ARGUMENTS_OF_RLOO = (GroupArguments, DataArguments, RLOOAdapterConfig, ModelConfig)


def main(
    args: GroupArguments,
    data_args: DataArguments,
    training_args: GRPOAdapterConfig | RLOOAdapterConfig,
    model_args: ModelConfig,
) -> None:
    # Imported here, so that --help does not wait for them.
    from rlhf_recipes import GRPOAdapterTrainer, RLOOAdapterTrainer
    from rlhf_recipes.checkpoints import check_output_dir, is_finished, load_finished
    from rlhf_recipes.data import load_splits, to_prompts
    from rlhf_recipes.evaluation import evaluate_policy, watch_training, write_evaluation
    from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer, lora_config, model_options
    from rlhf_recipes.tracking import log_outputs, start_stage

    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Prompts, and the policy: the SFT adapter on the (4-bit) base, or a fresh adapter on the bare base.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_splits(data_args, partial(to_prompts, prompt_words=args.prompt_words), tokenizer.chat_template)
    policy = load_causal_lm(model_args.model_name_or_path, **model_options(model_args), **source)
    if args.sft_adapter is not None:
        policy = load_policy(policy, args.sft_adapter, training_args.adapter_tolerance)

    # 2. Rewards as in ppo.py: append functions of your own here. The judge has weight 0.
    reward_funcs = args.rewards()
    if not reward_funcs:
        raise ValueError(
            f"{args.algorithm.upper()} needs a reward: set `reward_adapter`, `reward_adapters` or `reward_url`, or "
            "append one."
        )
    if args.gold_score is not None:
        training_args.reward_weights = [*(training_args.reward_weights or [1.0] * len(reward_funcs)), 0.0]
        reward_funcs.append(args.judge())

    # 3. Train. The hooks watch, on held-out prompts, how the score grows with the KL, and for a hacked reward.
    trainer_class = RLOOAdapterTrainer if args.algorithm == "rloo" else GRPOAdapterTrainer
    trainer = trainer_class(
        model=policy,
        reward_funcs=reward_funcs,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        peft_config=lora_config(model_args, "CAUSAL_LM") if args.sft_adapter is None else None,
    )
    judge = None if args.gold_score is None else trainer.reward_func_names[-1]
    watch_training(trainer, rows["test"], args, gold=judge)
    parents = [args.sft_adapter, args.reward_adapter, args.gate_adapter, *(args.reward_adapters or [])]
    run = start_stage(args.algorithm, training_args, args, data_args, model_args, parents=parents, python=reward_funcs)
    if load_finished(trainer, checkpoint) is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    # 4. Is the policy better than its reference on prompts that no stage has seen?
    evaluation = evaluate_policy(trainer, rows["test"], gold=judge, rows=args.evaluation_rows)
    if trainer.is_world_process_zero():
        print(write_evaluation(evaluation, training_args.output_dir))
    log_outputs(run, training_args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS_OF_RLOO if read_setting("algorithm") == "rloo" else ARGUMENTS))
