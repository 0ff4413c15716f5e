"""Completions of any trainer's policy and reference, against single rows."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import SFTConfig, SFTTrainer

from rlhf_recipes.evaluation.sampling import has_reference, sample_rows
from rlhf_recipes.models import load_causal_lm
from tests.families.stages import PROMPTS, plain_logps, plain_text, save_base


@pytest.mark.parametrize("family", ["minimax", "qwen2"])
def test_completions_are_those_of_single_prompts(family, tiny_tokenizer, tmp_path):
    """The likeliest tokens after prompts of unlike length, also of a model whose generation takes padding for text."""
    base = save_base(family, tmp_path / "base", tiny_tokenizer)
    rows = Dataset.from_list([{"prompt": prompt, "completion": " good"} for prompt in PROMPTS])
    trainer = SFTTrainer(
        model=load_causal_lm(base),
        args=SFTConfig(
            str(tmp_path / "run"),
            use_cpu=True,
            bf16=False,
            report_to="none",
            per_device_eval_batch_size=8,
            max_steps=1,
        ),
        train_dataset=rows,
        processing_class=tiny_tokenizer,
        peft_config=LoraConfig(r=4, task_type="CAUSAL_LM", target_modules=["q_proj"]),
    )
    trainer.temperature = 1e-5  # which an SFT trainer does not have: to draw the likeliest
    for parameter in trainer.model.parameters():
        if parameter.requires_grad:
            parameter.data += torch.randn_like(parameter) * 0.1
    model = trainer.model.eval()
    found = sample_rows(trainer, rows, list(range(8)), of_reference=False, gold=None, seed=0, max_new_tokens=6)
    prompt_ids = tiny_tokenizer(PROMPTS)["input_ids"]
    assert len({len(ids) for ids in prompt_ids}) > 3
    ends = [tiny_tokenizer.eos_token_id]
    assert [row["completion_ids"] for row in found] == [plain_text(model, ids, ends, 6) for ids in prompt_ids]

    trainer.temperature = 1.0
    found = sample_rows(trainer, rows, list(range(8)), of_reference=False, gold=None, seed=0, max_new_tokens=6)
    for ids, row in zip(prompt_ids, found, strict=True):
        ours = plain_logps(model, ids, row["completion_ids"])
        with model.disable_adapter():
            theirs = plain_logps(model, ids, row["completion_ids"])
        assert row["kl"] == pytest.approx((ours - theirs).sum().item(), abs=1e-5)


def test_a_policy_that_ppo_trains_as_a_whole_has_a_reference(make_trainer, tiny_model_path, prompts):
    def count(completion_ids, **kwargs):
        return [0.1 * len(ids) for ids in completion_ids]

    trainer = make_trainer(model=tiny_model_path, reward_funcs=count, critic_init="policy")
    assert has_reference(trainer)
    with torch.no_grad():
        for name, parameter in trainer.model.named_parameters():
            if name.startswith("lm_head"):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trainer.model.eval()
    policy, reference = (
        sample_rows(trainer, prompts, [0, 1, 2, 3], of_reference=side, gold=None, seed=0) for side in (False, True)
    )
    assert all(row["kl"] == 0.0 for row in reference)
    assert any(row["kl"] != 0.0 for row in policy)
    prompt_ids = trainer.processing_class(list(prompts["prompt"]))["input_ids"]
    for ids, row in zip(prompt_ids, policy, strict=False):
        ours, theirs = (
            plain_logps(model, ids, row["completion_ids"]) for model in (trainer.model, trainer.roles.model)
        )
        assert row["kl"] == pytest.approx((ours - theirs).sum().item(), abs=1e-5)
