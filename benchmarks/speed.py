"""Time and memory of an update: this project's PPO, now and at an earlier commit, TRL's trainers, and the floor.

    python benchmarks/speed.py                      # 27M, fixed lengths, float32
    python benchmarks/speed.py --sizes 1.3M 27M --lengths fixed ragged --precisions fp32 bf16 4bit
    OMP_NUM_THREADS=2 python benchmarks/speed.py    # with two threads
    python benchmarks/speed.py --micro_batch 8      # rollouts of four micro-batches
    python benchmarks/speed.py --sizes 135M --precisions 4bit --completion_length 64 \
        --systems earlier_adapter ppo_adapter
    python benchmarks/speed.py --growth             # against batch, length and vocabulary
    python benchmarks/speed.py --short              # this project against the floor, a guard of two minutes
    python benchmarks/speed.py --gpu --sizes 0.5B 1.5B 3B 7B --precisions 4bit --batch 16 --prompt_length 128 \
        --completion_length 256

Every measurement is a process of its own; the systems take turns, and medians are compared. See README.md.
"""

import argparse
import io
import json
import math
import os
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path
from statistics import median

from learning_vs_trl112 import CACHE, make_environment
from speed_world import COMPLETION_LENGTH, LENGTHS, PROMPT_LENGTH, QWEN, SIZES, make_world

HERE = Path(__file__).resolve().parent
OURS = ["ppo_head", "ppo_adapter", "ppo_adapter_half"]  # the last one with `critic_layers` at half the layers
EARLIER = {system.replace("ppo", "earlier"): system for system in OURS}  # the same, of an earlier commit
SYSTEMS = ["trl112", *EARLIER, *OURS, "floor_head", "floor_adapter", "grpo", "rloo", "sft"]
PHASES = ["update", "generate", "score", "train", "rest"]
TO_TRL112 = ["update", "peak_mib"]  # what is set in relation to it
# (what, of which system, relative to which, at most), with fixed lengths
FLOOR = [("update", "ppo_head", "floor_head", 1.15), ("update", "ppo_adapter", "floor_adapter", 1.15)]
SFT = [("peak_mib", system, "sft", 1.25) for system in ("ppo_head", "ppo_adapter")]
PEAKS = [("peak_mib", system, "trl112", 0.45) for system in OURS]
TO_EARLIER = [("update", ours, earlier, 0.80) for earlier, ours in EARLIER.items()]
TO_TRL112_ALONE = [  # with one thread and one micro-batch, in float32
    ("update", "ppo_head", "trl112", 0.48),
    ("update", "ppo_adapter_half", "trl112", 0.60),
    ("update", "ppo_adapter", "trl112", 0.80),
]
BARS_16_AND_4_BIT = [("update", "ppo_head", "trl112", 0.60), ("update", "ppo_adapter_half", "trl112", 0.85)]
BARS_SMALLEST = [("update", "ppo_head", "earlier_head", 0.75)]
BARS_135M = [(what, "ppo_adapter", "earlier_adapter", 0.70) for what in ("update", "peak_mib")]
BARS_LARGER_4_BIT = [*FLOOR, *[("peak_mib", system, "trl112", 0.35) for system in OURS], *SFT]
RAGGED = 1.2  # time with ragged lengths, at most, relative to that with fixed ones and as many real tokens


def threads() -> int:
    """Threads of every measurement."""
    return int(os.environ.get("OMP_NUM_THREADS", "1"))


def build(commit: str, folder: Path) -> Path:
    """Install this project as it was at a commit into a folder of its own, unless it is there; return the folder."""
    site = folder / f"earlier_{commit}"
    if not site.exists():
        archive = subprocess.run(["git", "-C", HERE.parent, "archive", commit], capture_output=True)
        if archive.returncode:
            told = archive.stderr.decode().strip()
            raise RuntimeError(f"There is no commit {commit} ({told}). A clone with its history has it.")
        with tempfile.TemporaryDirectory() as source:
            with tarfile.open(fileobj=io.BytesIO(archive.stdout)) as files:
                files.extractall(source, filter="data")
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", site, source]
            subprocess.run(pip, check=True)
    return site


