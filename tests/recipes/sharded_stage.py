"""Run by `test_sharded_stages.py`: a stage's script as it is, but sharded on CPUs."""

import runpy
import sys
from pathlib import Path

from tests.cpu_fsdp import shard_on_cpus

if __name__ == "__main__":
    shard_on_cpus()
    del sys.argv[0]
    sys.path.insert(0, str(Path(sys.argv[0]).parent))  # as a script's own folder is
    runpy.run_path(sys.argv[0], run_name="__main__")
