"""Curves of both sides with intervals: tables, summary, plot."""

import json
from pathlib import Path

import numpy as np
from scipy import stats

SIDES = ("ours", "trl112")
NAMES = {"ours": "this project", "trl112": "TRL 1.12"}
# What differs on purpose. The first block is made equal by the settings, the second is left as each side has it.
DIFFERENCES = """\
Deliberate differences that the settings switch off
  gradient clipping   TRL 1.12's loop never clips, whatever `max_grad_norm` says; here it is honoured (set to 1e9)
  learning rate       TRL 1.12 steps the schedule once per rollout, here once per optimizer step (constant)
  end token           with pad == eos TRL 1.12 leaves the end token out of the mask; here it counts (pad != eos)
  defaults            Adam's epsilon (1e-8 there, 1e-5 here), temperature (0.7, 1), learning rate (3e-6, 1e-5)
Deliberate differences that stay
  score slot          TRL 1.12 puts the score of a finished completion into the slot after its end token, and trains
                      the critic there too; here it is on the last token (the advantages are the same with
                      gamma = lambda = 1)
  averages            TRL 1.12 takes the mean over each minibatch's tokens, so that a token weighs more in a minibatch
                      of short completions; here every token of a rollout weighs the same
  whitening           sample variance (n - 1) there, population variance (n) here
  padding token       a sampled padding token ends a completion in TRL 1.12; here only the end token does
  old policy          log-probabilities from the logits of generation there, from a forward pass here (rounding)
  reference           a model of its own there, a frozen copy that also carries other roles here (the same numbers)
  diagnostics         approximate KL, ratio and entropy count padding there, and are masked here (no effect)
  random numbers      minibatches from numpy's unseeded generator there (the worker seeds it), from torch's here"""


def interval(ours, theirs):
    """Difference of means with its 95 % interval, by Welch's t: `(difference, low, high)`."""
    ours, theirs = np.asarray(ours, dtype=float), np.asarray(theirs, dtype=float)
    difference = float(ours.mean() - theirs.mean())
    if min(len(ours), len(theirs)) < 2 or not (ours.var() + theirs.var()):
        return difference, float("nan"), float("nan")
    low, high = stats.ttest_ind(ours, theirs, equal_var=False).confidence_interval(0.95)
    return difference, float(low), float(high)


def at_kl(rows, grid):
    """Scores of a run where its KL first reached each number of a grid, between two evaluations by interpolation."""
    kl = np.maximum.accumulate([row["kl"] for row in rows])
    return np.interp(grid, kl, [row["score"] for row in rows])


def summarise(curves):
    """Compare the two sides of `curves`: side to seed to rows.

    Returns:
        `by_update` and `by_kl`: rows with each side's mean and the difference with its interval; and `overall`, the
        same for the numbers that sum a run up.
    """
    runs = {side: list(curves[side].values()) for side in SIDES}
    updates = [row["update"] for row in runs["ours"][0]]
    by_update = [
        {"update": update} | {key: _compare(runs, lambda rows, i=i, key=key: rows[i][key]) for key in ("score", "kl")}
        for i, update in enumerate(updates)
    ]
    reached = min(max(row["kl"] for row in rows) for side in SIDES for rows in runs[side])
    grid = reached * np.arange(1, 7) / 6
    by_kl = [
        {"kl": float(kl), "score": _compare(runs, lambda rows, i=i: at_kl(rows, grid)[i])} for i, kl in enumerate(grid)
    ]
    overall = {
        "score, mean over the run": _compare(runs, lambda rows: np.mean([row["score"] for row in rows[1:]])),
        "score at the end": _compare(runs, lambda rows: rows[-1]["score"]),
        "score, mean over equal KL": _compare(runs, lambda rows: at_kl(rows, grid).mean()),
        "KL at the end": _compare(runs, lambda rows: rows[-1]["kl"]),
    }
    return {"by_update": by_update, "by_kl": by_kl, "overall": overall}


def _compare(runs, measure):
    values = {side: [float(measure(rows)) for rows in runs[side]] for side in SIDES}
    means = {side: float(np.mean(values[side])) for side in SIDES}
    return means | {"values": values, "difference": interval(values["ours"], values["trl112"])}


