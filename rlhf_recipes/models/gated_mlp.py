"""Gated MLPs with LoRA, `down(act(gate(x)) * up(x))`, computed for a few tokens after others.

As a module for each product, activation and update, an MLP makes, and keeps for the backward pass, four tensors of its
inner width, and three more on the way back. Here two are kept, the products that `act` and `*` read; everything else
exists for a few hundred tokens at a time, on a CPU within its cache. The gradients are those of the formula.

`N` tokens, `H` hidden size, `I` inner size, `r` rank.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from bitsandbytes.nn.modules import Linear4bit
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from rlhf_recipes.models.fused_lora import fusable_update
from rlhf_recipes.models.quantized import unpacked_weight
from rlhf_recipes.parts import tokens_in_mlp

PARTS = ("gate_proj", "up_proj", "down_proj")
_TOLERANCE, _TOLERANCE_IN_16_BITS = 1e-5, 0.02  # of the norm of the output


class GatedMLP(nn.Module):
    """A gated MLP with the layers of another one, under the same names.

    What has no short form (weights that are trained, DoRA, dropout in training, 8 bits, layers with hooks) is computed
    by the layers themselves.

    Args:
        mlp: A module with linear layers `gate_proj`, `up_proj` and `down_proj`, and `act_fn`.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
        >>> mlp = LlamaMLP(LlamaConfig(hidden_size=4, intermediate_size=8, num_attention_heads=2))
        >>> x = torch.ones(2, 4)
        >>> torch.allclose(GatedMLP(mlp)(x), mlp(x))
        True
    """

    def __init__(self, mlp: Any) -> None:
        super().__init__()
        self.gate_proj: nn.Module = mlp.gate_proj
        self.up_proj: nn.Module = mlp.up_proj
        self.down_proj: nn.Module = mlp.down_proj
        self.act_fn: Callable[[Tensor], Tensor] = mlp.act_fn
        self.train(mlp.training)

    def forward(self, x: Tensor) -> Tensor:
        """(..., H) -> (..., H)."""
        dtype = _compute_dtype(x)
        parts = [part for name in PARTS if (part := _part(getattr(self, name), x, dtype)) is not None]
        if len(parts) < len(PARTS):
            by_layers: Tensor = self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))
            return by_layers
        autocast = torch.is_autocast_enabled(x.device.type)
        work = _Work(self.act_fn, dtype, autocast, [part.base for part in parts], [part.scaling for part in parts])
        lora = [tensor for part in parts for tensor in (part.down, part.up)]
        rows = x.reshape(-1, x.size(-1)).to(dtype)
        output: Tensor = _Chunked.apply(rows, work, torch.is_grad_enabled(), *lora)
        return output.view(*x.shape[:-1], output.size(1))


class _Part(NamedTuple):
    """A linear layer with the update of an adapter, or without one."""

    base: nn.Module
    down: Tensor | None = None
    up: Tensor | None = None
    scaling: float = 1.0


@dataclass(frozen=True)
class _Work:
    """What an MLP computes with besides the adapters' weights: gate, up and down."""

    act: Callable[[Tensor], Tensor]
    dtype: torch.dtype
    autocast: bool  # then an adapter's products are of this format too, else of its own
    bases: list[nn.Module]
    scalings: list[float]

    def products(self, lora: tuple[Tensor | None, ...]) -> list[_Product]:
        """The three products, with weights as numbers: those in 4 bits are unpacked once for all tokens."""
        cast = [each.to(self.dtype) if self.autocast and each is not None else each for each in lora]
        return [
            _Product(_weight(base, self.dtype), _bias(base, self.dtype), down, up, scaling)
            for base, down, up, scaling in zip(self.bases, cast[::2], cast[1::2], self.scalings, strict=True)
        ]


