"""The result of a training on rewards: the verdict, and the policy beside its reference."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rlhf_recipes.tools.pages.colours import POLICY_LOOK, REFERENCE_LOOK
from rlhf_recipes.tools.pages.drawing import draw
from rlhf_recipes.tools.pages.html import clean, figure, folded, note, table
from rlhf_recipes.tools.report.drawing import Looks, named, plot_win_rates
from rlhf_recipes.tools.report.parts import shown
from rlhf_recipes.tools.report.reading import Record, Stage, finite, gold_metric, series

_MEASURES = {
    "gold_score": "gold score",
    "reward_score": "reward",
    "kl": "KL, nats",
    "length": "length, tokens",
    "eos_rate": "ended, share",
}
_WIN_RATES = ("win_rate", "length_controlled_win_rate")
_WORDS = {
    "policy": "the language model that PPO trains.",
    "reference": "the same model before PPO, usually after SFT. It stays as it is.",
    "reward": "what PPO maximises. A learned reward model can be wrong, and PPO finds out where.",
    "gold score": "a judge of the same texts that PPO does not see. Where it disagrees with the reward, trust it.",
    "win rate": "share of the held-out prompts where the policy's completion has the higher score; ties count half. "
    "0.5 is no better than the reference. The interval is a bootstrap over prompts: repeated, 95 % of such intervals "
    "hold the true rate.",
    "at equal length": "what a logistic regression makes of the win rate if both completions of each prompt had the "
    "same length (AlpacaEval 2's). Far below the win rate: the policy wins by length.",
    "KL": "how far the policy has moved from the reference, in nats per completion. More of it buys more reward, and "
    "takes the policy to texts that the reward model has never seen.",
}


def result(policies: Sequence[Stage], folder: Path, looks: Looks) -> str:
    """Write what came out: a verdict per policy, and the comparison with the reference.

    Args:
        policies: The stages that trained on rewards.
        folder: Where the plot goes.
        looks: Of the runs.

    Returns:
        HTML.
    """
    words = "".join(f"<dt>{word}</dt><dd>{meaning}</dd>" for word, meaning in _WORDS.items())
    lead = "Policy and reference complete the same held-out prompts, and a judge compares what they wrote."
    return (
        note(lead)
        + "".join(_box(stage, looks) for stage in policies)
        + comparison(policies, looks)
        + _win_rates(policies, folder, looks)
        + folded("What the words mean", f"<dl>{words}</dl>")
    )


def _box(stage: Stage, looks: Looks) -> str:
    level, sentence = verdict(stage)
    alarms = ""
    if stage.alarms is not None:
        number = len(stage.alarms)
        alarms = f' <a href="#alarms">Alarms and warnings: {number}</a>.' if number else " No alarm was raised."
    name = named(stage.name, looks.get(stage.name))
    return (
        f'<p class="verdict {level}"><strong>{name}: {clean(sentence)}</strong><br/>'
        f"{clean(numbers(stage))}{alarms}</p>"
    )


def verdict(stage: Stage) -> tuple[str, str]:
    """Summarise a stage that trained on rewards in one sentence.

    Returns:
        `good`, `care` or `bad`, and the sentence.
    """
    record = stage.record("evaluation")
    ends = _interval(record)
    if ends is None:
        return "care", "No win rate against the reference is known."
    if _gain(record, "gold_score") < 0 < _gain(record, "reward_score"):
        return "bad", "The reward rose and the gold score fell: the policy fools its reward model."
    if ends[1] < 0.5:
        return "bad", "It is worse than the reference."
    if any(row.get("kind") == "over_optimization" for row in stage.alarms or []):
        better = "better than the reference" if ends[0] > 0.5 else "not better than the reference"
        return "bad", f"It is {better}, but was better before: the reward held, what it stands for fell in training."
    if ends[0] <= 0.5:
        return "care", "It cannot be told from the reference."
    if record.get("win_rate_by") == "reward_score":
        return "care", "It is better by the reward that it was trained on, which says little. Give a gold score."
    return "good", "It is better than the reference."


def numbers(stage: Stage) -> str:
    """Write the numbers of a verdict: win rate, gold score and reward before and after, and the KL that they cost.

    Args:
        stage: A stage that trained on rewards. Without its evaluation the last entry of its log is quoted.

    Returns:
        Sentences; none if nothing is known.
    """
    record, parts = stage.record("evaluation"), []
    if (ends := _interval(record)) is not None:
        parts.append(f"Win rate {shown(record['win_rate'], ends)} by {record.get('win_rate_by', '?')}.")
    ours, theirs = _side(record, "policy"), _side(record, "reference")
    changes = [
        f"{name} {shown(theirs.get(key))} → {shown(ours[key])}"
        if finite(theirs.get(key))
        else f"{name} {shown(ours[key])}"
        for key, name in (("gold_score", "gold score"), ("reward_score", "reward"))
        if finite(ours.get(key))
    ]
    if changes:
        changes[0] = changes[0][0].upper() + changes[0][1:]
        cost = f", at a KL of {shown(ours['kl'])} nats per completion" if finite(ours.get("kl")) else ""
        parts.append(f"{', '.join(changes)}{cost}.")
    return " ".join(parts) or _last_log(stage)


def _last_log(stage: Stage) -> str:
    parts = []
    for name, key in (("gold score", gold_metric(stage)), ("reward", "reward"), ("KL", "kl")):
        points = [(s, v) for s, v in zip(*series(stage.history, key or ""), strict=True) if finite(v)]
        if points:
            parts.append(f"{name} {shown(points[-1][1])} at step {points[-1][0]}")
    return f"Last logged: {', '.join(parts)}." if parts else ""


def _interval(record: Record) -> tuple[float, float] | None:
    """The ends of the win rate's interval, if both and the rate are known."""
    ends: Any = record.get("win_rate_ci")
    known = isinstance(ends, list) and len(ends) == 2 and all(map(finite, ends)) and finite(record.get("win_rate"))
    return (ends[0], ends[1]) if known else None


