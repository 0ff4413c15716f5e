"""One reward model with the mean of several ones' weights."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_recipes.models.reward import load_whole_reward_model
from rlhf_recipes.reward_modeling.mean_weights import mean_weights
from rlhf_recipes.reward_modeling.readout import Readout


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
