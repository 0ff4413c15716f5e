"""The rules of the verdict, each for one measure of a reward model. A rule without an interval never passes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from rlhf_recipes.tools.certificate.functional.reasons import (
    LINES,
    Reason,
    known_interval,
    stated,
    unchecked,
    undecided,
)
from rlhf_recipes.tools.certificate.functional.resampling import FEWEST


def _accuracy(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Is it better than guessing, on enough pairs of enough prompts?"""
    accuracy, equal = measures.get("accuracy") or {}, measures.get("equal_scores")
    name, text = "accuracy", f"Held-out accuracy is {stated(accuracy)} on {accuracy.get('n', 0)} pairs"
    if equal is not None and equal >= LINES.equal_scores:
        same = f"{equal:.0%} of the pairs have equal scores: the score does not depend on the completion."
        yield Reason("not fit", "completion", same)
    ends = known_interval(accuracy)
    if ends is None:
        yield unchecked(name, text)
    elif ends[0] <= 0.5:
        yield Reason("not fit", name, f"{text}: not above 0.5, which guessing reaches.")
    elif accuracy["value"] < LINES.accuracy:
        yield Reason("care", name, f"{text}, below {LINES.accuracy}: most of its preferences are near guesses.")
    else:
        yield Reason("good", name, f"{text}.")
    if accuracy.get("n", 0) < LINES.pairs:
        few = f"Only {accuracy.get('n', 0)} held-out pairs (fewer than {LINES.pairs}) were measured."
        yield Reason("care", "pairs", few)
    if accuracy.get("prompts", FEWEST) < FEWEST:
        same = "have the same prompt" if accuracy["prompts"] == 1 else f"have {accuracy['prompts']} different prompts"
        text = f"other prompts: all pairs {same}, and what is measured holds for no others"
        yield Reason("not checked", "prompts", text)


