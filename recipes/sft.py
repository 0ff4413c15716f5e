"""Stage 1: supervised fine-tuning. A LoRA adapter on a (4-bit) base learns to imitate completions.

accelerate launch recipes/sft.py --config recipes/quickstart/sft.yaml [--learning_rate 1e-3]
"""

from rlhf_recipes.checkpoints import check_output_dir, is_finished, load_finished, save_evaluation
from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.data import check_completions, check_tokenized, end_token_ids, load_splits, to_completions
from rlhf_recipes.models import (
    load_policy_base,
    load_tokenizer,
    lora_config,
    stage_table,
    upcast_trainable,
)
from rlhf_recipes.supervised import CompletionConfig, CompletionTrainer, completions_table, evaluate_completions
from rlhf_recipes.tracking import log_outputs, start_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from trl import ModelConfig

ARGUMENTS = (DataArguments, CompletionConfig, ModelConfig)


def main(data_args: DataArguments, training_args: CompletionConfig, model_args: ModelConfig) -> None:
    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Completions to imitate (of preferences, the better ones), and the base model. The loss is on the completions;
    #    `text` and `messages` rows count as a whole.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_splits(data_args, to_completions, tokenizer.chat_template)
    model, reader = load_policy_base(model_args, tokenizer, rows, **source)  # with a processor if rows have pictures
    check_completions(rows["train"], tokenizer, end_token_ids(model, tokenizer))

    # 2. TRL's trainer puts the adapter on the base, and an end token after every completion.
    trainer = CompletionTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=reader,
        peft_config=lora_config(model_args, "CAUSAL_LM", model),
    )
    upcast_trainable(trainer.model)
    check_tokenized(trainer, given=rows)

    # 3. Train.
    parents = [model_args.model_name_or_path, data_args.dataset_name]
    run = start_stage("sft", training_args, data_args, model_args, parents=parents)
    if trainer.is_world_process_zero():
        print(stage_table(trainer.model, "policy"))
    if load_finished(trainer, checkpoint) is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # 4. How well does it predict the completions of the held-out rows?
    evaluation = evaluate_completions(trainer)
    trainer.save_state()
    if trainer.is_world_process_zero():
        path = save_evaluation(evaluation, training_args.output_dir)
        print(f"\n{completions_table(evaluation)}\n{path}")
    log_outputs(run, training_args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
