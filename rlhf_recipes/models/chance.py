"""Layers that draw random numbers in training, and how to keep a network that is trained the one that samples."""

from __future__ import annotations

from torch import nn


def disable_dropout(model: nn.Module) -> None:
    """Set every dropout rate of a model to 0: of modules, and the numbers that layers keep for themselves.

    TRL's `disable_dropout` reaches `nn.Dropout` only, while many layers of transformers call `F.dropout` with a rate
    of their own (OPT, BioGPT, attention everywhere), or leave out whole layers (`layerdrop`).

    Args:
        model: The model. Its configuration stays as it is.

    Example:
        >>> layer = nn.Dropout(0.1)
        >>> layer.resid_pdrop = 0.2
        >>> disable_dropout(layer)
        >>> layer.p, layer.resid_pdrop
        (0.0, 0.0)
    """
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
        for name, value in vars(module).items():
            if "drop" in name and isinstance(value, float):
                setattr(module, name, 0.0)


def compute_as_in_evaluation(model: nn.Module) -> None:
    """Let the layers of a model in training compute what they compute in evaluation: without noise.

    Besides dropout, routers of experts draw random numbers in training (jitter in Mixtral's, DBRX's; PhiMoE's samples
    the experts). Modules that recompute their activations stay in training, because they ask for it, and so does the
    model itself; of these `disable_dropout` takes the rates away.

    Args:
        model: The model, after `model.train()`, which undoes this.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5)).train()
        >>> compute_as_in_evaluation(model)
        >>> model.training, model[0].training
        (True, False)
    """
    for module in model.modules():
        module.training = module.training and (module is model or hasattr(module, "gradient_checkpointing"))