def measure(
    system: str, world: Path, python: str, options: dict[str, object], gpu: bool = False, earlier: Path | None = None
) -> dict:
    """Run one system once, and return its medians, or with ragged lengths its means."""
    quiet = {"TRL_EXPERIMENTAL_SILENCE": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    machine = {"OMP_NUM_THREADS": str(threads())} | ({} if gpu else {"CUDA_VISIBLE_DEVICES": ""})
    if system in EARLIER:
        assert earlier is not None
        machine["PYTHONPATH"] = str(earlier)
    words = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    done = subprocess.run(
        [python, HERE / "speed_worker.py", world, EARLIER.get(system, system), *words],
        capture_output=True,
        text=True,
        env=os.environ | quiet | machine,
    )
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if not found:
        raise RuntimeError(f"{system} failed; the end of its output:\n{(done.stdout + done.stderr)[-2000:]}")
    result = json.loads(found[0].removeprefix("RESULT "))
    print(f"  {system}: {result['update']:.2f} s, {result['peak_mib']:.0f} MiB", flush=True)
    return result


def compare(given, worlds: dict[str, Path], precision: str, pythons: dict[str, str]) -> dict[str, dict[str, dict]]:
    """Measure all systems, round by round, with all lengths after each other, and take medians: by lengths, system."""
    options = {"precision": precision, "updates": given.updates, "batch": given.batch}
    options |= {"micro_batch": given.micro_batch or given.batch}
    options |= {"prompt_length": given.prompt_length, "completion_length": given.completion_length}
    runs = {lengths: {system: [] for system in given.systems} for lengths in worlds}
    earlier = build(given.earlier, given.output.resolve()) if EARLIER.keys() & set(given.systems) else None
    for _ in range(given.rounds):
        for system in given.systems:
            for lengths, world in worlds.items():
                result = measure(system, world, pythons.get(system, sys.executable), options, given.gpu, earlier)
                if lengths == "fixed":  # before the others take their time
                    check_lengths(system, result, given.batch * (given.prompt_length + given.completion_length))
                runs[lengths][system].append(result)
    keys = [*PHASES, "tokens", "peak_mib"]
    return {
        lengths: {system: {key: median(run[key] for run in each) for key in keys} for system, each in systems.items()}
        for lengths, systems in runs.items()
    }


def check_lengths(system: str, result: dict[str, float], whole: int) -> None:
    """Raise if a system had fewer tokens than the others, whose padding is computed."""
    if result["tokens"] not in (0, whole):  # TRL 1.12 and SFT do not count
        raise RuntimeError(
            f"{system} had {result['tokens']:.0f} tokens in place of {whole}: its prompts or completions are not of "
            "the fixed lengths. Remove the folder of the model, which may be of another version."
        )


def table(medians: dict[str, dict[str, float]]) -> str:
    """Lay medians out as a table of Markdown, with ratios to TRL 1.12's where it was measured."""
    lines = [
        "| system | s per update | to TRL 1.12 | generate | score | train | rest | tokens | peak MiB | to TRL 1.12 |",
        "|" + "---|" * 10,
    ]
    for system, row in medians.items():
        update, *phases = (f"{row[phase]:.2f}" for phase in PHASES)
        ratios = [f"{row[what] / medians['trl112'][what]:.2f}" if "trl112" in medians else "" for what in TO_TRL112]
        cells = [system, update, ratios[0], *phases, f"{row['tokens']:,.0f}", f"{row['peak_mib']:,.0f}", ratios[1]]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def judge_all(given, size: str, precision: str, found: dict[str, dict[str, dict]]) -> list[tuple[bool, str]]:
    """Judge what was measured of one size and format, with both lengths."""
    wanted = bars(size, precision, given.batch // (given.micro_batch or given.batch), threads())
    if given.short:  # a guard, not a measurement: one run of each scatters by a tenth
        wanted = [(what, system, other, 1.3) for what, system, other, _ in wanted]
    fixed, ragged = found.get("fixed", {}), found.get("ragged", {})
    return judge(fixed, wanted) + judge_ragged(fixed, ragged)


def bars(size: str, precision: str, micro_batches: int = 1, threads: int = 1) -> list[tuple[str, str, str, float]]:
    """The bars for fixed lengths."""
    if size == "1.3M":  # it is there to see what does not depend on size
        return BARS_SMALLEST if precision == "fp32" else []
    if size == "135M":
        return BARS_135M if precision == "4bit" else []
    if size == "27M":
        return bars_27m(precision, micro_batches, threads)
    return BARS_LARGER_4_BIT if precision == "4bit" else [*FLOOR, *SFT]


def bars_27m(precision: str, micro_batches: int, threads: int) -> list[tuple[str, str, str, float]]:
    """The bars of the model that most is measured with."""
    if micro_batches > 1:
        return [("update", "ppo_head", "trl112", 0.52)] if (precision, threads) == ("fp32", 1) else []
    if precision != "fp32":
        return [*BARS_16_AND_4_BIT, *FLOOR, *PEAKS, *SFT]
    return [*TO_EARLIER, *(TO_TRL112_ALONE if threads == 1 else []), *FLOOR, *PEAKS, *SFT]


def judge(medians: dict[str, dict[str, float]], wanted) -> list[tuple[bool, str]]:
    """Compare with the bars whose systems were measured."""
    verdicts = []
    for what, system, other, most in wanted:
        if {system, other} <= medians.keys():
            ratio = medians[system][what] / medians[other][what]
            word = "PASS" if ratio <= most else "FAIL"
            verdicts.append((ratio <= most, f"{word} {what} of {system} / {other}: {ratio:.3f} (at most {most})"))
    return verdicts


def judge_ragged(fixed: dict[str, dict[str, float]], ragged: dict[str, dict[str, float]]) -> list[tuple[bool, str]]:
    """Whether the time of ours follows real tokens: all of it, and that of the passes without generation."""
    verdicts = []
    for system in [name for name in OURS if name in fixed and name in ragged]:
        share = ragged[system]["tokens"] / fixed[system]["tokens"]
        for what, phases in (("update", PHASES[:1]), ("score and train", ["score", "train"])):
            time, whole = (sum(rows[system][phase] for phase in phases) for rows in (ragged, fixed))
            ratio = time / (share * whole)
            word = "PASS" if ratio <= RAGGED else "FAIL"
            text = f"{word} {what} of {system}, ragged / predicted from {share:.2f} of the tokens: {ratio:.3f}"
            verdicts.append((ratio <= RAGGED, f"{text} (at most {RAGGED})"))
    return verdicts


def growth(given) -> None:
    """Exponents of time and memory against batch, length, vocabulary and rewards, from log-log slopes."""
    axes = {
        "batch": [{"batch": n, "micro_batch": n} for n in (8, 16, 32)],
        "completion_length": [{"completion_length": n} for n in (24, 48, 96)],
        "vocabulary": [{"vocabulary": n} for n in (2000, 8000, 32000, 128000)],  # a tile has 32,768 entries
        "rewards": [{"rewards": n} for n in (1, 2, 4)],
    }
    for system in ("ppo_head", "ppo_adapter"):
        for axis, points in axes.items():
            results = []
            for point in points:
                options = {"batch": 16, "micro_batch": 16, "updates": 2} | point
                vocabulary = options.pop("vocabulary", 2000)
                world = make_world(given.output.resolve(), given.sizes[0], "fixed", given.texts, vocabulary)
                results.append(measure(system, world, sys.executable, options))
            sizes = [point[axis] for point in points]
            for what in ("update", "peak_mib"):
                slope = math.log(results[-1][what] / results[0][what]) / math.log(sizes[-1] / sizes[0])
                values = ", ".join(f"{result[what]:.2f}" for result in results)
                print(f"{system} {what} against {axis} {sizes}: {values}; exponent {slope:.2f}", flush=True)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--environment", type=Path, default=CACHE, help="of TRL 1.12; made if need be (%(default)s)")
    parser.add_argument("--output", type=Path, default=Path("outputs/speed"), help="where models go (%(default)s)")
    parser.add_argument("--texts", type=Path, help="jsonl.gz with dialogues in `chosen`; default: made-up reviews")
    parser.add_argument("--sizes", nargs="+", choices=[*SIZES, *QWEN], default=["27M"])
    parser.add_argument("--lengths", nargs="+", choices=LENGTHS, default=["fixed"])
    parser.add_argument("--precisions", nargs="+", choices=["fp32", "bf16", "4bit"], default=["fp32"])
    parser.add_argument("--systems", nargs="+", choices=SYSTEMS, default=SYSTEMS)
    parser.add_argument("--earlier", default="4a24141", help="commit of this project to compare with (%(default)s)")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--updates", type=int, default=3, help="of a round; the first does not count (%(default)s)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--micro_batch", type=int, help="default: the batch")
    parser.add_argument("--prompt_length", type=int, default=PROMPT_LENGTH)
    parser.add_argument("--completion_length", type=int, default=COMPLETION_LENGTH)
    parser.add_argument("--gpu", action="store_true", help="on a GPU: wall time, and memory as torch counts it")
    parser.add_argument("--growth", action="store_true", help="measure growth in place of the comparison")
    parser.add_argument("--short", action="store_true", help="this project against the floor only, small batch")
    given = parser.parse_args(argv)
    if given.short:
        given.systems, given.rounds, given.updates, given.batch = (
            ["ppo_head", "ppo_adapter", "floor_head", "floor_adapter"],
            1,
            2,
            8,
        )
    return given


def main(argv=None) -> int:
    given = parse(argv)
    if given.growth:
        growth(given)
        return 0
    pythons = {"trl112": str(make_environment(given.environment))} if "trl112" in given.systems else {}
    folder, passed = given.output.resolve(), True
    for size in given.sizes:
        worlds = {
            each: make_world(folder, size, each, given.texts, None, given.prompt_length) for each in given.lengths
        }
        for precision in given.precisions:
            print(f"{size}, {precision}", flush=True)
            found = compare(given, worlds, precision, pythons)
            for lengths, medians in found.items():
                print(f"{lengths} lengths:\n{table(medians)}")
                (worlds[lengths] / f"result_{precision}.json").write_text(json.dumps(medians, indent=1) + "\n")
            for passes, text in judge_all(given, size, precision, found):
                print(text, flush=True)
                passed = passed and passes
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
