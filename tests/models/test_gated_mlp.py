"""Gated MLPs that are computed for a few tokens at a time: outputs and gradients are those of the formula."""

import copy

import pytest
import torch
from bitsandbytes.nn.modules import Linear4bit, Params4bit
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.testing import assert_close
from transformers.models.gemma.modeling_gemma import GemmaConfig, GemmaMLP
from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
from transformers.models.phi3.modeling_phi3 import Phi3Config, Phi3MLP
from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeConfig, Qwen2MoeSparseMoeBlock

from rlhf_recipes.models import gated_mlp
from rlhf_recipes.models.fused_lora import fuse_lora
from rlhf_recipes.models.gated_mlp import GatedMLP, fuse_mlps
from tests.models.support import assert_same_gradients

EXACT = {"atol": 1e-12, "rtol": 1e-11}
HEADS = {"num_attention_heads": 2, "num_key_value_heads": 2}
NAMES = ["gate_proj", "up_proj", "down_proj"]


def llama(bias=False, act="silu"):
    torch.manual_seed(0)
    return LlamaMLP(LlamaConfig(**HEADS, hidden_size=6, intermediate_size=10, mlp_bias=bias, hidden_act=act))


def pair(mlp, dtype=torch.float64, change=lambda mlp: None, **options):
    """The same MLP with the same two random adapters, by its layers and fused."""
    options = {"target_modules": NAMES, "init_lora_weights": False, "r": 3, "lora_alpha": 7} | options
    base = nn.Sequential(mlp).to(dtype)
    change(base[0])
    plain = get_peft_model(base, fuse_lora(LoraConfig(**options)))
    plain.add_adapter("other", fuse_lora(LoraConfig(**options)))
    if dtype == torch.float64:
        plain.to(dtype)
    fused = copy.deepcopy(plain)
    fuse_mlps(fused)
    assert isinstance(fused.base_model.model[0], GatedMLP)
    return plain, fused


def compare(plain, fused, x, **tolerance):
    assert_same_gradients(plain, fused, x, torch.mean, **tolerance)


def tokens(*shape, dtype=torch.float64):
    torch.manual_seed(1)
    return torch.randn(shape, dtype=dtype)


@pytest.fixture
def small_chunks(monkeypatch):
    """Parts of 32 tokens."""
    monkeypatch.setattr(gated_mlp, "tokens_in_mlp", lambda inner, device: 32)


@pytest.mark.parametrize("shape", [(0, 6), (1, 0, 6), (1, 6), (6,), (2, 3, 6), (1, 33, 6), (2, 32, 6), (7, 19, 6)])
@pytest.mark.parametrize("act", ["silu", "gelu_pytorch_tanh", "relu2", "linear"])
@pytest.mark.parametrize("bias", [False, True])
def test_outputs_and_gradients_are_the_formulas(small_chunks, shape, act, bias):
    compare(*pair(llama(bias, act)), tokens(*shape), **EXACT)


def test_gradients_are_those_of_finite_differences(small_chunks):
    _, fused = pair(llama())
    mlp = fused.base_model.model[0]
    lora = [parameter for name, parameter in mlp.named_parameters() if ".default." in name]

    def run(x, *lora):
        return torch.func.functional_call(mlp, dict(zip(names, lora, strict=True)), x)

    names = [name for name, _ in mlp.named_parameters() if ".default." in name]
    assert len(lora) == 6
    assert torch.autograd.gradcheck(run, (tokens(40, 6).requires_grad_(), *lora), fast_mode=True)


def bare(model):
    for layer in model.modules():
        if hasattr(layer, "_active_adapter"):
            layer._active_adapter = []


@pytest.mark.parametrize(
    ("change", "options"),
    [
        (lambda model: model.set_adapter("other"), {}),
        (lambda model: model.base_model.set_adapter(["default", "other"]), {}),
        (nn.Module.eval, {"lora_dropout": 0.5}),
        (nn.Module.train, {"use_dora": True}),
        (nn.Module.train, {"target_modules": ["up_proj"]}),
    ],
    ids=["other", "two", "dropout", "dora", "one layer"],
)
def test_adapters_of_every_kind(small_chunks, change, options):
    models = pair(llama(), **options)
    for model in models:
        change(model)
    compare(*models, tokens(5, 9, 6), **EXACT)


@pytest.mark.parametrize(
    "change",
    [
        bare,
        lambda model: model.base_model.disable_adapter_layers(),
        lambda model: model.merge_adapter(),
        lambda model: model.requires_grad_(False),
    ],
    ids=["bare", "disabled", "merged", "frozen"],
)
def test_what_is_not_trained_hands_the_gradient_on(small_chunks, change):
    found = []
    for model in pair(llama()):
        change(model)
        x = tokens(5, 9, 6).requires_grad_()
        output = model(x)
        found.append((output, *torch.autograd.grad(output.square().mean(), x)))
    assert_close(found[1], found[0], **EXACT)


