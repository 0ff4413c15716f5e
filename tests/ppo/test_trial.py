"""A policy that would not sample from what PPO computes is refused when the trainer is built, with the cause."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import AutoConfig, AutoModelForCausalLM

from rlhf_recipes.models.arguments import CACHE
from rlhf_recipes.models.loading import load_causal_lm

SIZES = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 96,
    "initializer_range": 0.15,
    "pad_token_id": 0,
    "eos_token_id": 1,
}
ZERO = {"reward_funcs": lambda completion_ids, **kwargs: [0.0] * len(completion_ids), "critic_init": "policy"}


def fresh(**fields):
    return LoraConfig(task_type="CAUSAL_LM", target_modules="all-linear", r=4, **fields)


@pytest.fixture
def make(make_trainer, tiny_tokenizer, tmp_path):
    """Make a trainer on a tiny model of another family."""

    def build(kind, change=lambda model: None, peft_config="fresh", config=None, **fields):
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **SIZES | (config or {})))
        change(model)
        model.save_pretrained(tmp_path / "base")
        tiny_tokenizer.save_pretrained(tmp_path / "base")
        loaded = load_causal_lm(str(tmp_path / "base"))
        change(loaded)
        peft_config = fresh() if peft_config == "fresh" else peft_config
        return make_trainer(model=loaded, peft_config=peft_config, **ZERO | fields)

    return build


def noisy(model):
    """Noise in training that is not called dropout."""

    def add(module, args, output):
        return output + 0.3 * torch.randn_like(output) if model.model.training else output

    model.model.norm.register_forward_hook(add)


def scaled(model):
    """Logits that are scaled by a number of the model's own."""

    def scale(module, args, output):
        if "logits" in output:
            output.logits = 3 * output.logits

    model.register_forward_hook(scale)


def forgetful(model):
    """A cache that the model loses: each step of generation sees its own token only."""

    def forget(module, args, kwargs):
        if kwargs.get(CACHE) is not None and kwargs["input_ids"].size(1) == 1:
            return args, kwargs | {CACHE: None, "attention_mask": None, "position_ids": None}
        return None

    model.model.register_forward_pre_hook(forget, with_kwargs=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (noisy, "LlamaForCausalLM computes other distributions in training than in evaluation"),
        (scaled, "LlamaForCausalLM makes its logits of the last hidden states in a way that TRL does not know"),
        (forgetful, "LlamaForCausalLM computes other distributions token by token than of whole texts"),
    ],
)
def test_models_that_are_trained_wrongly_are_refused(make, change, message):
    with pytest.raises(ValueError, match=message):
        make("llama", change)


@pytest.mark.parametrize(
    ("kind", "config"),
    [
        ("gemma2", {"final_logit_softcapping": 2.0}),
        ("granite", {"logits_scaling": 3.0}),
        ("cohere", {"logit_scale": 0.3}),
        ("falcon_h1", {"lm_head_multiplier": 0.5, "mamba_d_ssm": 64, "mamba_n_heads": 4, "mamba_d_head": 16}),
    ],
)
def test_the_exact_kl_needs_logits_of_the_output_layer_alone(make, kind, config):
    with pytest.raises(ValueError, match="`kl_estimator: full` .*also scales or caps them.*Use `k1` or `k3`"):
        make(kind, config=config, kl_estimator="full")


def test_scaled_logits_of_an_untrained_scale_are_right(make):
    make("granite", config={"logits_scaling": 1.0}, kl_estimator="full")


@pytest.mark.parametrize("peft_config", [None, fresh(modules_to_save=["lm_head"])], ids=["whole", "modules_to_save"])
def test_the_exact_kl_to_the_old_policy_needs_an_output_layer_that_stays(make, peft_config):
    fields = {"kl_estimator": "full", "kl_anchor": "old", "kl_placement": "loss", "kl_coef": 0.1, "critic": "head"}
    with pytest.raises(ValueError, match="`kl_estimator: full` with `kl_anchor: old`.*`modules_to_save` names it"):
        make("llama", peft_config=peft_config, **fields)


def test_the_exact_kl_with_a_trained_output_layer_is_that_of_plain_logits(make):
    fields = {"kl_estimator": "full", "kl_coef": 0.0, "learning_rate": 3e-2, "gamma": 1.0}
    trainer = make("llama", peft_config=fresh(modules_to_save=["lm_head"]), **fields)
    trainer.reward_funcs[0] = lambda completion_ids, **kwargs: [float(len(ids)) for ids in completion_ids]
    trainer.train()
    head = trainer.model.get_output_embeddings()
    moved = (head.modules_to_save["default"].weight - head.original_module.weight).norm()
    assert moved > 0.1
    trainer.model.eval()
    batch = trainer._generate_and_score_completions([trainer.train_dataset[row] for row in range(8)])
    logged = trainer.evaluated.collect(0.0, trainer.reward_func_names, trainer.reward_weights)["kl"]
    sums = []
    for row in range(8):
        prompt = batch["prompt_ids"][row][batch["prompt_mask"][row].bool()]
        completion = batch["completion_ids"][row][batch["completion_mask"][row].bool()]
        ids = torch.cat([prompt, completion])[None]
        with torch.no_grad():
            policy = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            with trainer.model.disable_adapter():
                reference = trainer.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        sums.append((policy.exp() * (policy - reference)).sum())
    assert logged == pytest.approx(torch.stack(sums).mean().item(), rel=1e-4)
    assert logged > 0.05


def test_prompts_up_to_a_short_context_are_tried(make, prompts):
    rows = Dataset.from_list([{"prompt": "the"}] * 16)
    make("llama", config={"max_position_embeddings": 9}, dataset=rows, max_completion_length=4)
