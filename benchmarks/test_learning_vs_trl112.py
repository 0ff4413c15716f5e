"""The learning benchmark: its reward rule and statistics, and one update of each side."""

import pytest
import torch
from learning_curves import curve
from learning_report import at_kl, interval, summarise, text, verdict
from learning_vs_trl112 import CACHE, HERE, WORKERS, parse, train
from learning_world import PraiseModel, Settings, make_world, praise_share

SMALL = Settings(
    updates=1,
    batch=8,
    minibatches=2,
    epochs=2,
    completion_length=6,
    evaluate_every=1,
    held_out=16,
    hidden_size=64,
    layers=1,
    reviews=128,
)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    folder = tmp_path_factory.mktemp("world")
    make_world(folder, SMALL)
    return folder


def test_the_reward_model_of_trl112_follows_the_reward_rule():
    praise, pad = {3, 4}, 0
    completions = [[3, 5, 4, 1], [5, 5, 1], [4]]
    model = PraiseModel(praise, vocabulary=6, prompt_length=2, scale=10.0)
    ids = torch.tensor([[pad, 3, *row, *[pad] * (4 - len(row))] for row in completions])  # praise in the prompt
    scores = model.score(model.backbone(ids, attention_mask=ids != pad).hidden_states[-1])[:, :, 0]
    for row, found in zip(completions, scores, strict=True):
        assert found[1 + len(row)].item() == pytest.approx(10.0 * praise_share(row, praise))
    assert [praise_share(row, praise) for row in completions] == [0.5, 0.0, 1.0]


def test_interval_is_welchs():
    difference, low, high = interval([1.0, 2.0, 3.0], [2.0, 4.0, 6.0])
    # Standard error sqrt(1/3 + 4/3); degrees of freedom (5/3)^2 / ((1/3)^2/2 + (4/3)^2/2) = 50/17; t = 3.2182
    assert difference == -2.0
    assert (high - low) / 2 == pytest.approx(3.2182 * (5 / 3) ** 0.5, rel=1e-3)


def test_scores_at_equal_kl():
    rows = [{"kl": 0.0, "score": 1.0}, {"kl": 4.0, "score": 3.0}, {"kl": 3.0, "score": 9.0}, {"kl": 8.0, "score": 5.0}]
    assert at_kl(rows, [2.0, 6.0]).tolist() == pytest.approx([2.0, 7.0])


def test_runs_of_other_settings_are_not_mixed(world):
    with pytest.raises(ValueError, match="other learning_rate"):
        make_world(world, Settings(**{**vars(SMALL), "learning_rate": 1.0}))


def test_settings_from_the_command_line():
    given, settings = parse(["--seeds", "1", "2", "--gae_lambda", "1", "--whiten_rewards", "true"])
    assert (given.seeds, settings.gae_lambda, settings.whiten_rewards) == ([1, 2], 1.0, True)


def test_one_update_of_this_project(world):
    import ppo_worker

    ppo_worker.train(world, 1)
    before, after = curve(world, "ours_1")
    assert before["kl"] == 0.0
    assert after["kl"] > 0.0
    curves = {side: {1: [before, after]} for side in WORKERS}
    assert "no intervals" in text(curves, summarise(curves))


def test_a_difference_beyond_the_seeds_is_named():
    def run(gain, noise):
        return [{"update": n, "score": 1.0 + gain * n + noise * n, "kl": 2.0 * n} for n in range(4)]

    noises = {1: -0.02, 2: 0.0, 3: 0.01}
    curves = {"ours": {seed: run(1.0, noise) for seed, noise in noises.items()}}
    curves["trl112"] = {seed: run(1.0, -noise) for seed, noise in noises.items()}
    assert "differ no more than the seeds" in verdict(summarise(curves))
    curves["trl112"] = {seed: run(0.5, -noise) for seed, noise in noises.items()}
    found = verdict(summarise(curves))
    assert "Beyond the seeds: score, mean over the run, score at the end, score, mean over equal KL." in found
    assert "Of 12 intervals by update and by KL, 9 leave out 0" in found  # the KL is the same in all


@pytest.mark.slow
def test_one_update_of_trl112(world):
    python = CACHE / "bin" / "python"
    if not python.exists():
        pytest.skip(f"needs the environment in {CACHE}: python {HERE / 'learning_vs_trl112.py'} makes it")
    train("trl112", 1, world, python)
    before, after = curve(world, "trl112_1")
    assert before["kl"] == 0.0
    assert after["kl"] > 0.0
    assert (world / "runs" / "trl112_1" / "run.json").exists()