def test_dropout_in_training_is_drawn_by_the_layers():
    plain, fused = pair(llama(), lora_dropout=0.5)
    x, outputs = tokens(5, 6), []
    for model in (plain, fused):
        torch.manual_seed(3)
        outputs.append(model.train()(x))
    assert_close(outputs[1], outputs[0], **EXACT)


def test_weights_that_are_trained_get_their_gradients():
    mlp = llama().double()
    fused = nn.Sequential(copy.deepcopy(mlp))
    fuse_mlps(fused)
    compare(nn.Sequential(mlp), fused, tokens(5, 6), **EXACT)


def test_hooks_on_the_layers_are_called():
    _, fused = pair(llama())
    seen = []
    fused.base_model.model[0].down_proj.register_forward_hook(lambda *given: seen.append(given[1][0].shape))
    fused(tokens(5, 6))
    assert seen == [(5, 10)]


def test_layers_whose_input_needs_no_gradient(small_chunks):
    plain, fused = pair(llama())
    gradients = []
    for model in (plain, fused):
        model(tokens(40, 6)).square().mean().backward()
        gradients.append([parameter.grad for parameter in model.parameters() if parameter.requires_grad])
    assert_close(gradients[1], gradients[0], **EXACT)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_16_bits_are_rounded_as_the_layers_round(small_chunks, dtype, autocast):
    plain, fused = pair(llama(), dtype)
    x = tokens(5, 9, 6, dtype=dtype)
    exact = {"atol": 1e-6, "rtol": 1e-5}
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        # bfloat16 has 8 bits; sums of gradients are in another order
        compare(
            plain, fused, x, **(exact if dtype == torch.float32 and not autocast else {"atol": 0.02, "rtol": 0.03})
        )
        with torch.no_grad():
            assert_close(fused(x), plain(x), **(exact if dtype == torch.float32 else {"atol": 0.01, "rtol": 0.01}))


def quantize(mlp):
    for name in NAMES:
        layer = getattr(mlp, name)
        packed = Linear4bit(layer.in_features, layer.out_features, bias=False, compute_dtype=torch.float32)
        packed.weight = Params4bit(layer.weight.data.float(), requires_grad=False, quant_type="nf4").to("cpu")
        packed.support_avx512bf16_for_cpu = False
        setattr(mlp, name, packed)


def test_weights_in_4_bits(small_chunks):
    mlp = LlamaMLP(LlamaConfig(hidden_size=64, intermediate_size=128))
    models = pair(mlp, torch.float32, quantize)
    assert isinstance(models[1].base_model.model[0].gate_proj.base_layer, Linear4bit)
    compare(*models, tokens(5, 9, 64, dtype=torch.float32), atol=1e-6, rtol=1e-4)


def test_what_is_kept_for_the_backward_pass():
    """The two products of the inner width, where the layers keep four tensors of it."""
    kept = []
    for model in pair(llama(), torch.float32):
        sizes = {}

        def keep(tensor, sizes=sizes):
            sizes[tensor.data_ptr()] = tensor.numel()
            return tensor

        x = tokens(64, 6, dtype=torch.float32).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            output = model(x)
        kept.append(sum(size == 64 * 10 for size in sizes.values()))
        assert output.requires_grad
    assert kept == [4, 2]


def test_only_what_computes_the_formula_is_replaced():
    class Clamped(LlamaMLP):
        def forward(self, x):
            return super().forward(x).clamp(max=0.0)

    class WithMask(LlamaMLP):
        def forward(self, x, mask=None):
            return super().forward(x)

    config = LlamaConfig(**HEADS, hidden_size=6, intermediate_size=10)
    gemma = GemmaMLP(GemmaConfig(**HEADS, hidden_size=6, intermediate_size=10))
    phi3 = Phi3MLP(Phi3Config(**HEADS, hidden_size=6, intermediate_size=10, pad_token_id=0))
    model = nn.ModuleList([LlamaMLP(config), Clamped(config), WithMask(config), gemma, phi3])
    names, weights = sorted(model.state_dict()), copy.deepcopy(model.state_dict())
    fuse_mlps(model)
    assert [isinstance(module, GatedMLP) for module in model] == [True, False, False, True, False]
    assert sorted(model.state_dict()) == names
    assert_close(dict(model.state_dict()), dict(weights))
    fuse_mlps(model)
    assert not any(isinstance(child, GatedMLP) for module in model for child in module.children())


def test_the_shared_expert_of_a_mixture():
    torch.manual_seed(0)
    block = Qwen2MoeSparseMoeBlock(
        Qwen2MoeConfig(
            **HEADS,
            hidden_size=6,
            moe_intermediate_size=4,
            shared_expert_intermediate_size=8,
            num_experts=2,
            num_experts_per_tok=2,
        )
    )
    for parameter in block.parameters():
        nn.init.normal_(parameter)
    block = block.requires_grad_(False).double()
    x = tokens(1, 5, 6)
    expected = block(x)
    fuse_mlps(block)
    assert isinstance(block.shared_expert, GatedMLP)
    assert_close(block(x), expected, **EXACT)
