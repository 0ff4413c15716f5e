"""Memory and time of a run, computed before it starts and without its weights."""

from __future__ import annotations

import argparse
from typing import Any

from rlhf_recipes.tools.planning.speed import GPUS


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add what a plan takes beside the fields of the PPO stage."""
    whole: dict[str, Any] = {"type": int, "metavar": "int"}
    number: dict[str, Any] = {"type": float, "metavar": "float"}
    flag: dict[str, Any] = {"type": _flag, "nargs": "?", "const": True, "metavar": "bool"}
    parser.add_argument("--budget_gib", **number, help="memory that the run may take on each GPU, in GiB")
    parser.add_argument("--prompt_length", **whole, help="tokens of the longest prompt (default: the rows are read)")
    parser.add_argument("--gpu", choices=GPUS, help="kind of GPU, for its memory and its speed")
    parser.add_argument("--num_processes", **whole, help="processes that train, one for each GPU (default: 1)")
    parser.add_argument("--num_machines", **whole, help="machines that they are on (default: 1)")
    parser.add_argument(
        "--sharding", choices=("none", "fsdp2", "zero2", "zero3"), help="what divides the run (default: none, DDP)"
    )
    parser.add_argument("--use_vllm", **flag, help="generate with vLLM")
    parser.add_argument("--vllm_mode", choices=("server", "colocate"), help="on GPUs of its own, or on the trainer's")
    parser.add_argument("--vllm_tensor_parallel_size", **whole, help="GPUs of one copy of vLLM's model")
    parser.add_argument("--vllm_gpu_memory_utilization", **number, help="share of each of its GPUs that vLLM takes")
    parser.add_argument("--vllm_enable_sleep_mode", **flag, help="colocated, vLLM gives memory back for training")


def _flag(word: str) -> bool:
    words = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}
    if word.lower() not in words:
        raise argparse.ArgumentTypeError(f"expected true or false, got {word!r}")
    return words[word.lower()]
