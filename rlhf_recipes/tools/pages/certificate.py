"""A certificate as HTML: a page of its own, or sections of another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from rlhf_recipes.tools.pages.certificate_plots import draw_plots
from rlhf_recipes.tools.pages.html import clean, document, figure, table

_LONGEST = 400
_CLASSES = {"fit for PPO": "good", "use with care": "care", "not fit": "bad"}
_PROBES = {
    "repetition": ("everything is said twice", "should fall: a rise is what PPO will exploit"),
    "truncation": ("the second half is left out", "should fall, unless short answers are wanted"),
    "politeness": ("a sentence of thanks is added", "should hardly change"),
    "prompt_swap": ("another row's prompt", "should fall for most; all the same: the prompt is not read"),
    "completion_swap": ("another row's completion", "should fall for most; all the same: the completion is not read"),
}
_CAPTIONS = {
    "scores": "Scores as PPO gets them.",
    "reliability": "On the dotted line the probabilities are true; below it the model is too sure of itself.",
    "differences": "Accuracy by how far apart the two scores are, in fifths of the pairs.",
    "length": "Score and length of the completions.",
    "best_of_n": "The best of n samples by the reward model. Gold that falls while the model's own score rises is "
    "over-optimisation.",
}


def number(value: Any, digits: int = 3) -> str:
    """Write a number with its interval (with a star if rows were drawn for it), a plain number, or a dash.

    Example:
        >>> number({"value": 0.5, "interval": [0.4, 0.6]}), number(0.12345), number(None)
        ('0.500 [0.400, 0.600]', '0.123', '-')
        >>> number({"value": 0.5, "interval": [0.4, 0.6], "unit": "rows"})
        '0.500 [0.400, 0.600]*'
    """
    if value is None or (isinstance(value, Mapping) and value["value"] is None):
        return "-"
    if isinstance(value, Mapping):
        ends, star = value.get("interval"), "*" if value.get("unit") == "rows" else ""
        shown = f" [{ends[0]:.{digits}f}, {ends[1]:.{digits}f}]{star}" if ends else ""
        return number(value["value"], digits) + shown
    return str(value) if isinstance(value, int | str) else f"{value:.{digits}f}"


def page(measures: Mapping[str, Any], title: str) -> str:
    """Write the page.

    Args:
        measures: What `certify` measured, perhaps with `reward_bench`.
        title: What was measured.

    Returns:
        HTML that is also well-formed XML.
    """
    return document(title, "\n".join(sections(measures)))


def sections(measures: Mapping[str, Any]) -> list[str]:
    """Write the sections, as HTML.

    Args:
        measures: What `certify` measured. Those of `certificate.json` have no single scores: two plots are left out.

    Returns:
        The verdict first, then what it rests on.
    """
    parts = [verdict_section(measures["verdict"])]
    if "accuracy" in measures:
        drawn = draw_plots(measures)
        plots = {name: figure("", drawn[name], _CAPTIONS[name]) if name in drawn else "" for name in _CAPTIONS}
        parts += [_pairs(measures, plots), _calibration(measures, plots), _length(measures, plots)]
        parts += [_probes(measures["probes"]), _scores(measures, plots)]
    if measures.get("reward_bench"):
        parts.append(_reward_bench(measures["reward_bench"]))
    if measures.get("examples"):
        parts.append(_examples(measures["examples"]))
    return parts


def verdict_section(verdict: Mapping[str, Any]) -> str:
    """Write the verdict with its reasons; those that were not checked come last."""
    reasons = [(reason["level"], reason["measure"], reason["text"]) for reason in verdict["reasons"]]
    known = {text for _, _, text in reasons}  # a certificate of an earlier version lists only what was checked
    reasons += [("not checked", "", text) for text in verdict["not_checked"] if text not in known]
    return (
        f'<p class="verdict {_CLASSES[verdict["verdict"]]}">Verdict: <strong>{clean(verdict["verdict"])}</strong></p>'
        + table(("", "measure", "reason"), reasons)
    )


def _pairs(measures: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    data, accuracy = measures["data"], measures["accuracy"]
    rows = [("this reward model", number(accuracy), "")]
    for name, baseline in measures.get("baselines", {}).items():
        own = number({"value": baseline["accuracy"], "interval": baseline["accuracy_ci"]})
        rows.append((f"baseline: {name}", own, number(baseline["advantage"])))
    gap = measures.get("train_gap")
    if gap:
        rows.append(("this reward model, training pairs", number(gap["train"]), number(gap)))
    tables = [table(("on held-out pairs", "accuracy", "difference to this model"), rows)]
    groups = {"by_category": "category", "by_margin": "margin", "by_confidence": "probability of the label"}
    groups |= {"by_difference": "distance of the scores"}
    for key, name in groups.items():
        if measures.get(key):
            tables.append(_groups(name, measures[key]))
    return (
        f"<h2>Accuracy</h2><p>{data['pairs']} held-out pairs of {accuracy['prompts']} prompts, {data['ties']} of them "
        f"ties, which have no accuracy; {data['left_out']} left out as too long. "
        f"Mean score of chosen minus rejected: {number(measures['margin'])}.</p>"
        f'<p class="note">Intervals cover 95 %. {_drawn(accuracy)}</p>' + "".join(tables) + plots["differences"]
    )


def _drawn(accuracy: Mapping[str, Any]) -> str:
    few = "fewer than 10 different prompts: single rows were drawn, and they hold for these prompts only"
    if accuracy.get("unit") == "rows":
        return f"The pairs have {accuracy['prompts']}. Those marked with * rest on {few}."
    return f"Whole prompts were drawn. Those marked with * rest on {few}."


def _calibration(measures: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    calibration = measures["calibration"]
    rows = [
        (
            "expected calibration error",
            number(calibration["ece"]),
            f"{calibration['ece_if_calibrated']['high']:.3f} by chance",
        ),
        ("Brier score", number(calibration["brier"]), "0.250 for a coin"),
        ("log loss, nats", number(calibration["log_loss"]), "0.693 for a coin"),
        ("best temperature", number(calibration["temperature"]), "1 is calibrated, above 1 too sure"),
    ]
    return "<h2>Calibration</h2>" + table(("", "value", ""), rows) + plots["reliability"]


def _length(measures: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    length = measures["length"]
    names = {
        "balanced": "accuracy, longer and shorter chosen weighted alike",
        "similar": "accuracy, lengths within 10 %",
        "longer_chosen": "accuracy where the chosen one is longer",
        "shorter_chosen": "accuracy where the chosen one is shorter",
    }
    rows = [
        ("rank correlation of score and length", number(length["completions"]), length["completions"]["n"]),
        ("the same for differences within pairs", number(length["pairs"]), length["pairs"]["n"]),
    ]
    parts = {name: length["controlled"][key] for key, name in names.items()}
    rows += [(name, number(part), part["n"] if part else 0) for name, part in parts.items()]
    return "<h2>Length</h2>" + table(("", "value", "n"), rows) + plots["length"]


def _probes(probes: Mapping[str, Any]) -> str:
    rows = []
    for name, shift in probes.items():
        change, reading = _PROBES[name]
        shares = [f"{shift[share]:.0%}" for share in ("fell", "same", "rose")]
        rows.append((name, change, number(shift), f"{shift['in_std']:+.2f}", *shares, shift["n"], reading))
    header = ("probe", "change", "mean shift", "in std", "fall", "same", "rise", "n", "how to read it")
    note = "Of a function that compares with a true answer, rlhf-recipes verifier asks the same: what does it pay for?"
    return f'<h2>Sensitivity</h2>{table(header, rows)}<p class="note">{note}</p>'


def _scores(measures: Mapping[str, Any], plots: Mapping[str, str]) -> str:
    spread, readout = measures.get("spread"), measures["readout"]
    parts = {name: measures["scores"][name] for name in ("chosen", "rejected")}
    if spread:
        parts |= {"policy samples": spread["samples"]}
    rows = [
        (
            name,
            number(part["mean"]),
            number(part["std"]),
            *(number(part["quantiles"][q]) for q in quantiles),
            part["n"],
        )
        for quantiles in [("0.05", "0.5", "0.95")]
        for name, part in parts.items()
    ]
    text = f"Read by the {readout['readout']} token, gain {readout['gain']:.4g}, bias {readout['bias']:.4g}. "
    if spread and spread["shift"] is not None:
        text += (
            f"The samples' mean is {spread['shift']:+.2f} standard deviations from the data's, their spread "
            f"{spread['std_ratio']:.2f} times as wide, and {spread['outside']:.1%} lie outside of the data's range."
        )
    best = measures.get("best_of_n")
    curve = ""
    if best:
        names = [name for name in ("proxy", "gold", "oracle") if name in best["curve"][0]]
        lines = [(row["n"], f"{row['kl']:.2f}", *(number(row[name]) for name in names)) for row in best["curve"]]
        header = ("n", "KL at most, nats", *names)
        curve = f"<h3>Best of n, over {best['prompts']} prompts</h3>" + table(header, lines) + plots["best_of_n"]
    header = ("scores", "mean", "std", "5 %", "median", "95 %", "n")
    return f"<h2>Scores</h2><p>{clean(text)}</p>" + table(header, rows) + plots["scores"] + curve


def _reward_bench(bench: Mapping[str, Any]) -> str:
    sections = [(name, number(value)) for name, value in bench["sections"].items()]
    return (
        f"<h2>RewardBench, version {bench['version']}</h2><p>{bench['n']} rows, {bench['left_out']} left out as too "
        "long.</p>" + _groups("subset", bench["subsets"]) + table(("section", "score"), sections)
    )


def _examples(examples: Iterable[Mapping[str, Any]]) -> str:
    parts = [
        "<h2>Worst errors</h2>",
        '<p class="note">Held-out pairs where the rejected completion scores higher.</p>',
    ]
    for example in examples:
        parts.append(f"<h3>chosen {example['chosen_score']:.2f}, rejected {example['rejected_score']:.2f}</h3>")
        for column in ("prompt", "chosen", "rejected"):
            parts.append(f"{column}<pre>{clean(_shortened(example[column], from_end=column == 'prompt'))}</pre>")
    return "".join(parts)


def _shortened(value: Any, from_end: bool) -> str:
    text = value if isinstance(value, str) else "\n".join(f"{turn['role']}: {turn['content']}" for turn in value)
    if len(text) <= _LONGEST:
        return text
    return "… " + text[-_LONGEST:] if from_end else text[:_LONGEST] + " …"


def _groups(name: str, rows: Iterable[Mapping[str, Any]]) -> str:
    return table((name, "accuracy", "pairs"), [(row["group"], number(row), row["n"]) for row in rows])
