"""Stage 2: a reward model. A LoRA adapter and a score head on the same (4-bit) base learn what is preferred.

accelerate launch recipes/reward.py --config recipes/quickstart/reward.yaml [--learning_rate 1e-3]
"""

import json
from functools import partial
from pathlib import Path

from datasets import Dataset, DatasetDict
from transformers import set_seed

from rlhf_recipes.checkpoints import check_output_dir, is_finished
from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.data import to_preferences
from rlhf_recipes.data.context import context_length
from rlhf_recipes.data.instructions import instructions_as_chats
from rlhf_recipes.data.preferences import compared_pairs, to_preference_table
from rlhf_recipes.data.splits import load_splits
from rlhf_recipes.data.tokenized import check_tokenized
from rlhf_recipes.models import (
    load_sequence_classifier,
    load_tokenizer,
    lora_config,
    quantization_config,
    stage_table,
    upcast_trainable,
)
from rlhf_recipes.reward_modeling import (
    PreferenceConfig,
    PreferenceTrainer,
    RewardModelConfig,
    check_rows,
    check_score_head,
    drop_ties,
    evaluate_pairs,
)
from rlhf_recipes.reward_modeling.baselines import pair_baselines
from rlhf_recipes.rewards.encoding import encode_rows, is_encoder
from rlhf_recipes.tracking import log_outputs, stage_config, start_run

ARGUMENTS = (DataArguments, PreferenceConfig, RewardModelConfig)


def main(data_args: DataArguments, training_args: PreferenceConfig, model_args: RewardModelConfig) -> None:
    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return
    set_seed(training_args.seed)  # the score head starts at random

    # 1. Preferences and base model.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_splits(data_args, partial(to_rows, config=training_args, chat_template=tokenizer.chat_template))
    if training_args.objective == "pairwise" and "completions" in rows["train"].column_names:
        rows = DatasetDict({name: compared_pairs(split) for name, split in rows.items()})
    rows["train"] = drop_ties(rows["train"], training_args)
    model = load_sequence_classifier(
        model_args.model_name_or_path,
        quantization_config=quantization_config(model_args),
        dtype=model_args.dtype,
        attn_implementation=model_args.attn_implementation,
        **source,
    )

    texts = rows
    if pairs := "chosen" in rows["train"].column_names:  # the trainer leaves out long ones; the baselines must too
        rows = DatasetDict({name: split.add_column("_row", range(len(split))) for name, split in rows.items()})
    if is_encoder(model):  # `[CLS] prompt [SEP] completion [SEP]`, as PPO reads it
        rows = encode_rows(rows, tokenizer, context_length(model), training_args.max_length)

    # 2. The trainer puts the adapter on the base, and an end token after every text, but not after rows that bring
    #    their own tokens (`chosen_ids`, `rejected_ids`; `completion_ids`), where a completion may have been cut off.
    trainer = PreferenceTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=tokenizer,
        peft_config=lora_config(model_args, "SEQ_CLS", model),
    )
    upcast_trainable(trainer.model)
    check_score_head(trainer)
    check_tokenized(trainer, given=rows)

    # 3. Train, and score the held-out rows.
    run = start_run(
        recipe=Path(training_args.output_dir).resolve().parent.name,
        stage="reward",
        output_dir=training_args.output_dir,
        config=stage_config(data_args, training_args, model_args),
        parent=[model_args.model_name_or_path, data_args.dataset_name],
        report_to=training_args.report_to,
    )
    if trainer.is_world_process_zero():
        print(stage_table(trainer.model, "reward"))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()
    evaluation = evaluate_pairs(trainer)
    trainer.log({f"eval_{name}": evaluation[name] for name in ("accuracy", "margin") if name in evaluation})
    trainer.save_state()
    if trainer.is_world_process_zero():
        if pairs:
            kept = texts["test"].select(trainer.eval_dataset["_row"])
            evaluation["baselines"] = pair_baselines(texts["train"], kept)
        Path(training_args.output_dir, "evaluation.json").write_text(json.dumps(evaluation, indent=2) + "\n")
    log_outputs(run, training_args.output_dir)
    trainer.end()


def to_rows(
    dataset: Dataset,
    *,
    config: PreferenceConfig | None = None,
    chat_template: str | None = None,
    drop_bad_rows: bool = False,
) -> Dataset:
    """Pairs of `chosen` and `rejected` as TRL takes them; every other kind of rows as the preference table."""
    dataset = instructions_as_chats(dataset, chat_template)
    columns = dict(dataset.features)
    in_words = "label" in columns and getattr(columns["label"], "dtype", None) in ("string", "bool")
    graded = {"strength", "preference_strength", "num_correct"} & columns.keys()
    if not {"chosen", "rejected"} <= columns.keys() or in_words or graded:
        return to_preference_table(dataset, drop_bad_rows=drop_bad_rows)
    if config is not None:
        check_rows(dataset, config, "given")
    return to_preferences(dataset, drop_bad_rows=drop_bad_rows)


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
