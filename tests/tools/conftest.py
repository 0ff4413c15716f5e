"""What dashboards show is what tracked stages log: the tools' tests share their run."""

from tests.tracking.conftest import offline, run_alone, server, stages

__all__ = ["offline", "run_alone", "server", "stages"]
