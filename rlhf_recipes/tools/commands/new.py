"""Copy a recipe into a folder of the user's own, with its scripts, names and settings ready to run and to edit."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from rlhf_recipes.tools.commands.editing import add_line, drop_fields, find_machine, fit_to_machine, set_field, written
from rlhf_recipes.tools.commands.fields import read_fields
from rlhf_recipes.tools.commands.folder import recipe_names, recipes_folder
from rlhf_recipes.tools.commands.pages import script_of

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_NAME = re.compile(r"[A-Za-z0-9_][\w.-]*", re.ASCII)
_TEXT = (".py", ".yaml", ".sh", ".md")
_MACHINES = {"cpu": "the CPU", "gpu": "a GPU with bfloat16", "old_gpu": "a GPU without bfloat16"}
_REFERENCE = re.compile(r"(?<![\w/.-])recipes/([\w/-]+(?:\.\w+)?)")
_OUTPUTS = re.compile(r"(?<![\w/.-])outputs/(\w+)")
_TO_THE_TOP = re.compile(r'(?<=cd "\$\(dirname "\$\{BASH_SOURCE\[0\]\}"\))(?:/\.\.)+')
_LOCAL_LINK = re.compile(r"\[([^\]]+)\]\((?!https?:)[^)]*\)")
_USAGE = re.compile(r"(?m)^# (bash \S+/run\.sh .+)$")  # of a run.sh that is given rows
_START = re.compile(r"(?m)^set -euo pipefail\n")
_VARIABLE = re.compile(r"(?m)^(\w+)=(\S+)$")
_OUTPUT = re.compile(r"--output_dir (\S+)")
_COMMAND = re.compile(r"(?m)^(?:.*\\\n)*.*$")  # a line, with those that continue it
_DATASET = re.compile(r"(--dataset_name )(?!outputs/)[\w./-]+(?=\s)")
# What a YAML says about a model or about rows that is wrong for others
_OF_THE_MODEL = (
    *("model_revision", "trust_remote_code", "attn_implementation", "pad_token", "eos_token", "chat_template_path"),
    *("lora_target_modules", "lora_target_parameters", "lora_modules_to_save"),
)
_OF_THE_ROWS = ("dataset_config", "dataset_train_split", "dataset_test_split")


def new_recipe(name: str, recipe: str, *, model: str | None = None, data: str | None = None) -> str:
    """Copy a recipe into a folder here, with the shared scripts that it runs.

    Args:
        name: Name of the new folder, and of its runs in `outputs/`.
        recipe: The recipe to copy.
        model: Hub id or folder of a model that takes the place of the recipe's in every YAML.
        data: File, folder or dataset id that takes the place of the rows which the recipe does not make itself.

    Returns:
        What was made, and how to run it.

    Raises:
        FileExistsError: If the folder is there already.
        FileNotFoundError: If there is no such recipe, model or data.
        ValueError: If the name is no plain name, or the recipe cannot have this model or these rows.
    """
    if not _NAME.fullmatch(name):
        raise ValueError(f"{name!r} is no name for a folder here. Use letters, digits, `_`, `-` and `.`, and no `/`.")
    if Path(name).exists():
        raise FileExistsError(f"{name} is there already. Choose another name, or remove it.")
    if recipe not in recipe_names():
        raise FileNotFoundError(f"There is no recipe {recipe!r}. There are: {', '.join(recipe_names())}.")
    copy = _Copy(name, recipe, _collect(recipe))
    texts = {to: copy.renamed(to) for to, path in copy.files.items() if path.suffix in _TEXT}
    scripts = _scripts(copy.files)
    machine = find_machine()
    for to, script in scripts.items():
        defaults = {field.name: field.default for field in read_fields(script).values()}
        texts[to] = fit_to_machine(texts[to], machine, defaults)
    notes = [f"Its settings are for {_MACHINES[machine]}, as found here."]
    if model is not None:
        notes += _use_model(texts, scripts, recipe, model)
    if data is not None:
        notes += _use_data(texts, scripts, recipe, data)
    _write(Path(name), texts, copy.files)
    usage = _USAGE.search(texts["run.sh"]) if data is None else None
    command = f"bash {name}/run.sh" if usage is None else usage[1]
    return "\n".join([f"Made {name}: {', '.join(sorted(copy.files))}.", *notes, f"Run it here: {command}"])


@dataclass(frozen=True)
class _Copy:
    """A copy of a recipe: its name, that of the recipe, and where each of its files is now."""

    name: str
    recipe: str
    files: Mapping[str, Path]

    def renamed(self, to: str) -> str:
        """Text of a file that names the files and outputs of the copy in the place of the recipe's."""
        text = _REFERENCE.sub(self._reference, self.files[to].read_text(encoding="utf-8"))
        text = _OUTPUTS.sub(self._outputs, text)
        if to.endswith(".md"):
            made = f"`rlhf-recipes new {self.name} --from {self.recipe}`"
            text = _LOCAL_LINK.sub(r"\1", text)
            text = f"> Copied by {made}. Model, rows, times and numbers below are the recipe's.\n\n{text}"
        return _TO_THE_TOP.sub("/.." * (to.count("/") + 1), text)

    def _reference(self, found: re.Match[str]) -> str:
        if found[1].startswith(f"{self.recipe}/"):
            return f"{self.name}/{found[1].removeprefix(f'{self.recipe}/')}"
        source, example = recipes_folder() / found[1], Path(found[1]).name
        to = next((to for to, path in self.files.items() if path == source), None)
        if to is None and example in self.files:  # a shared script gives some recipe's YAML as its example
            to = example
        return found[0] if to is None else f"{self.name}/{to}"

    def _outputs(self, found: re.Match[str]) -> str:
        own = found[1].startswith(f"{self.recipe}_") and found[1] not in recipe_names()
        if found[1] != self.recipe and not own:
            return found[0]
        return f"outputs/{self.name}{found[1].removeprefix(self.recipe)}"


