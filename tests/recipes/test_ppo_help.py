"""`recipes/ppo.py --help` does not wait for what only training needs."""

import subprocess
import sys

CODE = """
import importlib.util, sys
spec = importlib.util.spec_from_file_location("stage", sys.argv[1])
stage = importlib.util.module_from_spec(spec)
spec.loader.exec_module(stage)
sys.argv = ["ppo.py", "--help"]
try:
    stage.parse_stage(stage.ARGUMENTS)
finally:
    slow = ("datasets", "pandas", "wandb", "trl.trainer.grpo_trainer", "rlhf_recipes.ppo.trainer")
    print("LOADED", [name for name in slow if name in sys.modules])
"""


def test_help_imports_no_trainer_and_no_data_library(repo_root):
    command = [sys.executable, "-c", CODE, repo_root / "recipes" / "ppo.py"]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert "--kl_coef" in printed
    assert printed.splitlines()[-1] == "LOADED []"


def test_a_report_is_made_without_the_libraries_that_train():
    code = (
        "import sys, rlhf_recipes.tools.report.writing; print(sorted({'torch', 'transformers'} & sys.modules.keys()))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout == "[]\n"
