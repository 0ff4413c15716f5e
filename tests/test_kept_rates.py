"""SFT and the reward stage go on at their checkpoint's learning rate, whatever is asked for, and say so."""

import logging

import pytest
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig

from rlhf_recipes.models import load_causal_lm, load_sequence_classifier
from rlhf_recipes.reward_modeling import PreferenceConfig, PreferenceTrainer
from rlhf_recipes.supervised import CompletionTrainer


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_other_rates_at_resume_are_named(tiny_model_path, tiny_tokenizer, tiny_texts, tmp_path, caplog, stage):
    def trainer(**fields):
        options = {"use_cpu": True, "bf16": False, "report_to": "none", "disable_tqdm": True, "save_steps": 1}
        options |= {"learning_rate": 1e-3, "lr_scheduler_type": "constant", "output_dir": str(tmp_path)} | fields
        task = "CAUSAL_LM" if stage == "sft" else "SEQ_CLS"
        lora = LoraConfig(task_type=task, target_modules="all-linear", r=4, lora_alpha=options.pop("lora_alpha", 8))
        shared = {"processing_class": tiny_tokenizer, "peft_config": lora}
        if stage == "sft":
            rows = Dataset.from_dict({"text": tiny_texts})
            model = load_causal_lm(tiny_model_path)
            return CompletionTrainer(model=model, args=SFTConfig(**options), train_dataset=rows, **shared)
        rows = [{"prompt": "the film ", "chosen": text, "rejected": "bad"} for text in tiny_texts]
        model = load_sequence_classifier(tiny_model_path)
        rows = Dataset.from_list(rows)
        return PreferenceTrainer(model=model, args=PreferenceConfig(**options), train_dataset=rows, **shared)

    trainer(max_steps=1).train()
    for fields, named in (({}, []), ({"learning_rate": 2e-4, "weight_decay": 0.1}, ["learning_rate", "weight_decay"])):
        caplog.clear()
        with caplog.at_level(logging.WARNING, "rlhf_recipes"):
            resumed = trainer(max_steps=2, **fields)
            resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
        said = [
            record.getMessage() for record in caplog.records if "goes on with its checkpoint's" in record.getMessage()
        ]
        assert [line.split("`")[1] for line in said] == named
        assert resumed.lr_scheduler.base_lrs == [1e-3, 1e-3]
    with pytest.raises(ValueError, match="`lora_alpha` 64 .the checkpoint's: 8.: its weights would compute something"):
        trainer(max_steps=2, lora_alpha=64).train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
