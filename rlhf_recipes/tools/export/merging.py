"""Merge an adapter into the weights of its base as they were published, in float32, rounded once."""

from __future__ import annotations

import shutil
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification

from rlhf_recipes.models.adapters import weights_of_base
from rlhf_recipes.models.plain_lora import changes_base
from rlhf_recipes.models.quantized import dequantized
from rlhf_recipes.models.trained_on import describe_base, log_probs, raw_score

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rlhf_recipes.tools.export.run import FinishedRun

_MARGIN = 1.05  # of the disk space, for all that is no weight


@dataclass
class Rounding:
    """What the rounding of merged weights to the base's precision takes away.

    Attributes:
        changed: Weights that the adapter changes.
        vanished: How many of these are the base's again after rounding.
        lost: Squared norm of what rounding takes away.
        delta: Squared norm of what the adapter adds.
    """

    changed: int = 0
    vanished: int = 0
    lost: float = 0.0
    delta: float = 0.0

    def add(self, before: Tensor, merged: Tensor, rounded: Tensor) -> None:
        """Count one weight: the base's, the merged one in float32, and that rounded to the base's precision.

        Example:
            >>> rounding = Rounding()
            >>> merged = torch.tensor([1.001, 1.5, 2.0])
            >>> rounding.add(torch.tensor([1.0, 1.0, 2.0]).bfloat16(), merged, merged.bfloat16())
            >>> rounding.vanished, rounding.changed
            (1, 2)
        """
        wide = before.float()
        changed = merged != wide
        self.changed += int(changed.sum())
        self.vanished += int((changed & (rounded == before)).sum())
        self.lost += float((rounded.float() - merged).square().sum(dtype=torch.float64))
        self.delta += float((merged - wide).square().sum(dtype=torch.float64))

    @property
    def share_vanished(self) -> float:
        """Share of the changed weights that are the base's again."""
        return self.vanished / max(self.changed, 1)

    @property
    def relative_error(self) -> float:
        """Norm of what rounding takes away, over that of what the adapter adds."""
        return float((self.lost / self.delta) ** 0.5) if self.delta else 0.0


@dataclass(frozen=True)
class Merge:
    """A merged model, and what is known of how far it is from what was trained.

    Attributes:
        model: The model, on the CPU, in evaluation mode.
        precision: Of its weights, in the words of `describe_base`.
        rounding: What rounding took away.
        gaps: By how much its numbers of the texts in `trained_on.json` are above those of the training, shape `(N,)`:
            nats per token, or reward units; `None` without such texts.
    """

    model: PreTrainedModel
    precision: str
    rounding: Rounding
    gaps: Tensor | None


def check_mergeable(run: FinishedRun, output_dir: Path, *, dequantize: bool, trust_remote_code: bool) -> None:
    """Refuse a merge that cannot succeed, before any weights are loaded.

    Raises:
        ValueError: If the adapter is not LoRA, or took a part of the base out of it, or the base itself is quantized
            and `dequantize` does not ask for a merge into what its weights stand for.
        OSError: If there is not enough space on the disk.
    """
    if run.adapter is not None and not isinstance(run.adapter, LoraConfig):
        raise ValueError(f"Only LoRA adapters are merged; that in {run.folder} is a {run.adapter.peft_type}.")
    if changes_base(run.adapter):
        raise ValueError(
            f"The adapter in {run.folder} took a part of the base out of it when it was started "
            f"(`init_lora_weights`). Save it as plain LoRA first (PEFT's "
            "`path_initial_model_for_weight_conversion`)."
        )
    config = AutoConfig.from_pretrained(run.source, revision=run.revision, trust_remote_code=trust_remote_code)
    if getattr(config, "quantization_config", None) is not None and not dequantize:
        raise ValueError(
            f"The weights of {run.source!r} are quantized, and there are no others to merge into. Write the model "
            "that they were made of as `base_model_name_or_path` into adapter_config.json, or merge into what they "
            "stand for with `--dequantize`."
        )
    needed, free = _bytes(config, run, trust_remote_code) * _MARGIN, shutil.disk_usage(_existing(output_dir)).free
    if needed > free:
        raise OSError(
            f"The merged model takes {needed / 1e9:.2f} GB, and {free / 1e9:.2f} GB are free for {output_dir}. Choose "
            "an `--output_dir` on another disk."
        )


