"""Agreement with people, against tables counted by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import binomtest, spearmanr
from sklearn.metrics import cohen_kappa_score

from rlhf_recipes.statistics.agreement import grade_agreement, human_agreement, krippendorff_alpha, people_agreement
from rlhf_recipes.statistics.metrics import proportion_interval


def test_numbers():
    """20 yes/yes, 5 yes/no, 10 no/yes, 15 no/no: kappa 0.4, the example of many textbooks; and two ties."""
    outcomes = [1.0] * 25 + [0.0] * 25
    human = [1.0] * 20 + [0.0] * 5 + [1.0] * 10 + [0.0] * 15
    found = human_agreement(outcomes, human)
    assert (found["accuracy"], found["kappa"], found["pairs"], found["ties"]) == (0.7, pytest.approx(0.4), 50, 0.0)
    assert found["accuracy_ci"] == list(proportion_interval(35, 50))
    tied = human_agreement([*outcomes, 0.5, 1.0], [*human, 1.0, 0.5])
    assert tied["accuracy"] == pytest.approx(35.5 / 51)
    assert tied["accuracy_ci"] == list(proportion_interval(35, 50))
    assert tied["ties"] == pytest.approx(1 / 52)


def test_probabilities_count_as_the_side_they_lean_to():
    assert human_agreement([0.9, 0.2, 0.5], [1, 0, 1]) == human_agreement([1, 0, 0.5], [0.6, 0.1, 0.7])


def test_without_a_decision_there_is_no_number():
    found = human_agreement([1.0, 0.0], [0.5, 0.5])
    assert math.isnan(found["accuracy"])
    assert math.isnan(human_agreement([1.0], [1.0])["kappa"])


@given(st.lists(st.tuples(*[st.sampled_from([0.0, 0.5, 1.0])] * 2), min_size=2, max_size=20))
def test_swapping_the_sides_changes_nothing(rows):
    ours, theirs = np.array(rows).T
    one, other = human_agreement(ours, theirs), human_agreement(1 - ours, 1 - theirs)
    for name in ("accuracy", "kappa", "ties"):
        assert one[name] == pytest.approx(other[name], nan_ok=True)


@pytest.mark.parametrize(
    ("ours", "theirs", "message"),
    [
        ([1.0], [1.0, 0.0], "one outcome per pair"),
        ([], [], "one outcome"),
        ([2.0], [1.0], r"`outcomes` must lie in \[0, 1\], got 2 in row 0"),
        ([1.0, 1.0], [1.0, 4.0], r"`human` must lie in \[0, 1\], got 4 in row 1.*`grade_agreement`"),
        ([1.0, "0"], [1.0, 0.0], "`outcomes` must hold one finite number per row, got '0' in row 1"),
        (["1", "0"], [1.0, 0.0], "got '1' in row 0"),
        (np.array(["1", "0"]), [1.0, 0.0], "got '1' in row 0"),
        ([1.0, 0.0], [1.0, None], "`human` must hold one finite number per row, got None in row 1"),
        ([1.0, 0.0], [1.0, math.nan], "got nan in row 1"),
    ],
)
def test_errors(ours, theirs, message):
    with pytest.raises(ValueError, match=message):
        human_agreement(ours, theirs)


class TestGradeAgreement:
    @given(st.lists(st.tuples(*[st.integers(1, 12)] * 2), min_size=2, max_size=30))
    def test_is_the_weighted_kappa_of_numbers(self, rows):
        ours, theirs = np.array(rows).T
        found = grade_agreement(ours, theirs)
        if len({*ours, *theirs}) > 1:
            expected = cohen_kappa_score(ours, theirs, weights="quadratic", labels=range(1, 13))
            assert found["kappa"] == pytest.approx(expected, abs=1e-12)
        if len(set(ours)) > 1 < len(set(theirs)):
            assert found["spearman"] == pytest.approx(spearmanr(ours, theirs).statistic, abs=1e-12)

    def test_ten_is_above_nine(self):
        # As texts 10 is next to 1, and a judge that swaps 9 and 10 would look as wrong as one that swaps 1 and 10.
        close, far = grade_agreement([9, 10, 1], [10, 9, 1]), grade_agreement([9, 1, 10], [9, 10, 1])
        assert close["kappa"] == pytest.approx(1 - (2 / 3) / (2 * np.var([1, 9, 10])))
        assert close["kappa"] > 0.9 > 0 > far["kappa"]

    def test_shifted_grades(self):
        found = grade_agreement([2.5, 3.5, 5.5], [2.0, 3.0, 5.0])
        assert (found["spearman"], found["exact"], found["difference"], found["rows"]) == (
            pytest.approx(1),
            0.0,
            0.5,
            3,
        )
        assert found["kappa"] < 1

    def test_one_grade_says_nothing(self):
        found = grade_agreement([3, 3], [3, 3])
        assert math.isnan(found["kappa"])
        assert math.isnan(found["spearman"])

    @pytest.mark.parametrize(
        ("ours", "theirs", "message"),
        [
            (["9", "10"], [9, 10], "`grades` must hold one finite number per row, got '9' in row 0"),
            ([9, 10], [9, "10"], "`human` must hold one finite number per row, got '10' in row 1"),
            ([9, math.inf], [9, 10], "got inf in row 1"),
            ([9], [9, 10], "one grade per row"),
            ([], [], "one grade per row"),
        ],
    )
    def test_errors(self, ours, theirs, message):
        with pytest.raises(ValueError, match=message):
            grade_agreement(ours, theirs)


# Krippendorff, Computing Krippendorff's Alpha-Reliability (2011): four observers, twelve units, five values.
OBSERVED = ["123321412...", "1233224125.3", ".3332342251.", "12332441251."]


def observed():
    cells = [(int(value), unit) for row in OBSERVED for unit, value in enumerate(row) if value != "."]
    values, units = zip(*cells, strict=True)
    return values, units


def test_alpha_of_a_published_example():
    values, units = observed()
    assert round(krippendorff_alpha(values, units), 3) == 0.743
    assert round(krippendorff_alpha(values, units, interval=True), 3) == 0.849
    named = [f"unit {unit}" for unit in units]
    assert krippendorff_alpha(values[::-1], named[::-1]) == pytest.approx(krippendorff_alpha(values, units))


def test_alpha_is_one_less_the_mean_difference_within_units_over_that_of_all():
    rng = np.random.default_rng(3)
    values, units = rng.integers(0, 4, 60).astype(float), rng.integers(0, 20, 60)
    paired = [index for index in range(60) if (units == units[index]).sum() > 1]
    for interval in (False, True):

        def difference(one, other, interval=interval):
            return (values[one] - values[other]) ** 2 if interval else float(values[one] != values[other])

        within, weights = 0.0, 0.0
        for one in paired:
            others = [other for other in paired if other != one and units[other] == units[one]]
            within += sum(difference(one, other) for other in others) / len(others)
            weights += 1
        between = [difference(one, other) for one in paired for other in paired if one != other]
        expected = 1 - (within / weights) / np.mean(between)
        assert krippendorff_alpha(values, units, interval=interval) == pytest.approx(expected)


def test_alpha_needs_units_that_several_judged_and_two_values():
    assert math.isnan(krippendorff_alpha([], []))
    assert math.isnan(krippendorff_alpha([1, 0], ["a", "b"]))
    assert math.isnan(krippendorff_alpha([1, 1, 0], ["a", "a", "b"]))
    assert krippendorff_alpha([1, 1, 0, 0], ["a", "a", "b", "b"]) == 1.0
    assert krippendorff_alpha([1, 0, 1, 0], ["a", "a", "b", "b"]) == pytest.approx(-0.5)
    with pytest.raises(ValueError, match=r"shapes \(1,\) and \(2,\)"):
        krippendorff_alpha([1, 0], ["a"])
    with pytest.raises(ValueError, match="got 'x' in row 0"):
        krippendorff_alpha(["x"], ["a"])


def test_beside_length_by_hand():
    # Rows: right and longer, right and shorter, wrong and longer, undecided judge and equal lengths, a tie of people.
    labels = [0.9, 0.2, 0.4, 0.5, 0.9]
    human = [1.0, 0.0, 0.8, 1.0, 0.5]
    pairs = [("long", "s"), ("long", "s"), ("long ", " s"), ("ab", "cd"), ("a", "b")]
    found = people_agreement(labels, human, pairs)
    assert (found["pairs"], found["ties"]) == (4, 1)
    assert found["judge"]["accuracy"] == (1 + 1 + 0 + 0.5) / 4
    assert found["longer"]["accuracy"] == (1 + 0 + 1 + 0.5) / 4
    assert found["shorter"]["accuracy"] == (0 + 1 + 0 + 0.5) / 4
    assert found["over_length"] == 0.0
    low, high = found["over_length_ci"]
    assert low < 0 < high
    assert found["chance_p_value"] == pytest.approx(binomtest(2, 3).pvalue)
    turned = people_agreement([0.1, *labels[1:]], [0.0, *human[1:]], [("s", "long"), *pairs[1:]])
    assert turned == found, "which completion comes first does not matter"
    # All pairs in both orders: 4 of 10 agree on a side, and by chance 2 ties x 2 ties + 2 x 4 x 4 of 100 would.
    assert found["kappa"] == pytest.approx((0.4 - 0.36) / (1 - 0.36))
    better = people_agreement([0.9, 0.1], [1.0, 0.0], [("a", "bb"), ("a", "bb")])
    assert (better["judge"]["accuracy"], better["shorter"]["accuracy"], better["over_length"]) == (1.0, 0.5, 0.5)


def test_an_always_longer_judge_has_nothing_over_length():
    pairs = [("a" * (1 + number % 5), "b" * (1 + number * 3 % 7)) for number in range(60)]
    longer = [0.5 + 0.4 * ((len(a) > len(b)) - (len(a) < len(b))) for a, b in pairs]
    human = [float(number % 3 > 0) for number in range(60)]
    found = people_agreement(longer, human, pairs)
    assert found["judge"] == found["longer"]
    assert found["judge"]["accuracy_ci"][0] < found["judge"]["accuracy"] < found["judge"]["accuracy_ci"][1]


def test_labels_that_cannot_be_compared_with_people():
    with pytest.raises(ValueError, match="2 labels and 1 pairs"):
        people_agreement([0.1, 0.2], [1.0, 0.0], [("a", "b")])
    with pytest.raises(ValueError, match="decided none of the 1 pairs"):
        people_agreement([0.1], [0.5], [("a", "b")])
    with pytest.raises(ValueError, match=r"must lie in \[0, 1\]"):
        people_agreement([1.1], [1.0], [("a", "b")])
