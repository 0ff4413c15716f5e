"""Folders of runs as the recipes leave them, and texts that want to break a page."""

import json
import math

import pyarrow
import pyarrow.parquet

HOSTILE = "</pre><script>alert('x')</script><img src=http://evil.example/x onerror=1> & \x00 \x1b ]]> <!-- $x^2$ _{"
ODD = "\u202e\u0000\ufffe\U0001f600 \u0645\u0631\u062d\u0628\u0627 z\u0351\u036b\u0343 \ud800"


def write_json(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value), encoding="utf-8")


def record(stage, **others):
    return {
        "recipe": "world",
        "stage": stage,
        "parents": [{"path": "outputs/base"}],
        "git_commit": "0123456789abcdef" * 2 + "-dirty",
        "command": f"recipes/{stage}.py --config x.yaml",
        "versions": {"trl": "1.16.0", "torch": "2.13"},
    } | others


def ppo_history(steps=12, drift=0.1):
    return [
        {
            "step": 10 * i,
            "reward": drift * i,
            "rewards/reward/mean": drift * i,
            "rewards/gold_score/mean": drift * i / 2,
            "kl": 0.3 * i,
            "kl_per_token": 0.02 * i,
            "completions/mean_length": 15.0 + i,
            "entropy": 1.8 - 0.01 * i,
            "critic/explained_variance": 0.5,
            "ppo/clip_fraction": 0.1,
            "learning_rate": 1e-4,
        }
        for i in range(1, steps + 1)
    ]


def held_out_history():
    """What `PolicyEvaluation` logs, in entries of its own."""
    return [
        {
            "step": 40 * i,
            "eval_win_rate": 0.5 + i / 10,
            "eval_win_rate_low": 0.44 + i / 10,
            "eval_win_rate_high": 0.55 + i / 10,
            "eval_policy/reward_score": 0.7 * i,
            "eval_policy/gold_score": 0.5 * i,
            "eval_policy/distinct_2": 0.9 - i / 100,
        }
        for i in (1, 2, 3)
    ]


def comparison(text="a text", gold=(2.0, 0.0), reward=(2.1, 0.1), rate=(0.8, 0.75, 0.85), by="gold_score"):
    others = {"kl": 2.5, "length": 18.0, "eos_rate": 1}
    sides = ({"gold_score": gold[i], "reward_score": reward[i], **others} for i in (0, 1))
    return {
        **dict(zip(("policy", "reference"), sides, strict=True)),
        "win_rate": rate[0],
        "win_rate_ci": list(rate[1:]),
        "win_rate_by": by,
        "rows": 64,
        "prompts": 32,
        "seed": 0,
        "samples": [{"prompt": text, "policy": f"{text} policy", "reference": f"{text} reference"}] * 8,
    }


def write_run(folder, text="a text", name="ppo"):
    """A whole run as the recipes leave it, with the same text in the place of every text."""
    write_json(folder / "sft/run.json", record("sft"))
    history = [{"step": i, "loss": 2.0 - i / 10, "mean_token_accuracy": 0.3} for i in range(1, 6)]
    write_json(folder / "sft/trainer_state.json", {"global_step": 5, "log_history": history})
    write_json(folder / "sft/evaluation.json", {"loss": 1.5, "perplexity": math.exp(1.5), "n": 10})
    write_json(folder / "reward/run.json", record("reward", command=text))
    history = [{"step": i, "loss": 0.6, "accuracy": 0.7, "margin": 0.5} for i in range(1, 6)]
    write_json(folder / "reward/trainer_state.json", {"global_step": 5, "log_history": history})
    write_json(folder / "reward/evaluation.json", {"accuracy": 0.84, "accuracy_ci": [0.8, 0.87], "n": 400})
    ppo = folder / name
    write_json(ppo / "run.json", record("ppo", parents=[{"path": text}], wandb_run_id=text))
    write_json(ppo / "trainer_state.json", {"global_step": 120, "log_history": [*ppo_history(), *held_out_history()]})
    write_json(ppo / "evaluation.json", comparison(text))
    write_json(ppo / "verifier.json", verifier_record(text))
    alarm = {"kind": "over_optimization", "step": 90, "message": f"fell {text}", "numbers": {}, "action": "warned"}
    write_json(ppo / "alarms.json", [alarm])
    sample = {"prompt": text, "policy": text, "reference": text, "policy_reward": 1.25, "reference_gold": -0.75}
    line = json.dumps({"step": 100, "win_rate": 0.7, "samples": [sample]})
    (ppo / "policy_evaluation.jsonl").write_text(line + "\n")
    (ppo / "completions").mkdir(exist_ok=True)
    printable = text.encode("utf-8", "replace").decode()
    for step in (10, 120):
        rows = [{"step": step, "prompt": printable, "completion": printable, "reward": r / 8} for r in range(16)]
        file = ppo / f"completions/completions_{step:05d}.parquet"
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
    return folder


def verifier_record(text="a text", paid=0.5, verdict="bought", **changes):
    """What `rlhf-recipes verifier` writes, with only three kinds of answers."""
    entry = {"rows": 40, "interval": [0.352, 0.648], "example": text, "row": 3}
    return {
        "reward": text,
        "rows": {"source": text, "split": "train", "number": 40, "seed": 0},
        "pays": [-1.0, 3.0],
        "bound": 0.1,
        "kinds": [
            {"kind": "true", "right": True, "paid": 1.0, **entry, "interval": [0.912, 1.0]},
            {"kind": "constant", "right": False, "paid": paid, **entry},
            {"kind": "negated", "right": False, **entry, "rows": 0, "paid": None, "interval": None, "example": ""},
        ],
        "verdict": {"verdict": verdict, "kinds": ["constant"] if verdict == "bought" else []},
    } | changes