class _Product(NamedTuple):
    """`x @ weight.t() + bias + scaling * x @ down.t() @ up.t()`; `weight` (out, in), `down` (r, in), `up` (out, r)."""

    weight: Tensor
    bias: Tensor | None
    down: Tensor | None
    up: Tensor | None
    scaling: float

    def __call__(self, rows: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """From (n, in) to (n, out), and the numbers between the adapter's matrices, (n, r)."""
        weight, between = self.weight.t(), None
        output = (
            torch.mm(rows, weight, out=out) if self.bias is None else torch.addmm(self.bias, rows, weight, out=out)
        )
        if self.down is not None and self.up is not None:
            between = rows.to(self.down.dtype) @ self.down.t()
            _add_product(output, between, self.up.t(), self.scaling)
        return output, between

    def backward(self, gradient: Tensor, rows: Tensor, between: Any, into: Tensor, add: bool, sums: list[Any]) -> None:
        """Put the gradient of `rows` (n, in) into a tensor, or add it, and add those of the adapter.

        Args:
            gradient: Of the output, shape (n, out).
            rows: The input, shape (n, in).
            between: The numbers between the adapter's matrices, shape (n, r).
            into: Where the input's gradient goes, shape (n, in).
            add: Whether it is added to what is there.
            sums: Of the gradients of `down` and `up`, or `None`.
        """
        into.addmm_(gradient, self.weight) if add else torch.mm(gradient, self.weight, out=into)
        if self.down is None or self.up is None:
            return
        wide = gradient.to(self.up.dtype)
        inner = wide @ self.up
        _add_product(into, inner, self.down, self.scaling)
        if sums[0] is not None:
            _add_product(sums[0], inner.t(), rows.to(self.down.dtype), self.scaling)
        if sums[1] is not None:
            _add_product(sums[1], wide.t(), between, self.scaling)


def _add_product(into: Tensor, left: Tensor, right: Tensor, scaling: float) -> None:
    """Add `scaling * left @ right`, computed in its own format."""
    if into.dtype == left.dtype:
        into.addmm_(left, right, alpha=scaling)
    elif left.dtype.itemsize > into.dtype.itemsize:  # rounded once, after the sum
        into.copy_(torch.addmm(into.to(left.dtype), left, right, alpha=scaling))
    else:
        into.add_(left @ right, alpha=scaling)


class _Chunked(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, work: _Work, with_gradients: bool, *lora: Tensor | None) -> Tensor:
        products = gate, up, down = work.products(lora)
        output = rows.new_empty(len(rows), len(down.weight))
        count = len(rows) if with_gradients else 0
        gates, ups = rows.new_empty(count, len(gate.weight)), rows.new_empty(count, len(up.weight))
        between = [None if part.down is None else part.down.new_empty(count, len(part.down)) for part in products]
        for chunk in _chunks(len(rows), len(gate.weight), rows.device):
            kept = (gates[chunk], ups[chunk]) if with_gradients else (None, None)
            (of_gate, first), (of_up, second) = gate(rows[chunk], kept[0]), up(rows[chunk], kept[1])
            _, third = down(work.act(of_gate) * of_up, output[chunk])
            for whole, part in zip(between, (first, second, third), strict=True):
                if with_gradients and whole is not None and part is not None:
                    whole[chunk] = part
        if with_gradients:
            ctx.save_for_backward(rows, gates, ups, *between, *lora)
            ctx.work = work
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        rows, gates, ups, *between_and_lora = ctx.saved_tensors
        between, lora, work = between_and_lora[:3], between_and_lora[3:], ctx.work
        gate, up, down = work.products(tuple(lora))
        wanted = ctx.needs_input_grad[3:]
        sums = [torch.zeros_like(each) if want else None for each, want in zip(lora, wanted, strict=True)]
        of_rows = torch.empty_like(rows)
        for chunk in _chunks(len(rows), gates.size(1), rows.device):
            first, second, third = (None if each is None else each[chunk] for each in between)
            with torch.enable_grad():
                read = [tensor[chunk].detach().requires_grad_() for tensor in (gates, ups)]
                inner = work.act(read[0]) * read[1]
            of_inner = torch.empty_like(read[0])
            down.backward(gradient[chunk].contiguous(), inner.detach(), third, of_inner, False, sums[4:])
            of_gate, of_up = torch.autograd.grad(inner, read, of_inner)
            gate.backward(of_gate, rows[chunk], first, of_rows[chunk], False, sums[:2])
            up.backward(of_up, rows[chunk], second, of_rows[chunk], True, sums[2:4])
        return of_rows, None, None, *sums


def _chunks(tokens: int, inner: int, device: torch.device) -> list[slice]:
    size = tokens_in_mlp(inner, device.type)
    return [slice(start, start + size) for start in range(0, tokens, size)]


def _compute_dtype(x: Tensor) -> torch.dtype:
    device = x.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype


def _part(layer: Any, x: Tensor, dtype: torch.dtype) -> _Part | None:
    """What a layer computes, if it is a frozen linear layer with at most one plain update."""
    base, update = layer, None
    if isinstance(layer, LoraLayer):
        base = layer.get_base_layer()
        adapted = not layer.disable_adapters and any(name in layer.lora_A for name in layer.active_adapters)
        update = fusable_update(layer, x) if adapted else None
        if layer.merged or (adapted and update is None):
            return None
    if type(base) not in (nn.Linear, Linear4bit) or _hooked(layer) or _hooked(base):
        return None
    if base.weight.requires_grad or (base.bias is not None and base.bias.requires_grad):
        return None
    own: torch.dtype | None = base.compute_dtype if isinstance(base, Linear4bit) else base.weight.dtype
    if own not in (dtype, None) and not torch.is_autocast_enabled(x.device.type):
        return None
    return _Part(base) if update is None else _Part(base, *update)


def _hooked(module: Any) -> bool:
    return bool(module._forward_hooks or module._forward_pre_hooks or hasattr(module, "_hf_hook"))


def _weight(base: Any, dtype: torch.dtype) -> Tensor:
    weight = unpacked_weight(base) if isinstance(base, Linear4bit) else base.weight
    numbers: Tensor = weight.detach().to(dtype)
    return numbers


def _bias(base: Any, dtype: torch.dtype) -> Tensor | None:
    return None if base.bias is None else base.bias.detach().to(dtype)


@torch.no_grad()
def fuse_mlps(model: nn.Module) -> None:
    """Replace the gated MLPs of a model by `GatedMLP`s that compute the same.

    What a kind of MLP computes is tried out on one; those that compute something else, or more, stay as they are.

    Args:
        model: Any model, with or without adapters.

    Example:
        >>> from transformers.models.llama.modeling_llama import LlamaConfig, LlamaMLP
        >>> model = nn.Sequential(LlamaMLP(LlamaConfig(hidden_size=4, intermediate_size=8, num_attention_heads=2)))
        >>> fuse_mlps(model)
        >>> type(model[0]).__name__, sorted(model.state_dict())
        ('GatedMLP', ['0.down_proj.weight', '0.gate_proj.weight', '0.up_proj.weight'])
    """
    same: dict[type, bool] = {}
    for name, module in list(model.named_modules()):
        children = {child for child, _ in module.named_children()}
        if isinstance(module, GatedMLP) or not children.issuperset(PARTS):
            continue
        kind = type(module)
        if kind not in same:
            same[kind] = children == {*PARTS, "act_fn"} and _computes_the_formula(module)
        if same[kind] and not _hooked(module):
            model.set_submodule(name, GatedMLP(module))


def _computes_the_formula(mlp: Any) -> bool:
    if len(inspect.signature(mlp.forward).parameters) != 1 or list(mlp.parameters(recurse=False)):
        return False
    base: Any = mlp.gate_proj.get_base_layer() if isinstance(mlp.gate_proj, LoraLayer) else mlp.gate_proj
    if type(base) not in (nn.Linear, Linear4bit):
        return False
    dtype = base.weight.dtype if base.weight.is_floating_point() else None
    x = torch.linspace(-1, 1, 2 * base.in_features, device=base.weight.device, dtype=dtype).view(2, -1)
    modes = [(module, module.training) for module in mlp.modules()]
    mlp.eval()  # dropout draws anew at each call
    expected: Tensor = mlp(x)
    difference = (mlp.down_proj(mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)) - expected).norm()
    for module, training in modes:
        module.training = training
    tolerance = _TOLERANCE if expected.dtype.itemsize >= 4 else _TOLERANCE_IN_16_BITS
    return bool(difference <= tolerance * expected.norm())
