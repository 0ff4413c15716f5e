"""R1-Zero: GRPO on a base model without any SFT, paid for right answers and for the form, by rules alone.

accelerate launch recipes/r1/train.py --config recipes/r1/grpo.yaml [--learning_rate 1e-5]
"""

from dataclasses import dataclass, field

from rlhf_recipes import GRPOAdapterConfig
from rlhf_recipes.config import DataArguments, parse_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig


@dataclass
class R1Arguments:
    """How the policy is judged."""

    evaluation_rows: int = field(default=512, metadata={"help": "Completions of either side in the evaluation."})


ARGUMENTS = (R1Arguments, DataArguments, GRPOAdapterConfig, ModelConfig)


def main(
    args: R1Arguments, data_args: DataArguments, training_args: GRPOAdapterConfig, model_args: ModelConfig
) -> None:
    # Imported here, so that --help does not wait for them.
    from rlhf_recipes import GRPOAdapterTrainer
    from rlhf_recipes.checkpoints import check_output_dir, is_finished, load_finished
    from rlhf_recipes.data import load_splits, to_prompts
    from rlhf_recipes.evaluation import FrontierTracker, RewardHackingAlarm, evaluate_policy, write_evaluation
    from rlhf_recipes.models import load_causal_lm, load_tokenizer, lora_config, model_options
    from rlhf_recipes.rewards import check_verifier, format_reward, gym_accuracy, refuse_if_bought
    from rlhf_recipes.tracking import log_outputs, start_stage

    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Questions, and the rewards. Which wrong answers would the accuracy pay? If any: no training.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_splits(data_args, to_prompts, tokenizer.chat_template)
    tried = rows["test"].select(range(min(64, len(rows["test"]))))
    refuse_if_bought(check_verifier(gym_accuracy, tried, template="<think>So.</think><answer>{answer}</answer>"))

    # 2. The base itself, without SFT, with a fresh adapter.
    trainer = GRPOAdapterTrainer(
        model=load_causal_lm(model_args.model_name_or_path, **model_options(model_args), **source),
        reward_funcs=[gym_accuracy, format_reward],
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        peft_config=lora_config(model_args, "CAUSAL_LM"),
    )

    # 3. Train. The hooks watch how the accuracy grows with the KL, and for a form without right answers.
    trainer.add_callback(FrontierTracker(trainer, gold="gym_accuracy"))
    trainer.add_callback(RewardHackingAlarm(trainer, gold="gym_accuracy"))
    parents = [model_args.model_name_or_path, data_args.dataset_name]
    run = start_stage("grpo", training_args, args, data_args, model_args, parents=parents)
    if load_finished(trainer, checkpoint) is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    trainer.save_state()

    # 4. How many held-out questions does it answer, and how many did the base? No question occurs in the training.
    evaluation = evaluate_policy(trainer, rows["test"], gold="gym_accuracy", rows=args.evaluation_rows)
    if trainer.is_world_process_zero():
        print(write_evaluation(evaluation, training_args.output_dir))
    log_outputs(run, training_args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
