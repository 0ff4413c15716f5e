"""Which wrong answers do the scorers of reasoning-gym pay? A table over all of its tasks.

    pip install reasoning-gym==0.1.25            # in a temporary environment beside this project
    python benchmarks/verifiers.py --rows 20

Every task is made with its default settings and tried by `check_verifier` on rows that have an answer of their own. A
task whose rows take longer than `--seconds` to make or to score is named as not tried, and so is one whose scorer
raises. The page of the results is docs/verifier.md.
"""

import argparse
import json
import signal
from importlib.metadata import version
from pathlib import Path

from rlhf_recipes.rewards.verifier import check_verifier

BOUND = 0.1


class TooSlow(BaseException):
    """No `Exception`: scorers catch those, and pay 0."""


def stop(*_):
    raise TooSlow


def entries(task: str, rows: int, seed: int):
    """The task's scorer, and rows with an answer."""
    import reasoning_gym

    dataset = reasoning_gym.create_dataset(task, size=rows, seed=seed)
    return dataset.score_answer, [row for row in (dataset[i] for i in range(rows)) if row["answer"] not in (None, "")]


def tried(task: str, rows: int, seed: int, seconds: int) -> dict:
    """What the task's scorer pays, or why that is not known."""
    signal.alarm(seconds)
    try:
        scorer, listed = entries(task, rows, seed)
        if not listed:
            return {"problem": "its rows have no answer"}
        return {entry.kind: {**vars(entry)} for entry in check_verifier(scorer, listed)}
    except TooSlow:
        return {"problem": f"over {seconds} s"}
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"}
    finally:
        signal.alarm(0)


def share(found: dict, kind: str) -> str:
    """What a kind is paid, bold where it is wrong and above the bound."""
    entry = found[kind]
    if not entry["rows"]:
        return "-"
    text = f"{entry['paid']:.2f}"
    return f"**{text}**" if not entry["right"] and entry["paid"] > BOUND else text


def main() -> None:
    """Try every task, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--tasks", nargs="+", help="by default all")
    parser.add_argument("--output", type=Path, default=Path("outputs/verifiers.json"))
    args = parser.parse_args()
    from reasoning_gym.factory import DATASETS

    signal.signal(signal.SIGALRM, stop)
    results = {}
    for task in args.tasks or sorted(DATASETS):
        results[task] = tried(task, args.rows, args.seed, args.seconds)
        print(task, results[task].get("problem", "ok"), flush=True)
    args.output.parent.mkdir(parents=True, exist_ok=True)
    args.output.write_text(json.dumps(results, indent=1) + "\n")
    kinds = ["true", "spaces", "sentence", "twice", "constant", "other", "negated", "empty"]
    print(f"\nreasoning-gym {version('reasoning-gym')}, {args.rows} rows of seed {args.seed}\n")
    print("| task | " + " | ".join(kinds) + " |\n|" + "---|" * (len(kinds) + 1))
    for task, found in results.items():
        if "problem" not in found:
            print(f"| `{task}` | " + " | ".join(share(found, kind) for kind in kinds) + " |")
    print(
        "\nNot tried: "
        + "; ".join(f"{task} ({found['problem']})" for task, found in results.items() if "problem" in found)
    )


if __name__ == "__main__":
    main()
