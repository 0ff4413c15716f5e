"""Stage 3: PPO against a reward model that reads facts which the policy does not see, and the paper's symbolic terms.

accelerate launch recipes/llava_rlhf/train.py --config recipes/llava_rlhf/ppo.yaml [--facts false]
"""

from dataclasses import dataclass, field

from rlhf_recipes import PPOConfig
from rlhf_recipes.config import DataArguments, parse_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig


@dataclass
class FactArguments:
    """The models that PPO starts from, and what the reward model reads."""

    sft_adapter: str = field(metadata={"help": "Adapter to start from, which is also the reference."})
    reward_adapter: str = field(metadata={"help": "Reward model: an adapter trained on the same base."})
    facts: bool = field(default=True, metadata={"help": "Let the reward model read `reward_prompt`, with the facts."})
    correct_answer_weight: float = field(default=2.0, metadata={"help": "Weight of the correct-answer term."})
    evaluation_rows: int = field(default=400, metadata={"help": "Completions of either side in the evaluation."})


ARGUMENTS = (FactArguments, DataArguments, PPOConfig, ModelConfig)


def main(args: FactArguments, data_args: DataArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    # Imported here, so that --help does not wait for them.
    from fact_rewards import correct_answer, gold, hallucinated, stated

    from rlhf_recipes import PPOTrainer
    from rlhf_recipes.checkpoints import check_output_dir, is_finished
    from rlhf_recipes.data import load_splits, to_prompts
    from rlhf_recipes.evaluation import FrontierTracker, evaluate_policy, write_evaluation
    from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer, model_options
    from rlhf_recipes.tracking import log_outputs, start_stage

    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Prompts, and the SFT adapter on the base. The policy reads `prompt`, rewards read `reward_prompt`.
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    rows = load_splits(data_args, to_prompts)
    if not args.facts:
        rows = rows.remove_columns("reward_prompt")
    base = load_causal_lm(model_args.model_name_or_path, **model_options(model_args))

    # 2. The reward model and the correct-answer term; the small world's judge counts with weight 0. The terms for a
    #    missing end token and for the length are fields of the YAML.
    judges = [stated, hallucinated, gold] if "facts" in rows["train"].column_names else []
    training_args.reward_weights = [1.0, args.correct_answer_weight, *(0.0 for _ in judges)]
    trainer = PPOTrainer(
        model=load_policy(base, args.sft_adapter, training_args.adapter_tolerance),
        reward_funcs=[args.reward_adapter, correct_answer, *judges],
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )

    # 3. Train.
    judge = "gold" if judges else None
    trainer.add_callback(FrontierTracker(trainer, gold=judge))
    run = start_stage(
        "ppo", training_args, args, data_args, model_args, parents=[args.sft_adapter, args.reward_adapter]
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    # 4. Does the policy say less that is not true, of pictures that no stage has seen?
    evaluation = evaluate_policy(trainer, rows["test"], gold=judge, rows=args.evaluation_rows)
    for side in ("policy", "reference") if judges else ():
        means = evaluation[side]["rewards"]
        evaluation[side]["hallucination_rate"] = means["hallucinated"] / max(means["stated"], 1e-9)
    if trainer.is_world_process_zero():
        print(write_evaluation(evaluation, training_args.output_dir))
    if judges and trainer.is_world_process_zero():
        rates = (f"{evaluation[side]['hallucination_rate']:.3f} of the {side}" for side in ("policy", "reference"))
        print(f"share of stated attributes that are not true: {', '.join(rates)}")
    log_outputs(run, training_args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
