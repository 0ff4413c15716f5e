"""Real stages, tiny: what W&B holds offline and gets at `wandb sync`, and what TensorBoard shows."""

import json

import pytest

LINEAGE = {"recipe", "stage", "parents", "git_commit", "command", "versions", "learning_rate", "model_name_or_path"}


def test_a_run_says_where_it_belongs_and_what_it_came_from(offline, stages):
    for stage, run in offline.items():
        assert (run.run.run_group, run.run.job_type, run.run.display_name) == ("tiny", stage, f"tiny-{stage}")
        assert set(run.config) >= LINEAGE
    parents = offline["ppo"].config["parents"]
    assert parents[1]["path"] == str(stages / "reward")
    assert parents[1]["wandb_run_id"] == offline["reward"].run.run_id
    assert all("wandb_artifact" not in parent for parent in parents)
    adapters = [one for run in offline.values() for one in run.artifacts.values() if one.type != "run_table"]
    assert adapters == [], "adapters are artifacts of online runs only"


def test_every_metric_has_an_axis(offline):
    for run in offline.values():
        assert run.metrics["*"] == "train/global_step"
    for curve in ("frontier", "frontier_eval"):
        for score in ("reward", "gold"):
            assert offline["ppo"].metrics[f"{curve}/{score}"] == f"{curve}/distance"
    metrics = [row for run in offline.values() for row in run.history if any(key.startswith("train/") for key in row)]
    assert all("train/global_step" in row for row in metrics)


def test_the_frontier_is_the_logged_reward_against_the_root_of_the_logged_kl(offline):
    rows = offline["ppo"].history
    train = {row["train/global_step"]: row for row in rows if "train/kl" in row}
    frontier = {row["train/global_step"]: row for row in rows if "frontier/distance" in row}
    assert train.keys() == frontier.keys()
    for step, row in frontier.items():
        assert row["frontier/distance"] == pytest.approx(max(train[step]["train/kl"], 0) ** 0.5)
        assert row["frontier/reward"] == train[step]["train/reward"]
        assert row["frontier/gold"] == train[step]["train/rewards/gold_score/mean"]
    held_out = [row for row in rows if "frontier_eval/distance" in row]
    assert [row["train/global_step"] for row in held_out] == [2, 4]


def test_wins_and_losses_are_a_table_of_each_evaluation(offline, stages):
    lines = [json.loads(line) for line in (stages / "ppo" / "policy_evaluation.jsonl").read_text().splitlines()]
    tables = offline["ppo"].tables["eval/samples"]
    assert len(tables) == len(lines) == 2
    for table, line in zip(tables, lines, strict=True):
        assert len(table) == 128
        assert [row["prompt"] for row in table[:20]] == [row["prompt"] for row in line["samples"]]
        points = {"win": 1.0, "tie": 0.5, "loss": 0.0}
        assert sum(points[row["outcome"]] for row in table) / len(table) == pytest.approx(line["win_rate"])
        for row in table:
            difference = row["policy_gold"] - row["reference_gold"]
            assert row["outcome"] == ("tie" if difference == 0 else "win" if difference > 0 else "loss")


def test_the_last_evaluation_is_the_summary_and_a_table(offline, stages):
    evaluation = json.loads((stages / "ppo" / "evaluation.json").read_text())
    run = offline["ppo"]
    assert run.summary["evaluation/win_rate"] == evaluation["win_rate"]
    assert [run.summary[f"evaluation/win_rate_{end}"] for end in ("low", "high")] == evaluation["win_rate_ci"]
    assert run.summary["evaluation/policy/kl"] == evaluation["policy"]["kl"]
    assert [row["policy"] for row in run.tables["evaluation/samples"][0]] == [
        sample["policy"] for sample in evaluation["samples"]
    ]
    accuracy = json.loads((stages / "reward" / "evaluation.json").read_text())["accuracy"]
    assert offline["reward"].summary["evaluation/accuracy"] == accuracy


def test_an_alarm_has_its_evidence(offline, stages):
    alarms = json.loads((stages / "ppo" / "alarms.json").read_text())
    run = offline["ppo"]
    samples, ngrams = run.tables["alarm/samples"][0], run.tables["alarm/ngrams"][0]
    assert {(row["step"], row["kind"], row["message"]) for row in samples + ngrams} == {
        (alarm["step"], alarm["kind"], alarm["message"]) for alarm in alarms[:1]
    }
    assert {"prompt", "completion", "reward", "rewards/gold_score"} <= samples[0].keys()
    assert len(run.tables["completions"]) >= 4, "TRL logs its own table of completions"
    rollouts = [row["completion"] for row in run.tables["completions"][alarms[0]["step"] - 1]]
    assert {row["completion"] for row in samples} <= set(rollouts)


def test_texts_of_models_are_never_markup(stages):
    media = [path for path in stages.rglob("wandb/*/files/media/**/*") if path.is_file()]
    assert media
    assert all(path.name.endswith(".table.json") for path in media)


def test_tensorboard_has_the_metrics_of_the_stage_and_of_the_hooks(stages):
    accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    history = json.loads((stages / "ppo" / "trainer_state.json").read_text())["log_history"]
    [folder] = (stages / "ppo" / "runs").iterdir()
    events = accumulator.EventAccumulator(str(folder))
    events.Reload()
    names = {"train/ppo/policy_loss": "ppo/policy_loss", "train/kl": "kl", "eval/win_rate": "eval_win_rate"}
    names |= {"eval/policy/gold_score": "eval_policy/gold_score", "train/alarm/kl_budget": "alarm/kl_budget"}
    for name, key in names.items():
        logged = [(entry["step"], pytest.approx(entry[key])) for entry in history if key in entry]
        assert logged
        assert [(event.step, event.value) for event in events.Scalars(name)] == logged


def test_sync_sends_it_all_later(stages, offline, run_alone, server, tmp_path):
    folders = [next((stages / stage / "wandb").glob("offline-run-*")) for stage in offline]
    finished = run_alone(["-m", "wandb", "sync", *folders], tmp_path, **server.settings)
    assert finished.returncode == 0, finished.stderr
    for stage, run in offline.items():
        sent = server.files[run.run.run_id]
        keys = {key for row in run.history for key in row if key.startswith(("train/", "eval/", "frontier"))}
        received = {key for row in sent["wandb-history.jsonl"] for key in row}
        assert {key for key in keys if not key.startswith("eval/samples")} <= received
        assert received >= set(run.tables)
        summary = {key: value for key, value in run.summary.items() if key.startswith("evaluation/")}
        final = sent["wandb-summary.json"][-1]
        assert all(final[key] == value for key, value in summary.items() if isinstance(value, float))
        started = [made for made in server.sent("UpsertBucket") if made["name"] == run.run.run_id]
        assert (started[0]["groupName"], started[0]["jobType"]) == ("tiny", stage)
        config = json.loads([made["config"] for made in started if made["config"]][-1])
        assert config["stage"]["value"] == stage
        defined = {metric.get("1") for metric in config["_wandb"]["value"]["m"]}
        assert defined >= {name for name in run.metrics if name != "*"}
