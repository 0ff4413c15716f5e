"""The best-of-n curve of the reference, against the maximum over all subsets of its samples."""

import itertools
from statistics import fmean

import pytest

from rlhf_recipes.tools.best_of_n import best_of_n_curve


def test_the_curve_is_the_mean_best_over_all_subsets(make_trainer, reward_adapter, prompts):
    seen = []

    def gold(completion_ids, **kwargs):
        seen.extend(completion_ids)
        return [float(len(ids)) for ids in completion_ids]

    trainer = make_trainer(reward_funcs=[gold], critic_init="policy")
    curve = best_of_n_curve(trainer, prompts, gold="gold", prompts=4, n=4)
    assert (curve["prompts"], [row["n"] for row in curve["curve"]]) == (4, [1, 2, 3, 4])
    lengths = [[len(ids) for ids in seen[4 * prompt : 4 * prompt + 4]] for prompt in range(4)]
    for row in curve["curve"]:
        best = fmean(fmean(max(subset) for subset in itertools.combinations(one, row["n"])) for one in lengths)
        assert row["gold"]["value"] == row["proxy"]["value"] == pytest.approx(best)
    assert trainer.model.training


def test_errors(make_trainer, prompts):
    trainer = make_trainer()
    with pytest.raises(ValueError, match="No reward function is named 'x'"):
        best_of_n_curve(trainer, prompts, gold="x")
    with pytest.raises(ValueError, match="two samples of each, got 16 rows, prompts=32 and n=1"):
        best_of_n_curve(trainer, prompts, n=1)
