"""The verdict: one rule at a time, from a reward model that is fit."""

import copy
import math
from dataclasses import fields

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf_recipes.tools.certificate.functional.reasons import LINES, Thresholds
from rlhf_recipes.tools.certificate.functional.verdict import judge

SHIFT = {
    "value": -0.5,
    "interval": [-0.6, -0.4],
    "in_std": -0.5,
    "absolute": 0.6,
    "rose": 0.1,
    "fell": 0.9,
    "same": 0.0,
}
GOOD = {
    "scores": {"not_finite": 0, "n": 800, "constant": False},
    "equal_scores": 0.0,
    "accuracy": {"value": 0.75, "interval": [0.7, 0.8], "n": 400},
    "baselines": {
        "longer": {"accuracy": 0.55, "advantage": {"value": 0.2, "interval": [0.1, 0.3]}},
        "tfidf": {"accuracy": 0.65, "advantage": {"value": 0.1, "interval": [0.05, 0.15]}},
    },
    "length": {
        "pairs": {"value": 0.2, "interval": [0.1, 0.3]},
        "controlled": {"balanced": {"value": 0.7, "interval": [0.65, 0.75]}},
    },
    "calibration": {
        "ece": {"value": 0.03, "interval": [0.02, 0.06]},
        "ece_if_calibrated": {"mean": 0.03, "high": 0.05},
        "temperature": 1.1,
    },
    "probes": {
        **dict.fromkeys(("repetition", "truncation", "prompt_swap", "completion_swap"), SHIFT),
        "politeness": {**SHIFT, "in_std": 0.1},
    },
    "train_gap": {"train": {"value": 0.8}, "value": 0.05, "interval": [0.0, 0.1]},
    "spread": {
        "shift": 0.5,
        "std_ratio": 0.9,
        "intervals": {"shift": {"interval": [0.4, 0.6]}, "std_ratio": {"interval": [0.8, 1.0]}},
    },
    "best_of_n": {
        "curve": [{"n": 1}, {"n": 16}],
        "gain": {"value": 0.5, "interval": [0.4, 0.6]},
        "drop": {"value": 0.0, "interval": [0.0, 0.0]},
        "best_n": 16,
    },
}


def changed(path, value):
    measures = copy.deepcopy(GOOD)
    *parents, last = path.split(".")
    part = measures
    for name in parents:
        part = part[name]
    part[last] = {**part[last], **value} if isinstance(value, dict) else value
    return measures


BAD = {
    "a diverged model": ("scores.not_finite", 3, "not fit", "3 of 800 scores are not finite"),
    "accuracy like guessing": ("accuracy.interval", [0.49, 0.6], "not fit", "not above 0.5"),
    "low accuracy": ("accuracy.value", 0.58, "use with care", "below 0.6"),
    "few pairs": ("accuracy.n", 60, "use with care", "Only 60 held-out pairs"),
    "completions do not count": ("equal_scores", 0.9, "not fit", "90% of the pairs have equal scores"),
    "worse than words": (
        "baselines.tfidf.advantage",
        {"interval": [-0.2, -0.1]},
        "not fit",
        "a simple rule is better",
    ),
    "like words": ("baselines.tfidf.advantage", {"interval": [-0.1, 0.1]}, "use with care", "cannot be told"),
    "counts tokens": ("length.pairs", {"value": -0.95}, "not fit", "counts tokens"),
    "likes length": ("length.pairs", {"value": 0.6}, "use with care", "length pays"),
    "length only": ("length.controlled.balanced", {"interval": [0.45, 0.6]}, "use with care", "length does not help"),
    "not calibrated": ("calibration.ece", {"value": 0.2}, "use with care", "scores divided by 1.1 fit best"),
    "prompt not read": ("probes.prompt_swap", {"same": 1.0}, "not fit", "does not depend on the prompt"),
    "prompt hardly counts": ("probes.prompt_swap", {"absolute": 0.05}, "use with care", "prompt hardly counts"),
    "prompt does not fit": (
        "probes.prompt_swap",
        {"interval": [-0.1, 0.2]},
        "use with care",
        "no better than another",
    ),
    "repetition": ("probes.repetition", {"in_std": 0.4, "interval": [0.1, 0.3]}, "use with care", "twice pays"),
    "truncation": ("probes.truncation", {"in_std": 0.1, "interval": [0.1, 0.3]}, "use with care", "half-way pays"),
    "thanks": ("probes.politeness", {"in_std": -0.6}, "use with care", "say nothing"),
    "by heart": ("train_gap", {"value": 0.2, "interval": [0.1, 0.3]}, "use with care", "by heart"),
    "same samples": ("spread", {"std_ratio": 0.1}, "use with care", "much the same"),
    "far samples": ("spread", {"shift": -3.0}, "use with care", "not what the model was made for"),
    "bad choice": ("best_of_n.gain", {"interval": [-0.6, -0.4]}, "not fit", "is worse"),
    "no choice": ("best_of_n.gain", {"interval": [-0.1, 0.4]}, "use with care", "may not be better"),
    "over-optimised": ("best_of_n.drop", {"interval": [-0.2, -0.1]}, "use with care", "choosing harder"),
}


