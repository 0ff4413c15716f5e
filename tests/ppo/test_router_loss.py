"""The auxiliary loss of the routers of a mixture of experts, against transformers' own."""

import pytest
import torch
from peft import LoraConfig
from torch.testing import assert_close
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes.models.loading import load_causal_lm
from rlhf_recipes.models.packing import is_packed
from tests.ppo.support import logged, trained, without_chance
from tests.ppo.test_trial import SIZES, ZERO

KINDS = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 24,
        "n_group": 1,
        "topk_group": 1,
        "first_k_dense_replace": 1,
        "kv_lora_rank": 8,
        "q_lora_rank": 8,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "num_key_value_heads": 4,
    },
}


@pytest.fixture
def make(make_trainer, tiny_tokenizer, tmp_path):
    def build(kind, config=None, attention=None, **fields):
        sizes = SIZES | KINDS[kind] | (config or {})
        torch.manual_seed(2)
        AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **sizes)).save_pretrained(tmp_path / kind)
        tiny_tokenizer.save_pretrained(tmp_path / kind)
        model = load_causal_lm(str(tmp_path / kind), attn_implementation=attention)
        lora = LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4)
        return without_chance(make_trainer(model=model, peft_config=lora, **ZERO | fields))

    return build


def inputs_of(trainer):
    """A list that gets what the loss is computed of."""
    batches, compute = [], trainer._compute_loss

    def record(model, inputs):
        batches.append(dict(inputs))
        return compute(model, inputs)

    trainer._compute_loss = record
    return batches


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_it_is_added_as_the_model_computes_it(make, attention):
    one = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 1, "max_steps": 1, "num_iterations": 1}
    losses = {}
    for coefficient in (0.0, 5.0):
        trainer = make("mixtral", attention=attention, router_aux_loss_coef=coefficient, **one)
        assert is_packed(trainer.model.get_base_model()) == (attention == "sdpa")
        batches = inputs_of(trainer)
        start = trained(trainer)
        trainer.train()
        losses[coefficient] = logged(trainer, "loss")[0]
    [found] = logged(trainer, "ppo/router_loss")
    [batch] = batches
    with torch.no_grad():
        for name, weight in trainer.model.named_parameters():
            if name in start:
                weight.copy_(start[name])
        ids, mask = (
            torch.cat([batch[f"{side}_{what}"] for side in ("prompt", "completion")], dim=1)
            for what in ("ids", "mask")
        )
        outputs = trainer.model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=(mask.cumsum(1) - 1).clamp(min=0),
            output_router_logits=True,
        )
    assert found == pytest.approx(outputs.aux_loss.item(), rel=1e-5)
    assert losses[5.0] - losses[0.0] == pytest.approx(5 * found, rel=1e-4)


def test_it_adds_up_over_accumulated_micro_batches(make):
    """The gradient of four micro-batches is the mean of theirs, weighted by their tokens."""
    trainer = make(
        "mixtral",
        router_aux_loss_coef=100.0,
        per_device_train_batch_size=2,
        gradient_accumulation_steps=4,
        max_steps=1,
        num_iterations=1,
        kl_coef=0.0,
        vf_coef=1e-9,
    )
    seen, compute = [], trainer._compute_loss

    def record(model, inputs):
        loss = compute(model, inputs)
        seen.append((loss.item(), inputs["completion_mask"].sum().item()))
        return loss

    trainer._compute_loss = record
    trainer.train()
    tokens = sum(count for _, count in seen)
    assert len({count for _, count in seen}) > 1
    for loss, count in seen:
        assert loss / (count / tokens) == pytest.approx(100 * logged(trainer, "ppo/router_loss")[0], rel=0.1)
    assert sum(loss for loss, _ in seen) == pytest.approx(100 * logged(trainer, "ppo/router_loss")[0], rel=1e-3)


@pytest.mark.parametrize("kind", ["mixtral", "phimoe", "qwen3_moe"])
def test_the_models_own_coefficient_counts_where_none_is_set(make, kind):
    trainer = make(kind, {"router_aux_loss_coef": 0.25, "output_router_logits": kind != "phimoe"}, max_steps=1)
    assert (trainer.aux_loss_enabled, trainer.router_aux_loss_coef) == (True, 0.25)
    del trainer._generate_single_turn  # sample: router logits would not fit a step of generation
    trainer.train()
    assert logged(trainer, "ppo/router_loss")[0] > 0.5


def test_a_coefficient_without_such_a_loss_is_refused(make):
    with pytest.raises(ValueError, match="`router_aux_loss_coef` is 0.5, but DeepseekV3ForCausalLM computes no"):
        make("deepseek_v3", router_aux_loss_coef=0.5)
    assert not make("deepseek_v3").aux_loss_enabled


def test_gradients_are_the_same_with_checkpointing(make):
    found = []
    for checkpointing in (False, True):
        trainer = make("mixtral", router_aux_loss_coef=10.0, max_steps=1, gradient_checkpointing=checkpointing)
        trainer.train()
        found.append(trained(trainer))
    for name, weight in found[0].items():
        assert_close(found[1][name], weight, atol=1e-6, rtol=1e-4, msg=name)
