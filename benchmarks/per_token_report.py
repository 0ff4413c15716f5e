"""Tables and plot of the learning-per-token benchmark: means of seeds with 95 % intervals."""

import json
from pathlib import Path

import numpy as np
from scipy import stats

NAMES = {
    "ppo_adapter": "PPO here, adapter",
    "ppo_adapter_half": "PPO here, upper half of the adapter",
    "ppo_head": "PPO here, head",
    "grpo": "GRPO, TRL 1.16",
    "rloo": "RLOO, TRL 1.16",
    "trl112": "PPO, TRL 1.12",
    "ppo_adapter_slow": "PPO here, adapter, critic at the policy's rate",
}


def interval(values):
    """Mean, and half the width of its 95 % interval by Student's t."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return float(values.mean()), float("nan")
    half = stats.t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / np.sqrt(len(values))
    return float(values.mean()), float(half)


def gold_at(rows, axis, where):
    """Gold score of a run at some tokens or seconds, between two evaluations by interpolation.

    For a KL it is the best gold score of the evaluations within that KL, since KL goes up and down along a run.
    """
    if axis == "kl":
        return max(row["gold"] for row in rows if row["kl"] <= where)
    return float(np.interp(where, [row[axis] for row in rows], [row["gold"] for row in rows]))


def common(curves, axis):
    """The most of `axis`, tokens or seconds, that all runs reached."""
    return min(rows[-1][axis] for runs in curves.values() for rows in runs)


def summarise(curves, nats, kl_coef):
    """Numbers of each method, each a mean and half an interval.

    Args:
        curves: For each method the evaluations of each of its runs.
        nats: KL to the reference within which the best gold score of each run is compared, several.
        kl_coef: Of the objective that is trained, reward minus `kl_coef` times KL.

    Returns:
        `where`, at which tokens and seconds methods are compared; `methods`, the numbers of each.
    """
    where = {axis: common(curves, axis) for axis in ("tokens", "seconds")}
    points = {f"gold within {most:g} nats": ("kl", most) for most in nats} | {
        "gold at equal tokens": ("tokens", where["tokens"]),
        "gold at equal time": ("seconds", where["seconds"]),
    }
    methods = {}
    for method, runs in curves.items():
        numbers = {name: [gold_at(rows, *point) for rows in runs] for name, point in points.items()}
        numbers |= {
            f"final {key}": [float(rows[-1][key]) for rows in runs]
            for key in ("gold", "reward", "kl", "length", "tokens", "seconds")
        }
        numbers["final objective"] = [float(rows[-1]["reward"] - kl_coef * rows[-1]["kl"]) for rows in runs]
        methods[method] = {name: interval(values) for name, values in numbers.items()} | {"values": numbers}
    return {"where": where, "methods": methods}


def text(place, summary, rates):
    """Lay the numbers out as a table of Markdown."""
    where, methods = summary["where"], summary["methods"]
    columns = [name for name in next(iter(methods.values())) if name != "values"]
    lines = [
        f"{Path(place).name}: compared at {where['tokens']:,.0f} completion tokens, "
        f"{where['seconds']:.0f} s of one core; {len(next(iter(methods.values()))['values']['final gold'])} seeds",
        "| method | learning rate | " + " | ".join(columns) + " |",
        "|" + "---|" * (len(columns) + 2),
    ]
    for method, numbers in methods.items():
        cells = []
        for name in columns:
            mean, half = numbers[name]
            digits = 0 if mean > 1000 else 1 if name in ("final length", "final seconds") else 2
            cells.append(f"{mean:,.{digits}f} ± {half:,.{digits}f}")
        lines.append(f"| {NAMES[method]} | {rates[method]} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def plot(places, path):
    """Draw gold and reward by KL, tokens and time, one row for each task, where matplotlib is installed."""
    try:
        from matplotlib import pyplot
    except ImportError:
        return False
    panels = [("kl", "gold"), ("tokens", "gold"), ("tokens", "reward"), ("seconds", "gold")]
    labels = {"kl": "KL, nats", "tokens": "completion tokens", "seconds": "seconds of one core"}
    labels |= {"gold": "gold score", "reward": "reward model"}
    figure, axes = pyplot.subplots(len(places), len(panels), figsize=(15, 3.6 * len(places)), squeeze=False)
    for row, place in zip(axes, places, strict=True):
        curves = json.loads((Path(place) / "result.json").read_text())["curves"]
        for axis, (x, y) in zip(row, panels, strict=True):
            for method, runs in curves.items():
                xs, ys = ([[point[key] for point in rows] for rows in runs] for key in (x, y))
                colour = f"C{list(NAMES).index(method)}"
                axis.plot(np.mean(xs, axis=0), np.mean(ys, axis=0), color=colour, label=NAMES[method])
                for run_x, run_y in zip(xs, ys, strict=True):
                    axis.plot(run_x, run_y, color=colour, alpha=0.2, linewidth=0.7)
            axis.set(xlabel=labels[x], ylabel=labels[y])
        row[0].set_title(Path(place).name, loc="left")
    lines = {line.get_label(): line for row in axes for line in row[0].get_lines()}
    shown = [name for name in NAMES.values() if name in lines]
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.legend([lines[name] for name in shown], shown, loc="lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=90)
    return True


def write(place, curves, rates, nats, kl_coef):
    """Write `result.json` for a task; return the table."""
    summary = summarise(curves, nats, kl_coef)
    found = {"rates": rates, "curves": curves, **summary}
    (Path(place) / "result.json").write_text(json.dumps(found, indent=1))
    return text(place, summary, rates)
