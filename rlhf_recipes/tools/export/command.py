"""The command `rlhf-recipes export`."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import HfApi
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer, GenerationConfig

from rlhf_recipes.data.chat_templates import encode_sampled, end_token_ids
from rlhf_recipes.models.adapters import CONFIG, WEIGHTS
from rlhf_recipes.models.loading import looks_local
from rlhf_recipes.models.trained_on import TOLERANCE
from rlhf_recipes.rewards.encoding import is_encoder
from rlhf_recipes.tools.export.card import Form, file_of, licence_of, precision_text, write_card
from rlhf_recipes.tools.export.hub import check_push, push_folder
from rlhf_recipes.tools.export.merging import Merge, check_mergeable, merge_run
from rlhf_recipes.tools.export.run import FinishedRun, read_finished_run
from rlhf_recipes.tools.export.usage import policy_usage, reward_usage, was_trained_on_chats

if TYPE_CHECKING:
    import argparse

    from transformers import PreTrainedTokenizerBase

_MANY = 0.5  # share of an adapter's changes that rounding may undo without a warning
_TOKENIZER_FILES = ("tokenizer.model",)  # which transformers reads no more, but the converter to GGUF prefers
_GGUF_DTYPES = ("float16", "bfloat16", "float32")


def export(args: argparse.Namespace, api: Any = None) -> str:
    """Export a finished stage.

    The folder appears only when it is complete.

    Args:
        args: As `add_arguments` describes them.
        api: What `--push` uploads with; by default `huggingface_hub.HfApi()`.

    Returns:
        What was done, for people.

    Raises:
        FileExistsError: If the output folder is there already.
        OSError: If a folder, a base or space on the disk is missing.
        ValueError: If the run is not finished or cannot be exported in this form, or an upload would fail.
    """
    api = HfApi() if api is None and args.push else api
    run = read_finished_run(args.folder)
    form: Form = "merged" if args.merge or args.gguf_ready or run.adapter is None else "adapter"
    _check(args, run, form)
    if args.push:
        check_push(api, args.push)
    if form == "merged":
        check_mergeable(run, args.output_dir, dequantize=args.dequantize, trust_remote_code=args.trust_remote_code)
    parent = args.output_dir.absolute().parent
    parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=parent, prefix=f".{args.output_dir.name}-") as place:
        folder = Path(place, "export")
        folder.mkdir()
        lines = _fill(folder, args, run, form)
        os.replace(folder, args.output_dir)
    lines = [f"{args.output_dir}: {form} of {args.folder}", *lines]
    if args.push:
        try:
            lines.append(push_folder(api, args.output_dir, args.push, public=args.public))
        except OSError as error:
            raise ValueError(
                f"The export is in {args.output_dir}, but the upload failed: {error}. Try again with `hf upload "
                f"{args.push} {args.output_dir}`."
            ) from error
    return "\n".join(lines)


def _check(args: argparse.Namespace, run: FinishedRun, form: Form) -> None:
    """Refuse what contradicts itself, or what nobody could use."""
    if args.output_dir.exists():
        raise FileExistsError(f"{args.output_dir} is there already. Remove it, or choose another `--output_dir`.")
    if args.public and not args.push:
        raise ValueError("`--public` is for `--push ORG/NAME`. Give both or none.")
    if args.dequantize and not (args.merge or args.gguf_ready):
        raise ValueError("`--dequantize` is for `--merge` and `--gguf_ready`. Give one of them too.")
    if args.gguf_ready and run.task == "reward":
        raise ValueError(f"{run.folder} is a reward model, which llama.cpp's converter does not take. Use `--merge`.")
    if args.push and form == "adapter" and run.base is not None and looks_local(run.base):
        raise ValueError(
            f"The base of the adapter is the folder {run.base!r}, which nobody else has. Push the merged model "
            "(`--merge`), or push the base first and write its id as `base_model_name_or_path` into "
            f"{run.folder / CONFIG}."
        )


def _fill(folder: Path, args: argparse.Namespace, run: FinishedRun, form: Form) -> list[str]:
    """Write all files of an export, and say what is to be known of them."""
    own = (run.folder / "tokenizer_config.json").is_file()
    code = {"trust_remote_code": args.trust_remote_code}
    tokenizer = AutoTokenizer.from_pretrained(
        str(run.folder) if own else run.source, **({} if own else {"revision": run.revision}), **code
    )
    tokenizer.save_pretrained(folder)
    merge = None
    if form == "adapter":
        shutil.copy2(run.folder / WEIGHTS, folder)
        config = json.loads((run.folder / CONFIG).read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = os.path.abspath(run.source) if looks_local(run.source) else run.source
        (folder / CONFIG).write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        ends = end_token_ids(run.source, tokenizer)
    else:
        merge = merge_run(run, **code)
        ends = _save_model(folder, merge, tokenizer, run)
    if args.gguf_ready:
        _check_gguf(folder, merge, run)
    if run.task == "reward":
        run.readout.save(folder)
        GenerationConfig(eos_token_id=ends).save_pretrained(folder)  # a classifier alone does not say how texts end
    licence = licence_of(run.source, run.revision)
    if licence.file is not None:
        shutil.copy2(licence.file, folder / licence.file.name)
    usage = _usage(args, run, form, tokenizer, ends)
    base_id = None if run.base is None or looks_local(run.base) else run.base
    card = write_card(run, form, usage, licence, merge if run.adapter is not None else None, base_id)
    (folder / "README.md").write_text(card, encoding="utf-8", errors="replace")
    return [] if merge is None or run.adapter is None else [precision_text(run, merge), *_warnings(run, merge)]


def _save_model(folder: Path, merge: Merge, tokenizer: PreTrainedTokenizerBase, run: FinishedRun) -> list[int]:
    """Save a whole model that knows its padding and end tokens, and return the latter."""
    model: Any = merge.model
    ends = end_token_ids(model, tokenizer)
    if run.task == "reward":
        model.config.pad_token_id = tokenizer.pad_token_id  # the last token before the padding is read
        model.config.problem_type = "regression"  # without it pipelines put a sigmoid on the score
    elif model.generation_config is not None:
        model.generation_config.eos_token_id = ends
        if model.generation_config.pad_token_id is None:
            model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(folder)
    return ends


def _check_gguf(folder: Path, merge: Merge | None, run: FinishedRun) -> None:
    """Add the tokenizer files that the converter prefers, and refuse a precision that it does not know."""
    if merge is not None and merge.precision not in _GGUF_DTYPES:
        raise ValueError(f"The weights are in {merge.precision}; the converter takes {', '.join(_GGUF_DTYPES)}.")
    for name in _TOKENIZER_FILES:
        file = file_of(run.source, name, run.revision)
        if file is not None and not (folder / name).exists():
            shutil.copy2(file, folder / name)


def _usage(
    args: argparse.Namespace, run: FinishedRun, form: Form, tokenizer: PreTrainedTokenizerBase, ends: list[int]
) -> str:
    path, what = (args.push, "on the hub") if args.push else (args.output_dir.name, "this folder")
    rows = run.trained_on.rows if run.trained_on is not None else []
    chat = was_trained_on_chats(tokenizer, rows) if rows else tokenizer.chat_template is not None
    adapter = form == "adapter"
    if run.task == "policy":
        return policy_usage(path, what, adapter=adapter, chat=chat, ends=ends, padding=tokenizer.pad_token_id)
    config = AutoConfig.from_pretrained(run.source, revision=run.revision, trust_remote_code=args.trust_remote_code)
    end = str(tokenizer.eos_token)
    if chat:
        message = {"role": "user", "content": "How was the film?"}
        end = str(tokenizer.convert_ids_to_tokens(encode_sampled(tokenizer, [message], "It was good.", ends)[1][-1]))
    encoder = _is_encoder(config)
    return reward_usage(path, what, adapter=adapter, chat=chat, encoder=encoder, end=end, readout=run.readout)


def _is_encoder(config: Any) -> bool:
    with torch.device("meta"):
        return is_encoder(AutoModelForSequenceClassification.from_config(config))


def _warnings(run: FinishedRun, merge: Merge) -> list[str]:
    """Say where a merged model is not what was trained."""
    warnings = []
    if merge.rounding.share_vanished > _MANY:
        warnings.append(
            f"Warning: rounding to {merge.precision} undoes {merge.rounding.share_vanished:.0%} of the adapter's "
            "changes. Serve the adapter on its base (without --merge) if the difference above matters."
        )
    if merge.gaps is not None and run.trained_on is not None:
        gap = merge.gaps.abs().mean().item() / (run.trained_on.spread if run.task == "reward" else 1.0)
        if gap > TOLERANCE:
            warnings.append(
                f"Warning: the merged model is another one than was trained (trained on {run.trained_on.base})."
            )
    return warnings
