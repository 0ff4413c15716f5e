"""PPO by the textbook: one learned reward, one judge, and Adam as in TensorFlow.

accelerate launch recipes/textbook_ppo/train.py --config recipes/textbook_ppo/ppo.yaml [--kl_anchor reference]
"""

from dataclasses import dataclass, field

from rlhf_recipes import PPOConfig
from rlhf_recipes.config import DataArguments, parse_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig


@dataclass
class TextbookArguments:
    """The models that PPO starts from, and the judge."""

    sft_adapter: str = field(metadata={"help": "Adapter to start from, which is also the reference."})
    reward_adapter: str = field(metadata={"help": "Reward model: an adapter trained on the same base."})
    gold_score: str = field(metadata={"help": "Judge that PPO does not see: gold.json of the quickstart's world."})
    evaluation_rows: int = field(default=512, metadata={"help": "Completions of either side in the evaluation."})


ARGUMENTS = (TextbookArguments, DataArguments, PPOConfig, ModelConfig)


def main(args: TextbookArguments, data_args: DataArguments, training_args: PPOConfig, model_args: ModelConfig) -> None:
    # Imported here, so that --help does not wait for them.
    from tensorflow_adam import TensorFlowAdamW

    from rlhf_recipes import PPOTrainer
    from rlhf_recipes.checkpoints import check_output_dir, is_finished
    from rlhf_recipes.data import load_splits, to_prompts
    from rlhf_recipes.data.synthetic import GoldScore
    from rlhf_recipes.evaluation import FrontierTracker, RewardHackingAlarm, evaluate_policy, write_evaluation
    from rlhf_recipes.models import load_causal_lm, load_policy, load_tokenizer, model_options
    from rlhf_recipes.tracking import log_outputs, start_stage

    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Prompts, policy, rewards. The judge has weight 0.
    tokenizer = load_tokenizer(model_args.model_name_or_path)
    rows = load_splits(data_args, to_prompts)
    base = load_causal_lm(model_args.model_name_or_path, **model_options(model_args))
    training_args.reward_weights = [1.0, 0.0]
    trainer = PPOTrainer(
        model=load_policy(base, args.sft_adapter, training_args.adapter_tolerance),
        reward_funcs=[args.reward_adapter, GoldScore.from_file(args.gold_score)],
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
    )

    # 2. The optimizer takes the place of the trainer's own, which knows the learning rates of policy and critic. It
    #    comes after the trainer, which makes the critic.
    trainer.optimizer = TensorFlowAdamW(trainer.create_optimizer().param_groups)

    # 3. Train. The hooks watch how the score grows with the KL, and warn of a hacked reward.
    judge = trainer.reward_func_names[-1]
    trainer.add_callback(FrontierTracker(trainer, gold=judge))
    trainer.add_callback(RewardHackingAlarm(trainer, gold=judge))
    run = start_stage(
        "ppo", training_args, args, data_args, model_args, parents=[args.sft_adapter, args.reward_adapter]
    )
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
    main(*parse_stage(ARGUMENTS))