def _collect(recipe: str) -> dict[str, Path]:
    """Find the files of a recipe, and those beside it that its commands name: where each goes, and where it is."""
    top = recipes_folder()
    waiting = [path for path in sorted((top / recipe).rglob("*")) if path.is_file() and path.suffix != ".pyc"]
    files = {path.relative_to(top / recipe).as_posix(): path for path in waiting}
    while waiting:
        path = waiting.pop()
        for name in _named_by(path):
            if (top / name).is_file() and top / name not in files.values():
                files[f"shared/{name}" if name in files else name] = top / name  # it may have one of its own
                waiting.append(top / name)
    return files


def _named_by(path: Path) -> list[str]:
    """What the commands in a file name: those of a bash script, a page, or the first lines of a script's YAML."""
    if path.suffix not in (".sh", ".yaml", ".md"):
        return []
    text = path.read_text(encoding="utf-8")
    return [] if path.suffix == ".yaml" and script_of(text) is None else _REFERENCE.findall(text)


def _scripts(files: Mapping[str, Path]) -> dict[str, Path]:
    """The YAMLs that are for a script, and the script."""
    headers = {to: script_of(path.read_text(encoding="utf-8")) for to, path in files.items() if path.suffix == ".yaml"}
    return {to: recipes_folder() / script for to, script in headers.items() if script is not None}


def _use_model(texts: dict[str, str], scripts: Mapping[str, Path], recipe: str, model: str) -> list[str]:
    """Put a model into every YAML, and a padding token into those of reward models where it is needed."""
    _refuse_other_models(recipe)
    tokenizer = _tokenizer(model)
    olds = {to: yaml.safe_load(texts[to]) for to in scripts}
    notes = _leave_out(texts, {old.get("model_name_or_path") for old in olds.values()})
    for to, script in scripts.items():
        texts[to] = set_field(drop_fields(texts[to], _OF_THE_MODEL), "model_name_or_path", model)
        if script.name != "reward.py":
            continue
        if tokenizer is None:
            notes.append(
                f"The tokenizer of {model} could not be loaded here. If it pads with its end token, {to} needs "
                "another `pad_token`; the error of the stage names some."
            )
        elif tokenizer.pad_token == tokenizer.eos_token:
            token, *others = _padding_token(tokenizer, olds[to].get("pad_token"), model)
            line = f"pad_token: {written(token)}  # the model pads with its end token, where the score is read"
            texts[to] = add_line(texts[to], line, after="model_name_or_path")
            notes.append(f"{to} has `pad_token: {token}`, as {model} pads with its end token. {_also(others)}")
    return notes


def _leave_out(texts: dict[str, str], models: set[str | None]) -> list[str]:
    """Turn the commands of bash scripts that make models into comments."""
    notes = []
    for to in [to for to in texts if to.endswith(".sh")]:
        texts[to], places = _without(texts[to], models)
        notes += [f"{to} does not make {place}, which nothing needs now." for place in places]
    return notes


def _without(script: str, models: set[str | None]) -> tuple[str, list[str]]:
    variables = dict(_VARIABLE.findall(script))
    left_out = []

    def comment(command: re.Match[str]) -> str:
        folder = _OUTPUT.search(command[0])
        place = "" if folder is None else re.sub(r"\$(\w+)", lambda name: variables.get(name[1], ""), folder[1])
        if place not in models:
            return command[0]
        left_out.append(place)
        return re.sub(r"(?m)^", "# ", command[0])

    return _COMMAND.sub(comment, script), left_out


def _also(others: list[str]) -> str:
    return f"Others that would do: {', '.join(others[:5])}." if others else "No other would do."


