"""A merge computes what the adapter computes on its base, whatever kind of LoRA it is, and says what it loses."""

import json

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
)

from rlhf_recipes.tools.export.merging import Rounding, merge_layers

IDS = torch.tensor([[6, 7, 8, 9, 10, 6, 1]])
LLAMA = LlamaConfig(
    vocab_size=40,
    hidden_size=64,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    tie_word_embeddings=True,
    initializer_range=0.1,
)
GPT2 = GPT2Config(vocab_size=40, n_positions=16, n_embd=64, n_layer=1, n_head=2, initializer_range=0.1)
KINDS = {
    "plain": {"target_modules": "all-linear"},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "dora": {"target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "tied input": {"target_modules": ["q_proj", "embed_tokens"]},
    "tied output": {"target_modules": ["q_proj", "lm_head"]},
    "both together": {"target_modules": ["q_proj", "embed_tokens"], "ensure_weight_tying": True},
    "saved input": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved output": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "tokens": {"target_modules": ["q_proj"], "trainable_token_indices": [6, 7]},
    "norms": {"target_modules": ["q_proj"], "modules_to_save": ["input_layernorm"]},
    "columns": {"target_modules": ["c_attn", "c_fc"], "fan_in_fan_out": True},
}


def adapted(kind, dtype, scale=0.1):
    torch.manual_seed(0)
    base = GPT2LMHeadModel(GPT2) if kind == "columns" else LlamaForCausalLM(LLAMA)
    model = get_peft_model(base.to(dtype), LoraConfig(task_type="CAUSAL_LM", r=4, **KINDS[kind])).eval()
    generator = torch.Generator().manual_seed(1)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += scale * torch.randn(parameter.shape, generator=generator)
    return model


def merged(model, rounding=None):
    base = model.get_base_model()
    dtypes = {name.replace(".base_layer", ""): p.dtype for name, p in base.named_parameters() if "lora_" not in name}
    return merge_layers(model, dtypes, base.dtype, rounding or Rounding())


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


@pytest.mark.parametrize("kind", KINDS)
def test_merged_logits_are_those_of_the_adapter(kind, tmp_path):
    model = adapted(kind, torch.float32)
    bare = logits(LlamaForCausalLM(LLAMA) if kind != "columns" else GPT2LMHeadModel(GPT2))
    expected = logits(model)
    assert (expected - bare).abs().max() > 0.1, "the adapter does something"
    plain = merged(model)
    assert_close(logits(plain), expected, rtol=0, atol=1e-5)
    plain.save_pretrained(tmp_path)
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert_close(logits(loaded), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", ["plain", "tied input", "saved input", "columns"])
def test_16_bit_merges_stay_within_the_rounding_of_their_weights(kind):
    exact, rounded = (merged(adapted(kind, torch.float32)), merged(adapted(kind, torch.bfloat16)))
    assert {parameter.dtype for parameter in rounded.parameters()} == {torch.bfloat16}
    for (name, wide), narrow in zip(exact.named_parameters(), rounded.parameters(), strict=True):
        # The base was rounded once before, by half of 2**-8, and the sum is rounded once after
        bound = 2**-8 * wide.abs().max().item()
        assert_close(narrow.float(), wide, rtol=2**-8, atol=bound, msg=name)
    assert (logits(rounded.float()) - logits(exact)).abs().mean() < 0.02 * logits(exact).std()


def test_each_weight_is_rounded_once():
    model = adapted("plain", torch.bfloat16)
    layer = model.base_model.model.model.layers[0].mlp.down_proj
    exact = layer.weight.double() + layer.scaling["default"] * (
        layer.lora_B["default"].weight.double() @ layer.lora_A["default"].weight.double()
    )
    weight = merged(model).model.layers[0].mlp.down_proj.weight
    assert (weight != exact.bfloat16()).float().mean() < 1e-3, "but for ties that float32 decides otherwise"


def test_what_rounding_takes_away_is_counted():
    small, large = Rounding(), Rounding()
    merged(adapted("plain", torch.bfloat16, scale=2e-4), small)
    merged(adapted("plain", torch.bfloat16), large)
    exact = Rounding()
    merged(adapted("plain", torch.float32), exact)
    assert small.share_vanished > 0.8 > 0.2 > large.share_vanished
    assert small.relative_error > 0.8
    assert large.relative_error < 0.2
    assert (exact.vanished, exact.relative_error) == (0, 0.0)
    assert exact.changed > 0


def test_a_weight_that_overflows_is_refused():
    with pytest.raises(ValueError, match="q_proj.weight is not finite in torch.float16"):
        merged(adapted("plain", torch.float16, scale=300.0))


def test_a_4_bit_run_is_merged_into_the_original_weights(sft_run, world, run_export):
    output, said = run_export(sft_run, "--merge")
    base, out = load_file(world / "base" / "model.safetensors"), load_file(output / "model.safetensors")
    adapter = load_file(sft_run / "adapter_model.safetensors")
    scaling = 32 / 4  # `lora_alpha` is 32 by default
    assert base.keys() == out.keys()
    for name, weight in base.items():
        layer = f"base_model.model.{name.removesuffix('.weight')}"
        down, up = (adapter.get(f"{layer}.lora_{side}.weight") for side in "AB")
        exact = weight.double() if down is None else weight.double() + scaling * (up.double() @ down.double())
        assert out[name].dtype == torch.bfloat16
        assert_close(out[name], exact.bfloat16(), rtol=2**-7, atol=1e-6)
    config = json.loads((output / "config.json").read_text())
    assert "quantization_config" not in config
    assert (config["dtype"], config["tie_word_embeddings"]) == ("bfloat16", False)

    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True)
    quantized = AutoModelForCausalLM.from_pretrained(
        world / "base", quantization_config=four_bits, dtype=torch.float32
    )
    before, after = PeftModel.from_pretrained(quantized, sft_run), AutoModelForCausalLM.from_pretrained(output)
    gaps = []
    for row in json.loads((sft_run / "trained_on.json").read_text())["rows"]:
        ids = torch.tensor([row])
        with torch.no_grad():
            logps = [m.eval()(ids).logits.float().log_softmax(-1)[0, :-1] for m in (before, after)]
        gaps.append((logps[1] - logps[0]).gather(1, ids[0, 1:, None]).abs().flatten())
    mean, most = torch.cat(gaps).mean().item(), torch.cat(gaps).max().item()
    assert mean > 1e-4, "4 bits are another base"
    assert f"differ from those in training by {mean:.2g} nats per token on average, by {most:.2g} at most" in said
    assert "trained on 4 bits (nf4, double quantization), computed in float32" in said
    assert "merged in float32 into weights in bfloat16" in said
    card = (output / "README.md").read_text()
    assert f"{mean:.2g} nats per token" in card


def test_a_base_in_4_bits_alone_is_merged_into_only_if_asked(sft_run, world, run_export, tmp_path):
    four_bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
    quantized = AutoModelForCausalLM.from_pretrained(world / "base", quantization_config=four_bits)
    quantized.save_pretrained(tmp_path / "quantized")
    run = tmp_path / "run"
    run.mkdir()
    for file in sft_run.iterdir():
        if file.is_file():
            (run / file.name).write_bytes(file.read_bytes())
    config = json.loads((run / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "quantized")
    (run / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="--dequantize"):
        run_export(run, "--merge")
    output, _ = run_export(run, "--merge", "--dequantize")
    expected = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(tmp_path / "quantized"), run).eval()
    loaded = AutoModelForCausalLM.from_pretrained(output)
    assert loaded.dtype == torch.bfloat16
    assert "quantization_config" not in json.loads((output / "config.json").read_text())
    difference = (logits(loaded).float() - logits(expected).float()).abs().mean()
    assert difference < 0.05 * logits(expected).float().std()


def test_a_merged_reward_model_gives_the_adapters_scores(reward_run, run_export):
    output, said = run_export(reward_run, "--merge")
    loaded, info = AutoModelForSequenceClassification.from_pretrained(output, output_loading_info=True)
    assert not info["missing_keys"]
    assert (loaded.config.num_labels, loaded.config.pad_token_id, loaded.config.problem_type) == (1, 0, "regression")
    base = AutoModelForSequenceClassification.from_pretrained(
        json.loads((reward_run / "adapter_config.json").read_text())["base_model_name_or_path"], num_labels=1
    )
    adapter = PeftModel.from_pretrained(base.float(), reward_run).eval()
    padded = torch.tensor([[6, 7, 8, 1], [9, 10, 1, 0]])
    with torch.no_grad():
        ours, theirs = loaded.float()(padded).logits, adapter(padded).logits
    assert_close(ours, theirs, rtol=0, atol=0.05 * theirs.std().item() + 0.05)
    assert "reward units" in said
