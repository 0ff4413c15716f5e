"""When there is evidence, and how it is said."""

import math

from rlhf_recipes.tools.certificate.functional.reasons import known_interval, stated, unchecked, undecided


class TestKnownInterval:
    def test_what_is_known(self):
        assert known_interval({"value": 0.5, "interval": [0.4, 0.6]}) == [0.4, 0.6]
        nothing = [None, {}, {"value": 0.5}, {"interval": [0.4, 0.6]}, {"value": 0.5, "interval": None}]
        nothing += [{"value": value, "interval": [0.4, 0.6]} for value in (None, math.nan, math.inf)]
        nothing += [{"value": 0.5, "interval": ends} for ends in ([0.4, None], [math.nan, 0.6], [-math.inf, 0.6])]
        assert [known_interval(summary) for summary in nothing] == [None] * len(nothing)


class TestStated:
    def test_texts(self):
        assert stated({"value": 0.5, "interval": [0.4, 0.6]}) == "0.500 [0.400, 0.600]"
        assert stated({"value": 0.5, "interval": [-0.4, 0.6]}, signed=True) == "+0.500 [-0.400, +0.600]"
        assert stated({"value": 0.5, "interval": None}) == "0.500"
        assert stated({}) == "not known"


def test_neither_passes():
    assert unchecked("gap", "It is 1").level == undecided("gap", "It is 1").level == "not checked"
    assert unchecked("gap", "It is 1").measure == undecided("gap", "It is 1").measure == "gap"
