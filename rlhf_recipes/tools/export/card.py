"""Model card of an exported stage: YAML front matter for the hub, and what was trained, how, and how well.

Names and numbers come from files of a run, which may hold anything: all text is escaped, and no number is taken as one
that is none.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml
from huggingface_hub import ModelCardData, metadata_load
from transformers.utils import cached_file

from rlhf_recipes.models.loading import looks_local
from rlhf_recipes.statistics.numbers import is_number
from rlhf_recipes.tools.export.run import STAGES
from rlhf_recipes.tools.pages.html import printable

if TYPE_CHECKING:
    from rlhf_recipes.tools.export.merging import Merge
    from rlhf_recipes.tools.export.run import FinishedRun

Form = Literal["adapter", "merged"]

_ID = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
_LICENCE_FILES = ("LICENSE", "LICENSE.txt", "LICENSE.md", "LICENCE")
_ROWS = (".json", ".jsonl", ".csv", ".parquet")  # ends of local files
_PLACES = ("output_dir", "run_name", "logging_dir", "report_to", "hub_model_id")  # of this machine and of its logs
_WORDS = {
    "loss": "loss, nats per token",
    "perplexity": "perplexity",
    "accuracy": "pair accuracy",
    "log_loss": "log loss of the pairs, nats",
    "margin": "mean of chosen minus rejected score",
    "n": "rows",
    "win_rate": "win rate over the reference",
}
_SIDES = {
    "gold_score": "judge",
    "reward_score": "reward",
    "kl": "KL, nats per completion",
    "length": "tokens",
    "eos_rate": "finished",
}


@dataclass(frozen=True)
class Licence:
    """Licence of a base model, as its model card names it, or as a file of its folder.

    Attributes:
        name: The hub's word for it; `None` if nothing is known.
        own_name: For `other`: what its card calls it.
        link: For `other`: where its text is.
        file: The text, to be copied.
    """

    name: str | None = None
    own_name: str | None = None
    link: str | None = None
    file: Path | None = None


def escape(text: object) -> str:
    r"""Escape text within a line or a cell of Markdown: no markup, no HTML, no links, no line breaks.

    Example:
        >>> print(escape("a|b\n*c* <script> http://x.y"))
        a\|b \*c\* \<script\> http\://x.y
    """
    line = " ".join(printable(text).split())
    return re.sub(r"([\\`*_\[\]<>|~$&@]|:(?=//)|(?<=www)\.)", r"\\\1", line)


def number(value: Any, ends: Any = None) -> str:
    """Write a number, perhaps with the ends of its interval; a dash for what is no number.

    Example:
        >>> number(0.80712, [0.78, 0.83]), number(576), number("5"), number(3e-5)
        ('0.807 [0.780, 0.830]', '576', '-', '3e-05')
    """
    if not is_number(value):
        return "-"
    text = str(value) if isinstance(value, int) else f"{value:.3f}" if 0.001 <= abs(value) < 1e6 else f"{value:.3g}"
    if isinstance(ends, list) and len(ends) == 2 and all(map(is_number, ends)):
        text += f" [{ends[0]:.3f}, {ends[1]:.3f}]"
    return text


def licence_of(source: str, revision: str = "main") -> Licence:
    """Find the licence of a base: in the front matter of its README, or as a file beside it.

    Args:
        source: Folder or hub id of the base.
        revision: On the hub.

    Returns:
        What is known; nothing where there is neither.

    Example:
        >>> licence_of("no/such/folder")
        Licence(name=None, own_name=None, link=None, file=None)
    """
    readme, text = file_of(source, "README.md", revision), None
    for name in _LICENCE_FILES:
        text = text or file_of(source, name, revision)
    try:
        metadata: Any = (metadata_load(readme) if readme is not None else None) or {}
    except (OSError, ValueError, TypeError, yaml.YAMLError):
        metadata = {}
    metadata = metadata if isinstance(metadata, dict) else {}
    known, own, link = (
        value if isinstance(value := metadata.get(key), str) else None
        for key in ("license", "license_name", "license_link")
    )
    if known is not None and re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", known):
        return Licence(known, own, link, text if known == "other" else None)
    return Licence("other", link=text.name, file=text) if text is not None else Licence()


def write_card(
    run: FinishedRun, form: Form, usage: str, licence: Licence, merge: Merge | None = None, base_id: str | None = None
) -> str:
    """Write the model card of an export.

    Args:
        run: The run.
        form: What was exported.
        usage: Code that loads it.
        licence: Of the base.
        merge: The merge, if an adapter was merged.
        base_id: The base's hub id, if it has one.

    Returns:
        The text of README.md.
    """
    name = str(run.record.get("recipe") or run.folder.name)
    parts = [
        f"# {escape(name)}: {STAGES[run.stage]}",
        _what(run, form),
        "## Usage\n\n```python\n" + usage + "```" + _advice(run, form),
        "## Results" + _results(run.evaluation),
        *([f"## Precision\n\n{escape(precision_text(run, merge))}"] if merge is not None else []),
        "## Data\n\n" + _data(run),
        "## Settings\n\n" + _settings(run),
        "## Versions\n\n" + _versions(run),
        "## Licence\n\n" + _licence(licence),
    ]
    return f"---\n{_front_matter(run, form, licence, base_id)}\n---\n\n" + "\n\n".join(parts) + "\n"


def precision_text(run: FinishedRun, merge: Merge) -> str:
    """Say in which precision the adapter was trained, into which it was merged, and what the difference is.

    Args:
        run: The run.
        merge: Its merge.
    """
    before = run.trained_on.base if run.trained_on is not None else "a base of unknown precision"
    lines = [f"The adapter was trained on {before}, and merged in float32 into weights in {merge.precision}."]
    if merge.gaps is None or run.trained_on is None:
        lines.append("How far it is from what was trained was not measured: the run has no trained_on.json.")
    else:
        sizes, texts = merge.gaps.abs(), len(run.trained_on.rows)
        what, scale = "log-probabilities", "nats per token"
        if run.task == "reward":
            what, scale = "raw scores", f"reward units (their standard deviation is {run.trained_on.spread:.3g})"
        lines.append(
            f"On {texts} texts of the run its {what} differ from those in training by {sizes.mean():.2g} {scale} on "
            f"average, by {sizes.max():.2g} at most."
        )
    rounding = merge.rounding
    lines.append(
        f"The adapter changes {rounding.changed:,} weights, of which rounding makes {rounding.vanished:,} "
        f"({rounding.share_vanished:.1%}) equal to the base's again; rounding is {rounding.relative_error:.2g} of the "
        "whole change by norm."
    )
    return " ".join(lines)


def _front_matter(run: FinishedRun, form: Form, licence: Licence, base_id: str | None) -> str:
    hub = [name for name in (_dataset_id(run),) if name is not None]
    data = ModelCardData(
        base_model=base_id,
        base_model_relation=None if base_id is None else "adapter" if form == "adapter" else "finetune",
        library_name="peft" if form == "adapter" else "transformers",
        pipeline_tag="text-generation" if run.task == "policy" else "text-classification",
        license=licence.name,
        license_name=licence.own_name,
        license_link=licence.link,
        tags=["trl", "rlhf-recipes", run.stage, *(["lora"] if run.adapter is not None else [])]
        + (["reward-model"] if run.task == "reward" else []),
        datasets=hub or None,
    )
    return str(data.to_yaml())


def _what(run: FinishedRun, form: Form) -> str:
    kind = "A reward model" if run.task == "reward" else "A language model"
    how = {
        "sft": "fine-tuned on completions",
        "reward": "that gives a text a number, trained on preferences",
    }.get(run.stage, f"trained with {STAGES[run.stage]} against a reward")
    where = "a LoRA adapter on" if form == "adapter" else "merged into"
    base = f", {where} {escape(_short(run.base))}" if run.base is not None else ""
    return f"{kind} {how}{base}. Made with rlhf-recipes on TRL."


def _advice(run: FinishedRun, form: Form) -> str:
    lines = []
    if form == "adapter" and run.trained_on is not None and run.trained_on.base.startswith(("4 bits", "8 bits")):
        lines.append(
            f"It was trained on a base in {escape(run.trained_on.base)}. For exactly what was trained, load the base "
            "so, with `quantization_config=BitsAndBytesConfig(...)`."
        )
    if run.task == "reward":
        if run.readout.readout != "last" or (run.readout.gain, run.readout.bias) != (1.0, 0.0):
            lines.append("The logits alone are not the score: `reward_model.json` says how it is read, as above.")
        lines.append(
            "Only differences of scores of one prompt mean something. The score is no probability: in pipelines, give "
            '`function_to_apply="none"`.'
        )
    return "".join(f"\n\n{line}" for line in lines)


def _results(evaluation: Mapping[str, Any]) -> str:
    rows = [
        (words, number(evaluation.get(name), evaluation.get(f"{name}_ci")))
        for name, words in _WORDS.items()
        if is_number(evaluation.get(name))
    ]
    if not rows:
        return "\n\nNo evaluation is recorded."
    text = "\n\nOn held-out rows, with 95 % intervals in brackets.\n\n" + _table(("", "value"), rows)
    if is_number(evaluation.get("win_rate")):
        prompts, count = number(evaluation.get("prompts")), number(evaluation.get("rows"))
        judge = escape(evaluation.get("win_rate_by", "?"))
        text += f"\n\nJudged by {judge}, {count} completions of {prompts} prompts."
    sides = [evaluation.get(side) for side in ("policy", "reference")]
    if all(isinstance(side, Mapping) for side in sides):
        values = [
            (words, *(number(side.get(name)) for side in sides if isinstance(side, Mapping)))
            for name, words in _SIDES.items()
        ]
        text += "\n\n" + _table(("mean", "policy", "reference"), values)
    return text


def _data(run: FinishedRun) -> str:
    hub, settings = _dataset_id(run), run.settings or {}
    name = settings.get("dataset_name")
    if hub is not None:
        split = escape(settings.get("dataset_train_split", "train"))
        return f"[{escape(hub)}](https://huggingface.co/datasets/{hub}), split {split}."
    return "Not recorded." if name is None else f"Local rows: {escape(_short(name))}."


def _settings(run: FinishedRun) -> str:
    if run.settings is None:
        return "Not recorded."
    rows = [
        (f"`{name}`" if name.isidentifier() else escape(name), escape(_short(value)))
        for name, value in run.settings.items()
        if name not in _PLACES
    ]
    return f"What differs from the defaults.\n\n{_table(('field', 'value'), rows)}" if rows else "The defaults."


def _versions(run: FinishedRun) -> str:
    versions = run.record.get("versions")
    known = versions if isinstance(versions, Mapping) else {}
    trained = ", ".join(f"{escape(name)} {escape(value)}" for name, value in known.items()) or "not recorded"
    commit = run.record.get("git_commit")
    at = f" Commit {escape(str(commit)[:12])}." if commit else ""
    return f"Trained with {trained}.{at} Exported with transformers {version('transformers')}, peft {version('peft')}."


def _licence(licence: Licence) -> str:
    if licence.name is None:
        return "That of the base model, which is not known here: look it up before you share this."
    return f"That of the base model: {escape(licence.own_name or licence.name)}."


def _dataset_id(run: FinishedRun) -> str | None:
    """The hub id of the run's rows; `None` for local ones."""
    name = (run.settings or {}).get("dataset_name")
    local = not isinstance(name, str) or Path(name).exists() or looks_local(name) or Path(name).suffix in _ROWS
    return name if isinstance(name, str) and not local and _ID.fullmatch(name) else None


def _short(value: Any) -> str:
    """A value of the settings; a path without the folders of this machine above it."""
    return Path(value).name if isinstance(value, str) and Path(value).is_absolute() else str(value)


def _table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def file_of(source: str, name: str, revision: str) -> Path | None:
    """Find a file beside a model, on disk or on the hub; `None` where there is none, or the hub is out of reach."""
    if Path(source).is_dir():
        path = Path(source, name)
        return path if path.is_file() else None
    try:
        found = cached_file(source, name, revision=revision, _raise_exceptions_for_missing_entries=False)
    except (OSError, ValueError):
        return None
    return None if found is None else Path(found)
