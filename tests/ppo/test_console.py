"""What PPO prints: a line for each rollout, completions now and then, and no record of all metrics."""

import math
import re
from types import SimpleNamespace

import pytest
from transformers import TrainerControl, TrainerState

from rlhf_recipes.ppo.console import RolloutConsole
from tests.ppo.support import logged

TITLES = ["step", "reward", "gold", "KL", "length", "expl. var.", "tokens/s", "time left"]


def length_judge(completion_ids, **kwargs):
    return [float(len(ids)) for ids in completion_ids]


def rows_of(text):
    """The rows below a header, by its titles."""
    lines = [re.split(" {2,}", line.strip()) for line in text.splitlines()]
    header = next(line for line in lines if line[0] == "step")
    return [dict(zip(header, line, strict=True)) for line in lines if re.fullmatch(r"\d+/\d+", line[0])]


@pytest.mark.parametrize("logging_steps", [1, 4, 8])
def test_each_rollout_has_a_line_however_often_is_logged(make_trainer, reward_adapter, capsys, logging_steps):
    trainer = make_trainer(
        [str(reward_adapter), length_judge],
        reward_weights=[1.0, 0.0],
        steps_per_generation=4,  # two optimizer steps, twice
        max_steps=8,
        logging_steps=logging_steps,
    )
    capsys.readouterr()
    trainer.train()
    out, err = capsys.readouterr()
    rows = rows_of(out)
    assert [row["step"] for row in rows] == ["4/8", "8/8"]
    assert list(rows[0]) == TITLES
    assert "{" not in out
    assert "\r" not in out + err
    if logging_steps == 4:  # each entry of the history is of one rollout
        columns = {"reward": "reward", "gold": "rewards/length_judge/mean", "KL": "kl"}
        columns |= {"length": "completions/mean_length", "expl. var.": "critic/explained_variance"}
        for title, key in columns.items():
            kept = [value for entry in trainer.state.log_history if (value := entry.get(key)) is not None]
            assert [float(row[title]) for row in rows] == pytest.approx(kept, abs=0.051 if title == "length" else 6e-3)
    assert all(float(row["tokens/s"].replace(",", "")) > 0 for row in rows)


def test_without_a_judge_there_is_no_gold(make_trainer, capsys):
    make_trainer(max_steps=2, per_device_train_batch_size=8).train()
    (row, *_) = rows_of(capsys.readouterr().out)
    assert list(row) == [title for title in TITLES if title != "gold"]


def test_a_line_fits_into_80_columns(make_trainer, reward_adapter, capsys):
    trainer = make_trainer([str(reward_adapter), length_judge], reward_weights=[1.0, 0.0])
    console, state = RolloutConsole(trainer), TrainerState(max_steps=10_000, is_world_process_zero=True)
    console.on_train_begin(trainer.args, state, TrainerControl())
    trainer.last_rollout = dict.fromkeys(("reward", "rewards/length_judge/mean", "kl"), -123.456)
    trainer.last_rollout |= {"completions/mean_length": 1024.0, "critic/explained_variance": -12.34}
    state.global_step, state.num_input_tokens_seen = 9_996, 10**9
    console.on_step_end(trainer.args, state, TrainerControl())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert len(lines[0]) <= 80


@pytest.fixture
def console_of(make_config, monkeypatch):
    """A console on a trainer that has made a rollout of given texts; it is told that a step has ended."""

    def make(prompts, completions, columns=60, **fields):
        monkeypatch.setenv("COLUMNS", str(columns))
        rewards = {"reward": [0.5 + n for n in range(len(prompts))], "judge": [math.nan] * len(prompts)}
        trainer = SimpleNamespace(
            args=make_config(gradient_accumulation_steps=1, num_iterations=1, **fields),
            reward_func_names=list(rewards),
            reward_weights=SimpleNamespace(tolist=lambda: [1.0, 0.0]),
            last_rollout={"reward": 1.0},
            _logs={"prompt": prompts, "completion": completions, "rewards": rewards},
        )
        console = RolloutConsole(trainer)
        state = TrainerState(max_steps=fields["max_steps"], is_world_process_zero=True)
        console.on_train_begin(trainer.args, state, TrainerControl())

        def end(step):
            state.global_step = step
            console.on_step_end(trainer.args, state, TrainerControl())

        return end

    return make