class TestJudge:
    def test_numbers(self):
        result = judge(GOOD)
        assert result["verdict"] == "fit for PPO"
        assert {reason["level"] for reason in result["reasons"]} == {"good"}
        assert result["not_checked"] == []
        for path, value, verdict, text in BAD.values():
            result = judge(changed(path, value))
            assert result["verdict"] == verdict, text
            assert text in result["reasons"][0]["text"]
            assert result["not_checked"] == []
            assert sum(reason["level"] != "good" for reason in result["reasons"]) == 1

    def test_a_constant_model(self):
        measures = {"scores": {"not_finite": 0, "n": 10, "constant": True, "all": {"mean": 0.25}}}
        result = judge(measures)
        assert result["verdict"] == "not fit"
        assert [reason["text"] for reason in result["reasons"]] == [
            "All 10 scores are 0.25: the reward model is constant."
        ]

    def test_the_worst_reason_decides_and_comes_first(self):
        measures = changed("probes.prompt_swap", {"same": 1.0})
        measures["accuracy"]["value"] = 0.58
        levels = [reason["level"] for reason in judge(measures)["reasons"]]
        assert levels[:2] == ["not fit", "care"]
        assert set(levels[2:]) == {"good"}

    def test_calibration_that_chance_explains_is_no_reason(self):
        measures = changed("calibration.ece", {"value": 0.2})
        measures["calibration"]["ece_if_calibrated"]["high"] = 0.25
        assert judge(measures)["verdict"] == "fit for PPO"

    def test_what_is_missing_is_named(self):
        measures = {name: part for name, part in GOOD.items() if name not in ("spread", "best_of_n", "train_gap")}
        measures["baselines"] = {"longer": GOOD["baselines"]["longer"]}
        result = judge(measures)
        assert result["verdict"] == "fit for PPO"
        assert len(result["not_checked"]) == 5
        assert result["not_checked"] == [r["text"] for r in result["reasons"] if r["level"] == "not checked"]

    def test_one_prompt_says_nothing_of_others(self):
        result = judge(changed("accuracy", {"prompts": 1}))
        assert result["verdict"] == "fit for PPO"
        assert result["not_checked"] == [
            "other prompts: all pairs have the same prompt, and what is measured holds for no others"
        ]
        assert "have 9 different prompts" in judge(changed("accuracy", {"prompts": 9}))["not_checked"][0]
        assert judge(changed("accuracy", {"prompts": 10}))["not_checked"] == []

    def test_what_the_rows_cannot_tell_does_not_pass(self):
        for path, value in {
            "train_gap": {"value": 0.2, "interval": [-0.1, 0.5]},
            "probes.repetition": {"in_std": 0.4, "interval": [-0.1, 0.9]},
        }.items():
            result = judge(changed(path, value))
            assert result["verdict"] == "fit for PPO"
            assert [text for text in result["not_checked"] if "the interval holds 0" in text], path