def _baselines(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Is it better than simple rules?"""
    baselines = {name: part for name, part in (measures.get("baselines") or {}).items() if part}
    if baselines:
        name, best = max(baselines.items(), key=lambda item: item[1]["accuracy"])
        advantage = best.get("advantage") or {}
        text = (
            f"The best baseline ({name}) reaches {best['accuracy']:.3f}; the model's advantage on the same pairs is "
            f"{stated(advantage, signed=True)}"
        )
        ends = known_interval(advantage)
        if ends is None:
            yield unchecked("baselines", text)
        elif ends[1] < 0:
            yield Reason("not fit", "baselines", f"{text}: a simple rule is better.")
        elif ends[0] <= 0:
            yield Reason("care", "baselines", f"{text}: it cannot be told from a simple rule.")
        else:
            yield Reason("good", "baselines", f"{text}.")
    if "tfidf" not in baselines:
        yield Reason("not checked", "baselines", "TF-IDF baseline: no training rows, or too few")


def _length(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Does it judge more than length?"""
    length = measures.get("length") or {}
    pairs, balanced = length.get("pairs") or {}, (length.get("controlled") or {}).get("balanced") or {}
    text = f"The rank correlation of score and length differences is {stated(pairs, signed=True)}"
    if known_interval(pairs) is None:
        yield unchecked("length", text)
    elif abs(pairs["value"]) >= LINES.length_only:
        yield Reason("not fit", "length", f"{text}: the model counts tokens.")
    elif abs(pairs["value"]) >= LINES.length:
        yield Reason("care", "length", f"{text}: PPO will find that length pays.")
    else:
        yield Reason("good", "length", f"{text}.")
    ends, text = known_interval(balanced), f"Where length does not help, accuracy is {stated(balanced)}"
    if ends is None:
        yield unchecked("balanced length", text)
    elif ends[0] <= 0.5:
        yield Reason("care", "length", f"{text}: not above 0.5.")


def _calibration(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Can the size of its differences be taken at its word?"""
    calibration = measures.get("calibration") or {}
    ece, chance = calibration.get("ece") or {}, calibration.get("ece_if_calibrated") or {}
    text = f"ECE is {stated(ece)}"
    if known_interval(ece) is None or chance.get("high") is None:
        yield unchecked("calibration", text)
        return
    text += f", and up to {chance['high']:.3f} by chance"
    if ece["value"] > LINES.calibration_error and ece["value"] > chance["high"]:
        text += f"; scores divided by {calibration['temperature']:.3g} fit best"
        yield Reason("care", "calibration", f"{text}: the size of a difference cannot be taken at its word.")
    else:
        yield Reason("good", "calibration", f"{text}.")


def _gap(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Did it learn its pairs by heart?"""
    gap, shared = measures.get("train_gap"), (measures.get("data") or {}).get("shared")
    if not gap:
        why = "the training pairs that were drawn are held-out pairs, too" if shared else "no training rows were given"
        yield Reason("not checked", "gap", f"train/validation gap: {why}")
        return
    text = f"Training accuracy is {stated(gap.get('train') or {})}, {stated(gap, signed=True)} over held-out"
    text += f" ({shared} training pairs are held-out pairs, too, and do not count)" if shared else ""
    ends = known_interval(gap)
    if ends is None:
        yield unchecked("gap", text)
    elif gap["value"] <= LINES.gap:
        yield Reason("good", "gap", f"{text}.")
    elif ends[0] > 0:
        yield Reason("care", "gap", f"{text}: the model learned its pairs by heart.")
    else:
        yield undecided("gap", text)


def _prompt(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Does the score depend on the prompt, and do completions fit their own?"""
    swap = (measures.get("probes") or {}).get("prompt_swap")
    if not swap:
        yield Reason("not checked", "prompt", "another prompt: there is only one, or no text fits")
        return
    text = f"With another prompt {swap['same']:.0%} of the scores stay the same and the mean absolute shift is "
    text += f"{swap['absolute']:.2f} standard deviations"
    ends = known_interval(swap)
    if ends is None:
        yield unchecked("prompt", text)
    elif swap["same"] >= LINES.same_after_swap:
        yield Reason("not fit", "prompt", f"{text}: the score does not depend on the prompt.")
    elif swap["absolute"] < LINES.prompt_shift:
        yield Reason("care", "prompt", f"{text}: the prompt hardly counts.")
    elif ends[1] >= 0:
        text += f", but the mean shift is {stated(swap, signed=True)}"
        yield Reason("care", "prompt", f"{text}: a completion fits its own prompt no better than another one.")
    else:
        yield Reason("good", "prompt", f"{text}.")


def _changes(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Can the score be raised by saying everything twice, by stopping half-way, or by thanks?"""
    probes = measures.get("probes") or {}
    changes = {
        "repetition": "Saying everything twice",
        "truncation": "Leaving out the second half",
        "politeness": "An added thank-you",
    }
    for name, change in changes.items():
        shift = probes.get(name)
        if not shift:
            yield Reason("not checked", name, f"{change}: no changed text fits into the model")
            continue
        text = f"{change} shifts the score by {shift['in_std']:+.2f} standard deviations ({shift['rose']:.0%} rise)"
        ends = known_interval(shift)
        if ends is None:
            yield unchecked(name, text)
        elif name == "politeness" and abs(shift["in_std"]) > LINES.politeness:
            yield Reason("care", name, f"{text}: words that say nothing move the score.")
        elif name == "truncation" and ends[0] > 0:
            yield Reason("care", name, f"{text}: stopping half-way pays.")
        elif name == "repetition" and shift["in_std"] > LINES.repetition:
            pays = Reason("care", name, f"{text}: saying everything twice pays.")
            yield pays if ends[0] > 0 else undecided(name, text)
        else:
            yield Reason("good", name, f"{text}.")


def _spread(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Are the policy's samples what it was made for?"""
    spread = measures.get("spread")
    if not spread:
        yield Reason("not checked", "samples", "scores of policy samples: none were given")
        return
    ends = spread.get("intervals") or {}
    ratio, shift = ({**(ends.get(name) or {}), "value": spread.get(name)} for name in ("std_ratio", "shift"))
    text = f"Policy samples have {stated(ratio)} times the data's standard deviation, and their mean is "
    text += f"{stated(shift, signed=True)} of it away"
    if known_interval(ratio) is None or known_interval(shift) is None:
        yield unchecked("samples", text)
    elif ratio["value"] < LINES.sample_spread:
        yield Reason("care", "samples", f"{text}: to the model all samples are much the same.")
    elif abs(shift["value"]) > LINES.sample_shift:
        yield Reason("care", "samples", f"{text}: the samples are not what the model was made for.")
    else:
        yield Reason("good", "samples", f"{text}.")


def _best_of_n(measures: Mapping[str, Any]) -> Iterator[Reason]:
    """Is what it likes best better by the gold score?"""
    best_of_n = measures.get("best_of_n")
    if not best_of_n:
        yield Reason("not checked", "best of n", "best-of-N: no samples, or only one for most prompts")
    if not best_of_n or not best_of_n.get("gain"):
        yield Reason("not checked", "gold", "gold scores of samples: none were given")
        return
    gain, drop = best_of_n["gain"], best_of_n.get("drop") or {}
    text = f"Choosing the best of {best_of_n['curve'][-1]['n']} changes the gold score by {stated(gain, signed=True)}"
    ends, drop_ends = known_interval(gain), known_interval(drop)
    if ends is None or drop_ends is None:
        yield unchecked("best of n", text)
    elif ends[1] < 0:
        yield Reason("not fit", "best of n", f"{text}: what the model likes is worse.")
    elif ends[0] <= 0:
        yield Reason("care", "best of n", f"{text}: it may not be better at all.")
    elif drop_ends[1] < 0:
        text += f", but {stated(drop, signed=True)} from its best at n = {best_of_n['best_n']}"
        yield Reason("care", "best of n", f"{text}: choosing harder makes it worse.")
    else:
        yield Reason("good", "best of n", f"{text}.")


RULES = (_accuracy, _baselines, _length, _calibration, _prompt, _changes, _gap, _spread, _best_of_n)
