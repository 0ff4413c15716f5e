"""Stage 3: PPO of SmolLM2 against the reward model, judged by a lexicon and by the untouched base.

accelerate launch recipes/smollm2/train.py --config recipes/smollm2/ppo.yaml [--kl_coef 0]
"""

from dataclasses import dataclass, field
from functools import partial

from rlhf_recipes import PPOConfig
from rlhf_recipes.config import DataArguments, parse_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig


@dataclass
class SmolArguments:
    """The models that PPO starts from, and the prompts."""

    sft_adapter: str = field(metadata={"help": "Adapter to start from, which is also the reference."})
    reward_adapter: str = field(metadata={"help": "Reward model: an adapter trained on the same base."})
    prompt_words: int = field(default=6, metadata={"help": "Words of each text that are its prompt."})
    evaluation_rows: int = field(default=256, metadata={"help": "Completions of either side in the evaluation."})


ARGUMENTS = (SmolArguments, DataArguments, PPOConfig, ModelConfig)


def main(args: SmolArguments, data_args: DataArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    # Imported here, so that --help does not wait for them.
    from gold import judges

    from rlhf_recipes import PPOTrainer
    from rlhf_recipes.checkpoints import check_output_dir, is_finished
    from rlhf_recipes.data import load_rows, load_splits, to_prompts
    from rlhf_recipes.evaluation import FrontierTracker, RewardHackingAlarm, evaluate_policy, write_evaluation
    from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer, model_options
    from rlhf_recipes.tracking import log_outputs, start_stage

    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Prompts, and the SFT adapter on the 4-bit base.
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    rows = load_splits(data_args, partial(to_prompts, prompt_words=args.prompt_words))
    base = load_causal_lm(model_args.model_name_or_path, **model_options(model_args))
    policy = load_policy(base, args.sft_adapter, training_args.adapter_tolerance)

    # 2. PPO sees the reward model alone. The judges have weight 0: they are logged beside it.
    texts = load_rows(data_args.dataset_name, split=data_args.dataset_test_split)["text"][: args.evaluation_rows]
    limits = args.prompt_words, training_args.max_completion_length
    watching = judges(model_args.model_name_or_path, tokenizer, texts, *limits)
    training_args.reward_weights = [1.0, *(0.0 for _ in watching)]

    # 3. Train.
    trainer = PPOTrainer(
        model=policy,
        reward_funcs=[args.reward_adapter, *watching],
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )
    trainer.add_callback(FrontierTracker(trainer, gold="gold"))
    trainer.add_callback(RewardHackingAlarm(trainer, gold="gold"))
    run = start_stage(
        "ppo", training_args, args, data_args, model_args, parents=[args.sft_adapter, args.reward_adapter]
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    # 4. Is the policy better than its reference on prompts that no stage has seen?
    evaluation = evaluate_policy(trainer, rows["test"], gold="gold", rows=args.evaluation_rows)
    if trainer.is_world_process_zero():
        print(write_evaluation(evaluation, training_args.output_dir))
    log_outputs(run, training_args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
