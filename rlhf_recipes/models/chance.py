"""Turn off what layers draw at random in training, so that the network that is trained is the one that samples."""

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
        _set_rates_to_zero(module)


def compute_as_in_evaluation(model: nn.Module) -> None:
    """Let the layers of a model in training compute what they compute in evaluation: without dropout or other noise.

    Besides dropout, routers of experts draw random numbers in training (jitter in DBRX's; PhiMoE's draws the experts).
    Modules that recompute their activations stay in training, because they ask for it, and so does the model itself;
    their own rates of dropout are set to 0.

    Args:
        model: The model, after `model.train()`, which undoes this.

    Example:
        >>> model = nn.Sequential(nn.Dropout(0.5)).train()
        >>> compute_as_in_evaluation(model)
        >>> model.training, model[0].training
        (True, False)
    """
    for module in model.modules():
        if module is not model and not hasattr(module, "gradient_checkpointing"):
            module.training = False
        elif module.training:
            _set_rates_to_zero(module)


def _set_rates_to_zero(module: nn.Module) -> None:
    for name, value in vars(module).items():
        if "drop" in name and isinstance(value, float):
            setattr(module, name, 0.0)