def merge_run(run: FinishedRun, *, trust_remote_code: bool = False) -> Merge:
    """Load the weights of a run's base anew, in the precision in which they were published, and merge its adapter.

    A run on a base in 4 bits is so merged into the weights that these were made of. Each layer is merged in float32
    and rounded once, so that the memory is that of the model and one layer.

    Args:
        run: The run; a whole model is loaded as it is.
        trust_remote_code: Whether code that comes with the base may run.

    Returns:
        The merged model, and how far it is from what was trained.

    Raises:
        ValueError: If the files of base and adapter together lack weights, or a merged weight is not finite.
    """
    model, missing = _load(run, trust_remote_code)
    missing -= set() if run.adapter is None else weights_of_base(run.folder)
    if missing:
        raise ValueError(
            f"{run.source!r} and the adapter in {run.folder} lack {len(missing)} weights, {min(missing)!r} among "
            "them, which would be random. Give the base that the adapter was trained on."
        )
    dtypes = {name: parameter.dtype for name, parameter in model.named_parameters()}
    precision: torch.dtype = model.dtype
    if getattr(model, "is_quantized", False):
        model = dequantized(model)
        dtypes = {}
    rounding = Rounding()
    if run.adapter is not None:
        model = merge_layers(PeftModel.from_pretrained(model, str(run.folder)), dtypes, precision, rounding)
    numbers_of = raw_score if run.task == "reward" else log_probs
    gaps = run.trained_on.gaps(model.eval(), numbers_of) if run.trained_on is not None else None
    return Merge(model.eval(), describe_base(model), rounding, gaps if gaps is not None and len(gaps) else None)


@torch.no_grad()
def merge_layers(
    adapted: PeftModel, dtypes: dict[str, torch.dtype], precision: torch.dtype, rounding: Rounding
) -> PreTrainedModel:
    """Merge an adapter layer by layer in float32, each rounded once to the precision that its base had.

    Args:
        adapted: The base with the adapter.
        dtypes: Precision of the parameters of the base.
        precision: Of those that are not named there.
        rounding: Counts what is lost.

    Returns:
        The merged model without PEFT's wrappers.

    Raises:
        ValueError: If a merged weight is not finite.
    """
    _untie(adapted)
    for name, layer in adapted.named_modules():
        if not isinstance(layer, LoraLayer):
            continue
        base: nn.Module = layer.get_base_layer()
        before = {key: parameter.detach().clone() for key, parameter in base.named_parameters()}
        base.float()
        layer.merge()
        for key, parameter in base.named_parameters():
            merged, dtype = parameter.data, before[key].dtype if dtypes else precision
            parameter.data = merged.to(dtype)
            if not parameter.isfinite().all():
                raise ValueError(f"The merged weight {name}.{key} is not finite in {dtype}.")
            if not torch.equal(merged, before[key].float()):
                rounding.add(before[key].to(dtype), merged, parameter.data)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that all layers are merged already
        model: Any = adapted.merge_and_unload()
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(dtypes.get(name, precision))
    return model  # type: ignore[no-any-return]


def _untie(adapted: PeftModel) -> None:
    """Part input and output embeddings that share their weights where LoRA changes one of them for itself."""
    base: Any = adapted.base_model.model
    layers: list[Any] = [base.get_input_embeddings(), base.get_output_embeddings()]
    if layers[1] is None or not any(isinstance(layer, LoraLayer) for layer in layers):
        return
    first: Any
    last: Any
    first, last = (layer.get_base_layer() if isinstance(layer, LoraLayer) else layer for layer in layers)
    if first.weight is last.weight:
        last.weight = nn.Parameter(last.weight.detach().clone())
        base.config.tie_word_embeddings = base.config.get_text_config().tie_word_embeddings = False


def _load(run: FinishedRun, trust_remote_code: bool) -> tuple[Any, set[str]]:
    """Load the weights as they were published, on the CPU, and name those that the files lack."""
    auto, options = _auto_class(run)
    model, info = auto.from_pretrained(
        run.source,
        dtype="auto",
        use_safetensors=True,
        output_loading_info=True,
        revision=run.revision,
        trust_remote_code=trust_remote_code,
        **options,
    )
    return model, set(info["missing_keys"])


def _auto_class(run: FinishedRun) -> tuple[Any, dict[str, Any]]:
    if run.task == "reward":
        return AutoModelForSequenceClassification, {"num_labels": 1}
    return AutoModelForCausalLM, {}


def _bytes(config: Any, run: FinishedRun, trust_remote_code: bool) -> int:
    """Size of the model's weights on disk."""
    auto, options = _auto_class(run)
    for name, value in options.items():
        setattr(config, name, value)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        model = auto.from_config(config, dtype=config.dtype or torch.float32, trust_remote_code=trust_remote_code)
    return sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())


def _existing(path: Path) -> Path:
    return next(parent for parent in path.absolute().parents if parent.exists())
