"""The workspaces: their panels show what real stages log, the library takes them, and saving twice makes no copies."""

import json
import re

import pytest
import wandb_workspaces.reports.v2.interface as wr
import wandb_workspaces.workspaces as ws
from wandb_workspaces.workspaces.internal import View

from rlhf_recipes.tools.dashboards import as_json, comparison_workspace, ppo_workspace, reward_workspace

MAKERS = {"reward": reward_workspace, "ppo": ppo_workspace, "comparison": comparison_workspace}


@pytest.fixture(params=MAKERS)
def workspace(request):
    return MAKERS[request.param]("me", "rlhf-recipes")


def named(workspace):
    """What a workspace shows, read from what is sent: `(kind, name)`."""
    sent = as_json(workspace)["spec"]["section"]
    for column in sent["runSets"][0]["runFeed"]["columnPinned"]:
        yield tuple(column.split(":", 1))
    for panel in (panel for section in sent["panelBankConfig"]["sections"] for panel in section["panels"]):
        config, kind = panel["config"], panel["viewType"]
        if kind == "Run History Line Plot":
            yield from (("history", name) for name in [config["xAxis"], *config.get("metrics", [])])
            if "metricRegex" in config:
                yield "regex", config["metricRegex"]
        elif kind == "Bar Chart":
            yield from (("summary", name) for name in config["metrics"])
        elif kind == "Scatter Plot":
            yield from (tuple(config[axis].split(":", 1)) for axis in ("xAxis", "yAxis"))
        elif kind == "Parallel Coordinates Plot":
            yield from (tuple(column["accessor"].removesuffix(".value").split(":", 1)) for column in config["columns"])
        elif kind == "Parameter Importance":
            yield "summary", config["targetKey"]
        elif kind == "Weave":
            yield "table", config["panel2Config"]["exp"]["fromOp"]["inputs"]["key"]["val"]
        else:
            assert kind == "Run Comparer", f"how does one read what {kind} shows?"


def unknown(workspace, run):
    """What a workspace shows and a run has never logged."""
    history = {key for row in run.history for key in row}
    known = {"history": history, "summary": run.summary, "config": run.config, "table": run.tables}
    known["run"] = {"displayName"}
    return [
        (kind, name)
        for kind, name in named(workspace)
        if not (any(re.fullmatch(name, key) for key in history) if kind == "regex" else name in known[kind])
    ]


def test_every_panel_shows_what_the_stage_logs(workspace, offline):
    [runs] = as_json(workspace)["spec"]["section"]["runSets"]
    [stage] = [one["value"] for one in runs["filters"]["filters"] if one["key"]["name"] == "jobType"]
    assert len(list(named(workspace))) > 8
    assert unknown(workspace, offline[stage]) == []


@pytest.mark.parametrize(
    "panel",
    [
        wr.LinePlot(x="train/global_step", y=["train/kl", "train/no_such_metric"]),
        wr.LinePlot(x="no_such_metric", y=["train/kl"]),
        wr.LinePlot(x="train/global_step", metric_regex="train/no_such_metric/.*"),
        wr.BarPlot(metrics=["evaluation/no_such_metric"]),
        wr.ScatterPlot(x=wr.SummaryMetric("evaluation/win_rate"), y=wr.SummaryMetric("no_such_metric")),
        wr.ParallelCoordinatesPlot(columns=[wr.ParallelCoordinatesPlotColumn(wr.Config("no_such_metric"))]),
        wr.ParameterImportancePlot(with_respect_to="no_such_metric"),
        wr.WeavePanelSummaryTable(table_name="no_such_metric"),
    ],
    ids=lambda panel: type(panel).__name__,
)
def test_a_panel_for_what_nobody_logs_is_found(panel, offline):
    workspace = ppo_workspace("me", "rlhf-recipes")
    workspace.sections = [*workspace.sections, ws.Section("wrong", panels=[panel])]
    [(_, name)] = unknown(workspace, offline["ppo"])
    assert "no_such_metric" in name