def _padding_token(tokenizer: PreTrainedTokenizerBase, old: str | None, model: str) -> list[str]:
    from rlhf_recipes.models.loading import padding_tokens

    tokens = padding_tokens(tokenizer)
    if not tokens:
        raise ValueError(
            f"{model} pads with its end token {tokenizer.eos_token!r}, where a reward model reads its score, and has "
            "no other token that could pad. Add one to the tokenizer and to the model's embeddings, and save both."
        )
    return sorted(tokens, key=lambda token: token != old)


def _tokenizer(model: str) -> PreTrainedTokenizerBase | None:
    """Load the tokenizer, or nothing where the hub cannot be reached."""
    from huggingface_hub.errors import RepositoryNotFoundError

    from rlhf_recipes.models import load_tokenizer

    try:
        return load_tokenizer(model)
    except FileNotFoundError:
        raise
    except OSError as error:
        if isinstance(error.__cause__, RepositoryNotFoundError):
            raise FileNotFoundError(f"The hub has no model {model!r}, or none that you may read.") from error
        return None


def _refuse_other_models(recipe: str) -> None:
    """Refuse a recipe that makes its model together with its rows or its judge, which fit no other model."""
    if folder := _made_together(recipe):
        able = [name for name in recipe_names() if not _made_together(name)]
        raise ValueError(
            f"The recipe {recipe} makes its model and its rows together, in {folder}: they fit no other model. "
            f"Recipes that take one: {', '.join(able)}."
        )


def _made_together(recipe: str) -> str | None:
    configs = [yaml.safe_load(path.read_text(encoding="utf-8")) for path in (recipes_folder() / recipe).glob("*.yaml")]
    places = [(_folder(config.get("model_name_or_path")), config) for config in configs]
    for folder, config in places:
        others = [str(config.get(name)) for name in ("dataset_name", "gold_score")]
        if folder is not None and any(f"{other}/".startswith(f"{folder}/") for other in others):
            return folder
    return None


def _folder(model: Any) -> str | None:
    """The folder in `outputs/RECIPE` that holds a model, if it is one of that kind."""
    parts = str(model).split("/")
    return "/".join(parts[:-1]) if parts[0] == "outputs" and len(parts) > 3 else None


def _use_data(texts: dict[str, str], scripts: Mapping[str, Path], recipe: str, data: str) -> list[str]:
    """Put rows in the place of those that the recipe reads and does not make."""
    from rlhf_recipes.data.loading import local_splits

    splits = local_splits(data)
    if splits is not None and "train" not in splits:
        raise ValueError(f"{data} has no split 'train'. Its splits: {', '.join(splits)}.")
    notes = _read_by_yamls(texts, scripts, data, splits)
    for to in [to for to in texts if to.endswith(".sh")]:
        changed = _DATASET.sub(lambda found: found[1] + shlex.quote(data), texts[to])
        usage = _USAGE.search(changed)
        if usage is not None and len(usage[1].split()) == 3:
            changed = _with_default(changed, data if splits is None else str(Path(data).expanduser().resolve()))
        notes += [f"{to} reads {data}."] if changed != texts[to] else []
        texts[to] = changed
    if not notes:
        raise ValueError(f"The recipe {recipe} makes its rows, or its run.sh is given several: leave out `--data`.")
    return notes


def _with_default(script: str, rows: str) -> str:
    """Let a bash script that is given rows take these unless others are given."""
    line = f"[ $# -gt 0 ] || set -- {shlex.quote(rows)}  # the rows, unless others are given"
    return _START.sub(lambda start: f"{start[0]}{line}\n", script)


def _read_by_yamls(
    texts: dict[str, str], scripts: Mapping[str, Path], data: str, splits: Sequence[str] | None
) -> list[str]:
    changed = []
    for to in scripts:
        if not str(yaml.safe_load(texts[to]).get("dataset_name", "outputs/")).startswith("outputs/"):
            texts[to] = set_field(drop_fields(texts[to], _OF_THE_ROWS), "dataset_name", data)
            if splits is not None and "test" in splits:
                texts[to] = add_line(texts[to], "dataset_test_split: test", after="dataset_name")
            changed.append(to)
    if not changed:
        return []
    held_out = "A tenth of the prompts is held out, the same in every stage."
    if splits is None:
        held_out += " If there is a test split, name it in `dataset_test_split`."
    elif "test" in splits:
        held_out = "Its test split is held out."
    return [f"{', '.join(changed)} read {data}. {held_out}"]


def _write(folder: Path, texts: Mapping[str, str], files: Mapping[str, Path]) -> None:
    folder.mkdir()
    for to, path in files.items():
        (folder / to).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, folder / to)  # with its mode: scripts stay executable
        if to in texts:
            (folder / to).write_text(texts[to], encoding="utf-8")