def test_completions_are_shown_at_the_first_rollout_and_ten_times_after(console_of, capsys):
    end = console_of(["p"], ["c"], max_steps=100, log_completions=True)
    for step in range(1, 101):
        end(step)
    shown = [int(step) for step in re.findall(r"Completions at step (\d+):", capsys.readouterr().out)]
    assert shown == [1, *range(11, 101, 10)]


def test_none_are_shown_unless_asked_for(console_of, capsys):
    console_of(["p"], ["c"], max_steps=4)(4)
    assert "Completions" not in capsys.readouterr().out


@pytest.mark.parametrize(("asked", "shown"), [({}, 2), ({"num_completions_to_print": 1}, 1)])
def test_a_few_are_shown(console_of, capsys, asked, shown):
    console_of(["p"] * 5, ["c"] * 5, max_steps=1, log_completions=True, **asked)(1)
    out = capsys.readouterr().out
    assert out.count("completion  c") == shown
    assert out.count("reward 0.50, judge none") == 1


def test_a_long_text_is_wrapped_and_cut_where_it_matters_least(console_of, capsys):
    words = " ".join(f"word{n:03}" for n in range(100))
    console_of([f"first {words} last"], [f"first {words} last"], max_steps=1, log_completions=True)(1)
    out = capsys.readouterr().out
    prompt, completion = out.split("  prompt ")[1].split("  completion ")
    assert "more lines]" in prompt.splitlines()[0]
    assert prompt.rstrip().endswith("last"), "what is gone on with"
    assert completion.split()[0] == "first"
    assert "last" not in completion
    assert max(map(len, out.split("Completions")[1].splitlines())) <= 60


def test_texts_cannot_command_the_terminal(console_of, capsys):
    chat = [{"role": "user", "content": f"Hi{chr(27)}[2J"}]
    console_of([chat], [f"c{chr(0x9B)}0m"], max_steps=1, log_completions=True)(1)
    out = capsys.readouterr().out
    assert "user: Hi\ufffd[2J" in out
    assert not {chr(27), chr(0x9B)} & set(out)


def test_evaluations_have_a_line(make_trainer, reward_adapter, capsys):
    judged = {"reward_funcs": [str(reward_adapter), length_judge], "reward_weights": [1.0, 0.0]}
    trainer = make_trainer(**judged, max_steps=2, eval_strategy="steps", eval_steps=2)
    trainer.train()
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "held-out" in line]
    names = ("reward", "rewards/length_judge/mean", "kl", "completions/mean_length", "critic/explained_variance")
    kept = [logged(trainer, f"eval_{name}")[0] for name in names]
    assert [float(cell) for cell in line.split()[1:]] == pytest.approx(kept, abs=0.051)


def test_the_hook_that_samples_has_a_line(console_of, make_trainer, reward_adapter, capsys):
    trainer = make_trainer([str(reward_adapter), length_judge], reward_weights=[1.0, 0.0])
    console, state = RolloutConsole(trainer), TrainerState(max_steps=4, is_world_process_zero=True)
    console.on_train_begin(trainer.args, state, TrainerControl())
    logs = {"eval_policy/reward_score": 4.2, "eval_policy/gold_score": 2.1, "eval_policy/kl": 3.0}
    logs |= {"eval_policy/length": 15.0, "eval_win_rate": 0.8, "eval_win_rate_low": 0.7, "eval_win_rate_high": 0.9}
    console.on_log(trainer.args, state, TrainerControl(), logs=logs)
    console.on_log(trainer.args, state, TrainerControl(), logs={"health/peak_memory_gb": 1.0})
    _, row, win = capsys.readouterr().out.splitlines()
    assert row.split() == ["held-out", "4.200", "2.100", "3.000", "15.0"]
    assert win.split("  ")[-1] == "win rate over the reference 0.800 [0.700, 0.900]"
