"""The report of the learning-per-token benchmark, by hand."""

import per_token_report as report
import pytest


def run(*points):
    return [
        {"tokens": tokens, "seconds": tokens / 10, "kl": kl, "gold": gold, "reward": 1.0, "length": 5.0}
        for tokens, kl, gold in points
    ]


def test_gold_at_a_kl_is_the_best_within_it():
    rows = run((0, 0.0, 0.0), (100, 3.0, 1.0), (200, 2.0, 2.0), (300, 4.0, 3.0))
    assert report.gold_at(rows, "kl", 2.5) == 2.0
    assert report.gold_at(rows, "kl", 1.9) == 0.0
    assert report.gold_at(rows, "kl", 4.0) == 3.0


def test_gold_at_tokens_and_seconds_is_between_two_evaluations():
    rows = run((0, 0.0, 0.0), (100, 1.0, 1.0), (200, 2.0, 3.0))
    assert report.gold_at(rows, "tokens", 150) == 2.0
    assert report.gold_at(rows, "seconds", 5.0) == 0.5


def test_methods_are_compared_where_all_of_them_came():
    curves = {"ppo_head": [run((0, 0.0, 0.0), (100, 2.0, 1.0))], "rloo": [run((0, 0.0, 0.5), (80, 3.0, 1.5))]}
    found = report.summarise(curves, [2, 4], 0.1)
    assert found["where"] == {"tokens": 80, "seconds": 8.0}
    assert found["methods"]["ppo_head"]["gold at equal tokens"][0] == 0.8
    assert found["methods"]["rloo"]["gold within 2 nats"][0] == 0.5
    assert found["methods"]["rloo"]["gold within 4 nats"][0] == 1.5
    assert found["methods"]["rloo"]["final gold"][0] == 1.5
    assert found["methods"]["rloo"]["final objective"][0] == pytest.approx(1.0 - 0.1 * 3.0)


def test_intervals_are_students():
    mean, half = report.interval([1.0, 2.0, 3.0])
    assert (mean, half) == (2.0, pytest.approx(4.302653 / 3**0.5, rel=1e-6))
    assert report.interval([1.0])[0] == 1.0


def test_the_table_and_the_files(tmp_path):
    curves = {
        "ppo_adapter": [run((0, 0.0, 0.0), (100, 2.0, 1.0)), run((0, 0.0, 0.0), (100, 2.0, 3.0))],
        "grpo": [run((0, 0.0, 0.0), (100, 2.0, 1.0)), run((0, 0.0, 0.0), (100, 2.0, 1.0))],
    }
    lines = report.write(tmp_path, curves, {"ppo_adapter": "3e-4", "grpo": "1e-4"}, [1], 0.1).splitlines()
    cells = [cell.strip() for cell in lines[3].split("|")]
    assert cells[1:3] == ["PPO here, adapter", "3e-4"]
    assert cells[lines[1].split("|").index(" final gold ")] == "2.00 ± 12.71"
    assert (tmp_path / "result.json").exists()