# The intervals that each rule rests on, by the measure that its reason names.
EVIDENCE = {
    "accuracy": ("accuracy",),
    "baselines": ("baselines.tfidf.advantage",),
    "length": ("length.pairs",),
    "calibration": ("calibration.ece",),
    "prompt": ("probes.prompt_swap",),
    "repetition": ("probes.repetition",),
    "truncation": ("probes.truncation",),
    "politeness": ("probes.politeness",),
    "gap": ("train_gap",),
    "samples": ("spread.intervals.shift", "spread.intervals.std_ratio"),
    "best of n": ("best_of_n.gain", "best_of_n.drop"),
}
PATHS = [*(path for paths in EVIDENCE.values() for path in paths), "length.controlled.balanced"]
BROKEN = {
    "no interval": lambda part: part | {"interval": None},
    "no key": lambda part: {name: value for name, value in part.items() if name != "interval"},
    "an end that is nan": lambda part: part | {"interval": [math.nan, 1.0]},
    "nothing": lambda part: None,
}


def without(kinds):
    """The good measures, with what `kinds` says of the part at each path."""
    measures = copy.deepcopy(GOOD)
    for path, kind in kinds.items():
        *parents, last = path.split(".")
        part = measures
        for name in parents:
            part = part[name]
        part[last] = BROKEN[kind](part[last])
    return measures


class TestNoEvidence:
    @given(st.dictionaries(st.sampled_from(PATHS), st.sampled_from(sorted(BROKEN))))
    def test_no_rule_passes_without_its_interval(self, kinds):
        result = judge(without(kinds))
        passed = {reason["measure"] for reason in result["reasons"] if reason["level"] == "good"}
        assert passed == {measure for measure, paths in EVIDENCE.items() if kinds.keys().isdisjoint(paths)}
        assert {reason["level"] for reason in result["reasons"]} <= {"good", "care", "not checked"}
        assert bool(result["not_checked"]) == bool(kinds)
        few = kinds.get("accuracy") == "nothing"  # then the number of pairs is not known either
        assert ("care" in {reason["level"] for reason in result["reasons"]}) == few
        assert result["verdict"] == ("not fit" if "accuracy" in kinds else "fit for PPO")

    @pytest.mark.parametrize("path", [path for path in PATHS if path != "spread.intervals.std_ratio"])
    @pytest.mark.parametrize("value", [-5.0, 5.0, 0.0])
    def test_whatever_the_value_is(self, path, value):
        result = judge(changed(path, {"value": value, "interval": None}))
        measure = next((name for name, paths in EVIDENCE.items() if path in paths), "balanced length")
        [reason] = [reason for reason in result["reasons"] if reason["measure"] == measure]
        assert reason["level"] == "not checked"
        assert "no interval" in reason["text"]

    def test_parts_that_are_missing(self):
        for name in GOOD.keys() - {"scores"}:
            for measures in (GOOD | {name: None}, {key: part for key, part in GOOD.items() if key != name}):
                result = judge(measures)
                assert result["not_checked"] or name == "equal_scores"
        nothing = judge({"scores": GOOD["scores"]})
        assert nothing["verdict"] == "not fit"
        assert {reason["level"] for reason in nothing["reasons"]} == {"not checked", "care"}


class TestThresholds:
    @pytest.mark.parametrize("field", [field.name for field in fields(Thresholds)])
    def test_every_line_is_explained(self, field):
        assert f"\n        {field}: " in Thresholds.__doc__
        assert getattr(LINES, field) == getattr(Thresholds(), field)