def test_the_library_reads_back_what_it_is_given(workspace):
    view = View.model_validate_json(json.dumps(as_json(workspace)))
    again = ws.Workspace._from_model(view)
    assert as_json(again) == as_json(workspace)
    assert [section.name for section in again.sections] == [section.name for section in workspace.sections]


def test_neither_a_stage_nor_the_command_loads_the_library(stages):
    loaded = (stages.parent / "loaded").read_text().split()
    assert {"rlhf_recipes.ppo.trainer", "rlhf_recipes.tools.cli", "wandb"} <= set(loaded)
    assert "wandb_workspaces" not in loaded


# The command, several times in one process, and what it gave.
CALLS = """
import contextlib, io, json, sys
from rlhf_recipes.tools.dashboards.__main__ import main

results = []
for arguments in json.loads(sys.argv[1]):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    results.append([code, out.getvalue(), err.getvalue()])
print(json.dumps(results))
"""


def test_without_an_account(run_alone, tmp_path):
    to_me = ["--entity", "me", "--project", "p"]
    calls = [[*to_me, "--dry_run"], to_me, ["--entity", "me/other?nw=1", "--dry_run"]]
    finished = run_alone(["-c", CALLS, json.dumps(calls)], tmp_path)
    assert finished.returncode == 0, finished.stderr
    dry, plain, odd = json.loads(finished.stdout.splitlines()[-1])

    assert dry[0] == 0
    views = json.loads(dry[1])
    assert [view["displayName"] for view in views.values()] == ["Reward models", "PPO", "Runs compared"]
    assert {(view["entity"], view["project"]) for view in views.values()} == {("me", "p")}
    assert plain[0] == 2
    assert "there is no API key on this machine. Run `wandb login` or set WANDB_API_KEY" in plain[2]
    assert odd[0] == 2
    assert "argument --entity: must be a name of letters, digits" in odd[2]


@pytest.mark.slow
def test_saving_again_replaces(run_alone, tmp_path, server):
    to_me = ["--entity", "me", "--project"]
    calls = [[*to_me, "rlhf-recipes"], [*to_me, "rlhf-recipes"], [*to_me, "nothing"]]
    finished = run_alone(["-c", CALLS, json.dumps(calls)], tmp_path, **server.settings)
    assert finished.returncode == 0, finished.stderr
    first, second, nowhere = json.loads(finished.stdout.splitlines()[-1])
    assert first[:2] == second[:2]
    assert first[1].splitlines() == [
        f"{name}: {server.url}/me/rlhf-recipes?nw={slug}"
        for name, slug in (("Reward models", "rlhfreward"), ("PPO", "rlhfppo"), ("Runs compared", "rlhfcompare"))
    ]
    saved = server.sent("UpsertView2")
    assert [view.get("id") for view in saved] == [None, None, None, "V0", "V1", "V2"]
    assert set(server.views) == {"nw-rlhfreward-v", "nw-rlhfppo-v", "nw-rlhfcompare-v"}
    spec = json.loads(server.views["nw-rlhfppo-v"]["spec"])
    assert spec["section"]["panelBankConfig"]["sections"][0]["name"] == "Better, or fooling the reward model?"
    assert nowhere[0] == 2
    assert "Project `me/nothing` not found" in nowhere[2]


def test_a_key_that_is_refused_is_explained(run_alone, tmp_path, server):
    server.refuse = True
    command = ["-m", "rlhf_recipes.tools.dashboards", "--entity", "me", "--project", "rlhf-recipes"]
    finished = run_alone(command, tmp_path, **server.settings)
    assert finished.returncode == 2
    assert "The workspaces could not be saved" in finished.stderr
    assert "wandb login --relogin" in finished.stderr
    assert "Traceback" not in finished.stderr
    assert server.views == {}
