"""Stage 2: a reward model. A LoRA adapter and a score head on the same (4-bit) base learn what is preferred.

accelerate launch recipes/reward.py --config recipes/quickstart/reward.yaml [--learning_rate 1e-3]
"""

from rlhf_recipes.checkpoints import check_output_dir, is_finished, save_evaluation
from rlhf_recipes.config import DataArguments, parse_stage
from rlhf_recipes.data import check_tokenized, context_length
from rlhf_recipes.models import (
    load_reward_base,
    load_tokenizer,
    lora_config,
    stage_table,
    start_from,
    upcast_trainable,
)
from rlhf_recipes.reward_modeling import (
    PreferenceConfig,
    PreferenceTrainer,
    RewardModelConfig,
    check_score_head,
    evaluate_pairs,
    load_reward_rows,
    normalize_score_head,
    pair_baselines,
    pairs_table,
)
from rlhf_recipes.rewards.encoding import encode_rows, is_encoder
from rlhf_recipes.tracking import log_outputs, start_stage

# The library is first: it knows what others say on import and nobody needs to hear.
# isort: split
from transformers import set_seed

ARGUMENTS = (DataArguments, PreferenceConfig, RewardModelConfig)


def main(data_args: DataArguments, training_args: PreferenceConfig, model_args: RewardModelConfig) -> None:
    checkpoint = check_output_dir(training_args)
    if is_finished(training_args, checkpoint):
        return
    set_seed(training_args.seed)  # the score head starts at random

    # 1. Preferences and base model.
    source = {"revision": model_args.model_revision, "trust_remote_code": training_args.trust_remote_code}
    tokenizer = load_tokenizer(model_args.model_name_or_path, **source)
    rows = load_reward_rows(data_args, training_args, tokenizer.chat_template)
    model, reader = load_reward_base(model_args, tokenizer, rows, **source)  # with a processor if rows have pictures
    if is_encoder(model):  # `[CLS] prompt [SEP] completion [SEP]`, as PPO reads it
        rows = encode_rows(rows, tokenizer, context_length(model), training_args.max_length)

    # 2. The trainer puts the adapter on the base, and an end token after every text, but not after rows that bring
    #    their own tokens (`chosen_ids`, `rejected_ids`; `completion_ids`), where a completion may have been cut off.
    trainer = PreferenceTrainer(
        model=model,
        args=training_args,
        train_dataset=rows["train"],
        eval_dataset=rows["test"],
        processing_class=reader,
        peft_config=lora_config(model_args, "SEQ_CLS", model),
    )
    upcast_trainable(trainer.model)
    start_from(trainer.model, model_args.start_adapter)
    check_score_head(trainer)
    check_tokenized(trainer, given=rows)
    if training_args.normalize_head and checkpoint is None:
        normalize_score_head(trainer)

    # 3. Train.
    start = model_args.start_adapter or model_args.model_name_or_path
    run = start_stage("reward", training_args, data_args, model_args, parents=[start, data_args.dataset_name])
    if trainer.is_world_process_zero():
        print(stage_table(trainer.model, "reward"))
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model()

    # 4. How often does it prefer what was preferred, in the held-out rows, and how often do simple rules?
    evaluation = evaluate_pairs(trainer)
    trainer.log({f"eval_{name}": evaluation[name] for name in ("accuracy", "margin") if name in evaluation})
    trainer.save_state()
    if trainer.is_world_process_zero():
        if "chosen" in rows["test"].column_names:
            evaluation["baselines"] = pair_baselines(rows["train"], rows["test"].select(trainer.eval_dataset["_row"]))
        path = save_evaluation(evaluation, training_args.output_dir)
        print(f"\n{pairs_table(evaluation)}\n{path}")
    log_outputs(run, training_args.output_dir)
    trainer.end()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
