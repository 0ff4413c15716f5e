import math
from collections import Counter

import pytest

from rlhf_recipes.reward_modeling.bootstrap import bootstrap_count, member_rows


def rows(prompts, label=1.0):
    return [{"prompt": prompt, "completions": [" yes", " no"], "label": label} for prompt in prompts]


class TestBootstrapCount:
    def test_is_poissons_with_mean_1(self):
        number = 6_000
        counts = Counter(bootstrap_count(f"prompt {index}", member=0) for index in range(number))
        for value in range(5):
            share = math.exp(-1) / math.factorial(value)
            assert abs(counts[value] / number - share) < 4 * math.sqrt(share * (1 - share) / number), value

    def test_depends_on_key_member_and_seed_alone(self):
        keys = [f"prompt {index}" for index in range(200)]
        first = [bootstrap_count(key, 0) for key in keys]
        assert first == [bootstrap_count(key, 0) for key in keys]
        assert first != [bootstrap_count(key, 1) for key in keys]
        assert first != [bootstrap_count(key, 0, seed=1) for key in keys]


class TestMemberRows:
    def test_rows_that_come_later_change_no_part_of_those_before(self):
        early, later = rows(f"a{index}" for index in range(60)), rows(f"b{index}" for index in range(60))
        train, held_out = member_rows(early, member=1)
        more, more_held_out = member_rows(early + later, member=1)
        assert more[: len(train)] == train
        assert more_held_out[: len(held_out)] == held_out
        assert not {row["prompt"] for row in more} & {row["prompt"] for row in more_held_out}
        assert {row["prompt"] for row in more + more_held_out} == {row["prompt"] for row in early + later}

    def test_rows_of_a_prompt_stay_together(self):
        pairs = rows(["same"] * 5 + [f"a{index}" for index in range(40)])
        for member in range(6):
            train, held_out = member_rows(pairs, member)
            copies = sum(row["prompt"] == "same" for row in train)
            assert copies % 5 == 0
            assert sum(row["prompt"] == "same" for row in held_out) == (0 if copies else 5)

    def test_too_few_labels_are_refused(self):
        with pytest.raises(ValueError, match="Label more pairs in the first round"):
            member_rows(rows("ab", label=0.5), member=0)
