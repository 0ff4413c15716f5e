"""One reward model with the mean of several ones' weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from rlhf_recipes.models.readout import Readout, fit_normalization
from rlhf_recipes.models.reward import load_whole_reward_model


def average_reward_models(paths: Sequence[str | Path], output_dir: str | Path) -> None:
    """Average the weights of reward models that started from the same base, and save one whole model.

    Runs with different seeds are wrong in different ways, which the mean takes out. It costs one model in use, where
    the mean of the scores costs them all. Adapters are merged into their base first, in float32 and never into 4 bits:
    it is what LoRA adds that is averaged, not its factors. The members must have started at the same weights, which
    cannot be checked here.

    Source: https://huggingface.co/papers/2401.12187 (WARM).

    Args:
        paths: Folders of the reward stage, two or more, adapters or whole models.
        output_dir: A new folder for the model, its tokenizer and the way that its score is read.

    Raises:
        FileExistsError: If the output folder is there already.
        ValueError: If there are fewer than two, their scores are not read in one way, or their tokenizers or weights
            do not fit together.
    """
    if len(paths) < 2 or len({str(path) for path in paths}) < len(paths):
        raise ValueError(f"Give two or more different reward models to average, got {[str(path) for path in paths]}.")
    if Path(output_dir).exists():
        raise FileExistsError(f"{output_dir} is there already. Remove it, or choose another folder.")
    readouts = [Readout.load(path) for path in paths]
    models, tokenizers = zip(*map(load_whole_reward_model, paths), strict=True)
    for path, readout, tokenizer in zip(paths, readouts, tokenizers, strict=True):
        if readout != readouts[0]:
            raise ValueError(
                f"The score of {path} is read as {readout}, that of {paths[0]} as {readouts[0]}. Average models of "
                "one `readout`, and normalise what comes out, not the members."
            )
        if tokenizer.get_vocab() != tokenizers[0].get_vocab():
            raise ValueError(f"{path} and {paths[0]} have other tokenizers. Average models of the same base.")
    models[0].load_state_dict(mean_weights([model.state_dict() for model in models]))
    models[0].save_pretrained(output_dir)
    tokenizers[0].save_pretrained(output_dir)
    readouts[0].save(output_dir)


def mean_weights(members: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Average the weights of models of one shape, each tensor over all members.

    Source: https://huggingface.co/papers/2401.12187 (WARM), which averages the weights of reward models.

    Args:
        members: The weights of each model by their names; tensors of any shape.

    Returns:
        Their mean, added up in float64 and given back in the first member's dtype.

    Raises:
        ValueError: If there is no member, or two have other names or shapes.

    Example:
        >>> mean_weights([{"score": torch.tensor([1.0, 4.0])}, {"score": torch.tensor([3.0, 0.0])}])
        {'score': tensor([2., 2.])}
    """
    if not members:
        raise ValueError("There are no weights to average. Give those of two or more models.")
    first = members[0]
    shapes = [{name: tensor.shape for name, tensor in member.items()} for member in members]
    for number, member_shapes in enumerate(shapes):
        if strange := {name for name, _ in shapes[0].items() ^ member_shapes.items()}:
            raise ValueError(
                f"Models 0 and {number} differ in {len(strange)} weights: {min(strange)!r} is missing in one, or has "
                "another shape. Average models that started from the same base."
            )
    return {
        name: torch.stack([member[name].double() for member in members]).mean(dim=0).to(tensor.dtype)
        for name, tensor in first.items()
    }


def normalize_reward_model(
    folder: str | Path, raw_scores: Tensor, mode: Literal["std", "mean_only"] = "std"
) -> Readout:
    """Fit gain and bias to raw scores of reference samples, and save them beside the reward model.

    Whatever reads the folder as a reward applies them from then on. A second call replaces those of the first.

    Args:
        folder: The reward model's folder.
        raw_scores: Scores of the reference samples without gain and bias, shape `(N,)`.
        mode: `"std"`: mean 0 and standard deviation 1; `"mean_only"`: mean 0.

    Returns:
        What was saved; the kind of readout stays.

    Raises:
        FileNotFoundError: If there is no such folder.
        ValueError: If the scores cannot be normalised, or the folder's `reward_model.json` is malformed.

    Example:
        >>> import tempfile, torch
        >>> folder = tempfile.mkdtemp()
        >>> normalize_reward_model(folder, torch.tensor([-2.0, 6.0]))
        Readout(readout='last', gain=0.25, bias=-0.5, reward_prompt=False)
        >>> Readout.load(folder).apply(torch.tensor([2.0]))
        tensor([0.])
    """
    if not Path(folder).is_dir():
        raise FileNotFoundError(f"There is no folder {str(folder)!r}. Give that of a trained reward model.")
    gain, bias = fit_normalization(raw_scores, mode)
    readout = replace(Readout.load(folder), gain=gain, bias=bias)
    readout.save(folder)
    return readout