def _gain(record: Record, name: str) -> float:
    ours, theirs = (_side(record, side).get(name) for side in ("policy", "reference"))
    return ours - theirs if finite(ours) and finite(theirs) else 0.0


def _side(record: Record, side: str) -> Mapping[str, Any]:
    value = record.get(side)
    return value if isinstance(value, dict) else {}


def comparison(policies: Sequence[Stage], looks: Looks) -> str:
    """Write a table with a row per policy, and one for the reference, or for each of them where they differ."""
    references = {stage.name: _measures(stage, "reference") for stage in policies}
    known = [own for own in references.values() if any(value != "-" for value in own)]
    rows: list[tuple[object, ...]] = []
    for stage in policies:
        record = stage.record("evaluation")
        rate, fair = (shown(record.get(key), record.get(f"{key}_ci")) for key in _WIN_RATES)
        judge = record.get("win_rate_by", "-")
        counts = (shown(record.get("rows")), shown(record.get("prompts")), judge)
        name = named(stage.name, looks.get(stage.name, POLICY_LOOK))
        rows.append((name, rate, fair, *_measures(stage, "policy"), *counts))
        if ema := _side(record, "ema"):
            name = named(f"{stage.name}, average of its weights", None)
            rate = shown(ema.get("win_rate"), ema.get("win_rate_ci"))
            rows.append((name, rate, "", *_measures(stage, "ema"), *counts))
    if known:
        shared = all(own == known[0] for own in known)
        names = (
            {"reference": known[0]} if shared else {f"reference of {name}": own for name, own in references.items()}
        )
        rows += [(named(name, REFERENCE_LOOK), "0.5", "0.5", *own, "", "", "") for name, own in names.items()]
    header = (
        "",
        "win rate [95 % interval]",
        "at equal length",
        *_MEASURES.values(),
        "completions",
        "prompts",
        "judged by",
    )
    return table(header, rows)


def _measures(stage: Stage, side: str) -> tuple[str, ...]:
    values = _side(stage.record("evaluation"), side)
    return tuple(shown(values.get(name)) for name in _MEASURES)


def _win_rates(policies: Sequence[Stage], folder: Path, looks: Looks) -> str:
    """Draw the win rates of the policies below each other."""
    rates = [
        (stage, stage.record("evaluation")["win_rate"], ends)
        for stage in policies
        if (ends := _interval(stage.record("evaluation")))
    ]
    if not rates:
        return ""
    rows = [(stage.name, rate, ends, looks.get(stage.name, POLICY_LOOK)) for stage, rate, ends in rates]
    alt = "Win rates with their 95 % intervals: " + "; ".join(f"{row[0]} {shown(*row[1:3])}" for row in rows) + "."
    plot = partial(plot_win_rates, rows=rows)
    svg = draw("result-win-rates", alt, plot, folder / "result-win-rates.png", height=0.8 + 0.42 * len(rows))
    caption = "With 95 % intervals. Where two overlap, the runs may be equally good: compare them on more prompts."
    return figure("Win rates", svg, caption if len(rows) > 1 else "With its 95 % interval.")
