"""What a stage hands over to W&B: to a run that only records calls, to an offline run, and to a server."""

import json

import pytest

from rlhf_recipes.tracking import log_outputs, read_run
from rlhf_recipes.tracking.lineage import describe_run, write_run
from rlhf_recipes.tracking.outputs import adapter_artifact, flat_numbers, use_parents
from tests.tracking.offline import facts

KEPT = [
    *("adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "reward_model.json"),
    *("tokenizer.json", "tokenizer_config.json", "critic/adapter_config.json", "critic/adapter_model.safetensors"),
]
LEFT = [
    *("training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth", "evaluation.json", "trainer_state.json"),
    *("checkpoint-4/adapter_model.safetensors", "checkpoint-4/optimizer.pt", "wandb/run/tokenizer.json"),
    *("completions/completions_00004.parquet", "critic/training_args.bin", "alarms.json", "README.md"),
]


class StubRun:
    """An online run that records what it is asked to do."""

    id, entity, project, offline, disabled = "r2", "team", "proj", False, False

    def __init__(self, error=None):
        self.summary, self.rows, self.artifacts, self.used, self.error = {}, [], [], [], error

    def log(self, row):
        self.rows.append(row)

    def log_artifact(self, artifact, aliases):
        if self.error is not None:
            raise self.error
        self.artifacts.append((artifact, aliases))

    def use_artifact(self, name):
        if self.error is not None:
            raise self.error
        self.used.append(name)


@pytest.fixture
def stage(tmp_path):
    """Folder of a finished stage with files of all kinds."""
    folder = tmp_path / "quick start" / "sft"
    for name in [*KEPT, *LEFT]:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    sample = {"prompt": "<b>", "policy": "x", "outcome": "win"}
    (folder / "evaluation.json").write_text(json.dumps({"win_rate": 0.7, "samples": [sample]}))
    write_run(folder, describe_run("quick start", "sft", ["org/model"]))
    return folder


def test_numbers_of_an_evaluation():
    record = {"a": {"b": 1, "b_ci": [0.5, 2]}, "by": "gold", "ok": True, "rows": [1, 2], "c_ci": [1], "d": None}
    assert flat_numbers(record) == {"evaluation/a/b": 1, "evaluation/a/b_low": 0.5, "evaluation/a/b_high": 2}
    assert flat_numbers({"loss": 0.25}, "x") == {"x/loss": 0.25}


def test_the_artifact_holds_weights_and_tokenizer_and_no_pickles(stage):
    artifact = adapter_artifact(stage, read_run(stage))
    assert sorted(artifact.manifest.entries) == sorted(KEPT)
    assert (artifact.type, artifact.name) == ("adapter", "quick_start-sft")
    assert artifact.metadata["stage"] == "sft"


def test_an_online_run_gets_summary_samples_and_the_adapter(stage):
    run = StubRun()
    log_outputs(run, str(stage))
    assert run.summary == {"evaluation/win_rate": 0.7}
    assert run.rows[0]["evaluation/samples"].data == [["<b>", "x", "win"]]
    [(artifact, aliases)] = run.artifacts
    assert aliases == ["latest", "r2"]
    assert read_run(stage)["wandb_artifact"] == f"team/proj/{artifact.name}:r2"


def test_the_next_stage_uses_what_its_parents_have_logged(stage, tmp_path):
    log_outputs(StubRun(), str(stage))
    parents = [str(stage), str(stage / "checkpoint-4"), "org/model"]  # the artifact has no checkpoints
    run = StubRun()
    use_parents(run, describe_run("quick start", "ppo", parents))
    assert run.used == ["team/proj/quick_start-sft:r2"]


@pytest.mark.parametrize("state", [{"offline": True}, {"disabled": True}])
def test_artifacts_are_for_online_runs(stage, state):
    run = StubRun()
    vars(run).update(state)
    log_outputs(run, str(stage))
    assert run.artifacts == []
    assert "wandb_artifact" not in read_run(stage)
    assert run.summary == {"evaluation/win_rate": 0.7}


def test_trouble_with_artifacts_stops_nothing(stage, caplog):
    run = StubRun(error=RuntimeError("no space left on the server"))
    log_outputs(run, str(stage))
    use_parents(run, {"parents": [{"path": "x", "wandb_artifact": "team/proj/a:b"}]})
    assert "wandb_artifact" not in read_run(stage)
    assert [record.getMessage() for record in caplog.records] == [
        f"The adapter in {stage} could not be logged to W&B: no space left on the server",
        "W&B did not give the parent's artifact team/proj/a:b: no space left on the server",
    ]


def test_a_process_without_a_run_does_nothing(tmp_path):
    log_outputs(None, str(tmp_path / "nowhere"))
    assert not list(tmp_path.iterdir())


def test_a_folder_without_a_record_is_named(stage):
    (stage / "run.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no run\.json: `start_run` writes it"):
        log_outputs(StubRun(), str(stage))


# Two stages that are online, and the artifact of a third that is not.
RUNS = """
import pathlib, sys, wandb
from rlhf_recipes.tracking import log_outputs, read_run, start_run
from rlhf_recipes.tracking.outputs import adapter_artifact

for stage, parents in (("sft", ["org/model"]), ("ppo", ["out/sft", "org/other"])):
    folder = pathlib.Path("out", stage)
    run = start_run(
        recipe="tiny", stage=stage, output_dir=str(folder), config={}, parent=parents, report_to=["wandb"]
    )
    (folder / "evaluation.json").write_text('{"loss": 1.0}')
    (folder / "adapter_model.safetensors").write_text(stage)
    log_outputs(run, str(folder))
    run.finish()

run = wandb.init(mode="offline", dir=".", project="p")
run.log_artifact(adapter_artifact(sys.argv[1], read_run(sys.argv[1])), aliases=["latest", run.id])
run.finish()
"""


@pytest.mark.slow
def test_stages_are_joined_on_a_server_and_the_manifest_is_kept_offline(tmp_path, stage, run_alone, server):
    finished = run_alone(["-c", RUNS, stage], tmp_path, **server.settings)
    assert finished.returncode == 0, finished.stderr
    sft, ppo = (read_run(tmp_path / "out" / stage) for stage in ("sft", "ppo"))
    made = [variables["input"] for variables in server.sent("CreateArtifact")]
    assert [(one["artifactCollectionName"], one["artifactTypeName"]) for one in made] == [
        ("tiny-sft", "adapter"),
        ("tiny-ppo", "adapter"),
    ]
    assert sft["wandb_artifact"] == f"me/rlhf-recipes/tiny-sft:{sft['wandb_run_id']}"
    [use] = server.sent("UseArtifact")
    assert use["runName"] == ppo["wandb_run_id"]
    assert use["artifactID"] == server.artifacts[f"tiny-sft:{sft['wandb_run_id']}"][0]
    started = [run for run in server.sent("UpsertBucket") if run["groupName"]]
    assert [(run["groupName"], run["jobType"]) for run in started] == [("tiny", "sft"), ("tiny", "ppo")]
    assert server.files[ppo["wandb_run_id"]]["wandb-summary.json"][-1]["evaluation/loss"] == 1.0

    [folder] = (tmp_path / "wandb").glob("offline-run-*")
    artifact = facts(folder).artifacts["quick_start-sft"]
    assert artifact.type == "adapter"
    assert sorted(artifact.aliases) == sorted(["latest", folder.name.rpartition("-")[2]])
    assert sorted(entry.path for entry in artifact.manifest.contents) == sorted(KEPT)


def test_without_evaluation_samples_no_table(stage):
    (stage / "evaluation.json").write_text('{"loss": 0.5}')
    run = StubRun()
    log_outputs(run, str(stage))
    assert run.rows == []
    assert run.summary == {"evaluation/loss": 0.5}
