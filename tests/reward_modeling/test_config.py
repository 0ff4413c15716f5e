"""Settings of a reward model that contradict each other are refused, with the fields and the fix."""

import pytest
from trl import RewardConfig

from rlhf_recipes.reward_modeling import PreferenceConfig


def make(**fields):
    return PreferenceConfig(use_cpu=True, bf16=False, **fields)


def test_the_defaults_are_those_of_trl():
    assert make().is_plain
    own = {"objective", "readout", "ties", "label_noise", "margin_use", "token_loss", "normalize_head"}
    ours, theirs = make().to_dict(), RewardConfig(use_cpu=True, bf16=False).to_dict()
    changed = {name for name in theirs if ours[name] != theirs[name]} - {"output_dir", "logging_dir", "run_name"}
    assert (ours.keys() - theirs.keys(), changed) == (own, set())


def test_a_padding_token_is_kept_without_a_word(recwarn):
    assert make(pad_token="<pad>").pad_token == "<pad>"
    assert not [str(one.message) for one in recwarn if "pad_token" in str(one.message)]


@pytest.mark.parametrize(
    "fields", [{"objective": "ranking"}, {"readout": "sum"}, {"label_noise": 0.1}, {"margin_use": "scale"}]
)
def test_what_trl_does_not_know_is_not_plain(fields):
    assert not make(**fields).is_plain


@pytest.mark.parametrize(
    "fields",
    [
        {"objective": "ranking", "label_noise": 0.1, "ties": "drop", "center_rewards_coefficient": 0.01},
        {"objective": "pairwise", "margin_use": "ignore", "readout": "mean"},
        {"objective": "token", "token_loss": "bce", "readout": "sum"},
        {"objective": "regression", "center_rewards_coefficient": 0.0},
    ],
)
def test_what_fits_together_passes(fields):
    make(**fields)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"label_noise": 1.0}, "`label_noise` must lie in"),
        ({"label_noise": -0.1}, "`label_noise` must lie in"),
        ({"center_rewards_coefficient": -1.0}, "`center_rewards_coefficient` must not be negative"),
        ({"objective": "best_of_k", "label_noise": 0.1}, "`label_noise` is for `objective: pairwise` and"),
        ({"objective": "plackett_luce", "ties": "drop"}, "`ties` is for .*'plackett_luce'.*Remove `ties`, or change"),
        ({"objective": "ranking", "margin_use": "scale"}, "`margin_use` is for `objective: pairwise`, but"),
        ({"token_loss": "bce"}, "`token_loss` is for `objective: token`, but `objective` is 'pairwise'"),
        ({"objective": "regression", "center_rewards_coefficient": 0.1}, "`center_rewards_coefficient` is for"),
        ({"objective": "token", "center_rewards_coefficient": 0.1}, "`center_rewards_coefficient` is for"),
        ({"objective": "regression", "normalize_head": True}, "`normalize_head` is for"),
        ({"readout": "mean", "normalize_head": True}, "`normalize_head` measures scores at the last token, but"),
    ],
)
def test_contradictions_are_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        make(**fields)
