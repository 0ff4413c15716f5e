"""Stage 1: supervised fine-tuning. A LoRA adapter on a (4-bit) base learns to imitate completions.

accelerate launch recipes/sft.py --config recipes/quickstart/sft.yaml [--learning_rate 1e-3]
"""

import json
import math
from functools import partial
from pathlib import Path

from datasets import Dataset
from trl import ModelConfig, SFTConfig

from rlhf_recipes.checkpoints import check_output_dir, is_finished, load_finished
from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.data import to_completions
from rlhf_recipes.data.chat_templates import check_completions, end_token_ids
from rlhf_recipes.data.instructions import instructions_as_chats
from rlhf_recipes.data.splits import load_splits
from rlhf_recipes.data.tokenized import check_tokenized
from rlhf_recipes.models import (
    load_causal_lm,
    load_tokenizer,
    lora_config,
    quantization_config,
    stage_table,
    upcast_trainable,
)
from rlhf_recipes.supervised import CompletionTrainer
from rlhf_recipes.tracking import log_outputs, stage_config, start_run

ARGUMENTS = (DataArguments, SFTConfig, ModelConfig)


def main(data_args: DataArguments, training_args: SFTConfig, model_args: ModelConfig) -> None:
    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return

    # 1. Rows and base model. The loss is on the completions; `text` and `messages` rows count as a whole.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_splits(data_args, partial(to_rows, chat_template=tokenizer.chat_template))
    model = load_causal_lm(
        model_args.model_name_or_path,
        quantization_config=quantization_config(model_args),
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **source,
    )

    check_completions(rows["train"], tokenizer, end_token_ids(model, tokenizer))

    # 2. TRL's trainer puts the adapter on the base, and an end token after every completion.
    trainer = CompletionTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        peft_config=lora_config(model_args, "CAUSAL_LM", model),
    )
    upcast_trainable(trainer.model)
    check_tokenized(trainer, given=rows)

    # 3. Train, and measure the loss on the held-out rows.
    run = start_run(
        recipe=Path(training_args.output_dir).resolve().parent.name,
        stage="sft",
        output_dir=training_args.output_dir,
        config=stage_config(data_args, training_args, model_args),
        parent=[model_args.model_name_or_path, data_args.dataset_name],
        report_to=training_args.report_to,
    )
    if trainer.is_world_process_zero():
        print(stage_table(trainer.model, "policy"))
    if load_finished(trainer, checkpoint) is None:
        trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    loss = trainer.evaluate()["eval_loss"]
    trainer.save_state()
    if trainer.is_world_process_zero():
        evaluation = {"loss": loss, "perplexity": math.exp(loss), "n": len(trainer.eval_dataset)}
        Path(training_args.output_dir, "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    log_outputs(run, training_args.output_dir)
    trainer.end()


def to_rows(dataset: Dataset, *, chat_template: str | None = None, drop_bad_rows: bool = False) -> Dataset:
    """Completions to imitate: those of the rows, or the better ones of preferences."""
    return to_completions(instructions_as_chats(dataset, chat_template), drop_bad_rows=drop_bad_rows)


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
