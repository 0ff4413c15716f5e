"""The launch configurations are accepted by `accelerate` and start what they say."""

import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file

CONFIGS = sorted((Path(__file__).resolve().parents[2] / "recipes" / "accelerate").glob("*.yaml"))


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_accelerate_keeps_every_value(path):
    """An unknown key would be an error, a mistyped value would come back changed."""
    read = load_config_from_file(str(path)).to_dict()
    for key, value in yaml.safe_load(path.read_text()).items():
        assert read[key] == value, key


def test_single_process_launches_one_process(tmp_path):
    script = tmp_path / "show.py"
    script.write_text("from accelerate import PartialState\nprint(PartialState().num_processes, __name__)\n")
    config = next(path for path in CONFIGS if path.stem == "single_process")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), str(script)]
    result = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=120)
    assert result.stdout.split() == ["1", "__main__"], result.stderr
