"""Stages as commands: what goes to accelerate's launcher and what to the stage, and that nothing else changes."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import accelerate.commands.launch
import pytest

from rlhf_recipes.tools.cli import main
from rlhf_recipes.tools.commands.folder import recipes_folder
from rlhf_recipes.tools.commands.scripts import SCRIPTS, launch, run_script

TOP = recipes_folder()
COMMAND = "import sys; from rlhf_recipes.tools.cli import main; sys.exit(main())"


@pytest.fixture
def launched(monkeypatch):
    """What accelerate's launcher is given, in place of a launch."""
    given = []
    monkeypatch.setattr(accelerate.commands.launch, "launch_command", given.append)
    return given


@pytest.mark.parametrize("stage", ["sft", "reward", "ppo", "grpo"])
def test_words_of_the_stage_and_of_accelerate_are_told_apart(stage, launched):
    words = ["--config", "my.yaml", "--num_processes", "2", "--learning_rate", "-1e-3", "--accelerate_config", "ddp"]
    more = ["--debug", "underflow_overflow", "--main-process-port=0", "--quiet", "--seed=3", "--output-dir", "x y"]
    assert launch(stage, [*words, *more]) == 0
    (args,) = launched
    assert args.training_script == str(TOP / f"{stage}.py")
    assert args.training_script_args == [
        *("--config", "my.yaml", "--learning_rate", "-1e-3", "--debug", "underflow_overflow"),  # both know `--debug`
        *("--seed=3", "--output-dir", "x y"),
    ]
    assert (args.num_processes, args.main_process_port, args.quiet) == (2, 0, True)
    assert args.config_file == str(TOP / "accelerate" / "ddp.yaml")


def test_without_words_of_accelerate_its_defaults_stay(launched):
    launch("sft", ["--config", "my.yaml"])
    theirs = accelerate.commands.launch.launch_command_parser().parse_args(
        [str(TOP / "sft.py"), "--config", "my.yaml"]
    )
    assert vars(launched[0]) == vars(theirs)


def test_what_nobody_knows_is_left_to_the_stage_which_says_so(launched):
    launch("ppo", ["word", "--learning_rte", "1e-5", "--quiet", "yes", "--kl_coef", "~"])
    assert launched[0].training_script_args == [
        *("word", "--learning_rte", "1e-5", "--quiet", "yes", "--kl_coef", "~")
    ], "`--quiet` takes no value"


def test_a_launch_configuration_is_a_file_or_a_name(launched, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Path("mine.yaml").write_text("num_processes: 1\n")
    launch("sft", ["--accelerate_config=mine.yaml"])
    launch("sft", ["--accelerate_config", "single_process"])
    assert [args.config_file for args in launched] == ["mine.yaml", str(TOP / "accelerate" / "single_process.yaml")]
    assert main(["sft", "--accelerate_config", "zero3"]) == 2
    assert (
        "'zero3' is no file, and none of the names ddp, fsdp2, fsdp2_8_gpus, fsdp2_two_nodes, single_process"
        in capsys.readouterr().err
    )
    assert main(["sft", "--accelerate_config", "--seed", "1"]) == 2
    assert "takes a file or a name, got nothing" in capsys.readouterr().err
    assert len(launched) == 2


def test_a_stage_that_fails_is_a_failed_command(monkeypatch):
    def fail(args):
        raise subprocess.CalledProcessError(3, "python")

    monkeypatch.setattr(accelerate.commands.launch, "launch_command", fail)
    assert main(["sft", "--config", "my.yaml"]) == 1


@pytest.mark.parametrize("command", ["certificate", "serve"])
def test_other_scripts_run_as_python_runs_them(command, monkeypatch, tmp_path):
    script = tmp_path / SCRIPTS[command]
    script.write_text("import json, sys\nfrom pathlib import Path\nPath('words').write_text(json.dumps(sys.argv))\n")
    monkeypatch.setattr("rlhf_recipes.tools.commands.scripts.recipes_folder", lambda: tmp_path)
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes"])
    monkeypatch.chdir(tmp_path)
    run_script(command, ["--config", "x.yaml"])
    assert json.loads(Path("words").read_text()) == [str(script), "--config", "x.yaml"]


def test_a_certificate_of_nothing_is_an_error_with_the_reason(capsys, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["rlhf-recipes"])
    assert main(["certificate", "--config", "nothing.yaml"]) == 2
    assert "There is no config file nothing.yaml" in capsys.readouterr().err


def test_unknown_words_of_other_commands_are_errors(capsys):
    with pytest.raises(SystemExit, match="2"):
        main(["report", "folder", "--nothing"])
    assert "unrecognized arguments: --nothing" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["nothing"])


@pytest.mark.slow
def test_the_command_leaves_what_accelerate_launch_leaves(
    repo_root, tiny_model_path, tiny_texts, sft_adapter, reward_adapter, tmp_path
):
    """The same numbers and files, with words on the command line and in a YAML; and the exit code of a failure."""
    rows = tmp_path / "prompts.jsonl"
    rows.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in tiny_texts))
    config = tmp_path / "ppo.yaml"
    fields = {
        "model_name_or_path": tiny_model_path,
        "sft_adapter": str(sft_adapter),
        "reward_adapter": str(reward_adapter),
        "dataset_name": str(rows),
        "per_device_train_batch_size": 4,
        "steps_per_generation": 1,
        "max_completion_length": 6,
        "logging_steps": 1,
        "evaluation_rows": 4,
        "report_to": "none",
        "save_strategy": "no",
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
    }
    config.write_text(json.dumps(fields))
    environment = {**os.environ, "PYTHONPATH": str(repo_root)}
    own = [sys.executable, "-c", COMMAND, "ppo", "--num_processes", "1"]
    theirs = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", str(TOP / "ppo.py")]

    def run(command, name, *more):
        folder = tmp_path / "runs" / name
        words = [*command, "--config", config, "--max_steps", "2", "--output_dir", folder, *more]
        done = subprocess.run(list(map(str, words)), env=environment, cwd=tmp_path, capture_output=True, text=True)
        return done, folder

    def numbers(folder):
        state = json.loads((folder / "trainer_state.json").read_text())
        clocks = ("time", "runtime", "per_second", "seconds", "tokens_per")
        return [
            {name: value for name, value in entry.items() if not any(word in name for word in clocks)}
            for entry in state["log_history"]
        ]

    (first, mine), (second, other) = run(own, "own"), run(theirs, "theirs")
    assert (first.returncode, second.returncode) == (0, 0), first.stderr + second.stderr
    assert len(numbers(mine)) >= 2
    assert numbers(mine) == numbers(other)
    assert {path.name for path in mine.iterdir()} == {path.name for path in other.iterdir()}
    shutil.rmtree(tmp_path / "runs")
    failed = [run(command, "failed", "--kl_coff", "0")[0] for command in (own, theirs)]
    assert [one.returncode for one in failed] == [1, 1]
    assert all("did you mean '--kl_coef'?" in one.stderr for one in failed)