def text(curves, summary):
    """Lay the comparison out for reading."""
    lines = ["Score / KL of each run, by update (held-out prompts; KL in nats per completion)"]
    updates = [row["update"] for row in summary["by_update"]]
    lines.append(f"{'':<20}" + "".join(f"{update:>13}" for update in updates))
    for seed in curves["ours"]:
        for side in SIDES:
            cells = (f"{row['score']:.2f} / {row['kl']:.1f}" for row in curves[side][seed])
            lines.append(f"{f'seed {seed}, {NAMES[side]}':<22}" + "".join(f"{cell:>13}" for cell in cells))
    head = "".join(f"{name:>14}" for name in (*NAMES.values(), "difference")) + "   95 % interval"
    lines += ["", f"{'Score by update':<28}{head}"]
    lines += [_line(row["update"], row["score"]) for row in summary["by_update"][1:]]
    lines += ["", f"{'KL by update':<28}{head}"]
    lines += [_line(row["update"], row["kl"]) for row in summary["by_update"][1:]]
    lines += ["", f"{'Score at equal KL':<28}{head}"]
    lines += [_line(f"{row['kl']:.1f} nats", row["score"]) for row in summary["by_kl"]]
    lines += ["", f"{'Run as a whole':<28}{head}"]
    lines += [_line(name, found) for name, found in summary["overall"].items()]
    return "\n".join([*lines, "", verdict(summary), "", DIFFERENCES])


def _line(name, found):
    difference, low, high = found["difference"]
    return f"{name:<28}{found['ours']:>14.3f}{found['trl112']:>14.3f}{difference:>+14.3f}   [{low:+.3f}, {high:+.3f}]"


def verdict(summary):
    """Say whether the two sides differ by more than the seeds, and how large a difference could have been missed."""
    _, low, high = summary["overall"]["score, mean over equal KL"]["difference"]
    if np.isnan(low):
        return "One seed, or runs that are all the same: there are no intervals to judge by."
    beyond = [name for name, found in summary["overall"].items() if _excludes_zero(found)]
    points = [row[key] for row in summary["by_update"][1:] for key in ("score", "kl")]
    points += [row["score"] for row in summary["by_kl"]]
    gain = summary["by_update"][-1]["score"]["trl112"] - summary["by_update"][0]["score"]["trl112"]
    found = (
        f"Beyond the seeds: {', '.join(beyond)}." if beyond else "The runs as a whole differ no more than the seeds."
    )
    return (
        f"{found} Of {len(points)} intervals by update and by KL, {sum(map(_excludes_zero, points))} leave out 0.\n"
        f"At equal KL a difference outside [{low / gain:+.1%}, {high / gain:+.1%}] of TRL 1.12's gain is excluded."
    )


def _excludes_zero(found):
    _, low, high = found["difference"]
    return low > 0 or high < 0


def plot(curves, path):
    """Draw score by update, KL by update, and score by KL, where matplotlib is installed; return whether it was."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    figure, axes = pyplot.subplots(1, 3, figsize=(13, 4))
    for axis, (x, y) in zip(axes, (("update", "score"), ("update", "kl"), ("kl", "score")), strict=True):
        for side, colour in zip(SIDES, ("tab:blue", "tab:orange"), strict=True):
            for number, rows in enumerate(curves[side].values()):
                label = NAMES[side] if number == 0 else None
                points = [[row[key] for row in rows] for key in (x, y)]
                axis.plot(*points, color=colour, alpha=0.7, label=label)
        axis.set(xlabel=x, ylabel=y)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(path)
    return True


def write(folder, curves, settings):
    """Write `result.json`, `result.txt` and, if possible, `curves.png`; return the text."""
    folder, summary = Path(folder), summarise(curves)
    found = {"settings": settings, "curves": curves, **summary}
    (folder / "result.json").write_text(json.dumps(found, indent=1))
    report = text(curves, summary)
    (folder / "result.txt").write_text(report + "\n")
    plot(curves, folder / "curves.png")
    return report
