"""FSDP on CPUs, for tests: accelerate turns it off there without a word."""

import os

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType


def shard_on_cpus() -> None:
    """Let accelerators of this process shard as they would on GPUs, if it was launched for FSDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") != "true":
        return
    original = AcceleratorState.__init__

    def with_fsdp(self, *arguments, fsdp_plugin=None, **named):
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **named)
        if fsdp_plugin is not None and self.distributed_type == DistributedType.MULTI_CPU:
            if self._mixed_precision != "no":
                fsdp_plugin.set_mixed_precision(self._mixed_precision)
            self.fsdp_plugin = fsdp_plugin
            self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP

    AcceleratorState.__init__ = with_fsdp
