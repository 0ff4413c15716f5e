"""Samples from the policy with vLLM: sends each version of its adapter, and checks that it is the one that samples."""

from __future__ import annotations

import copy
import shutil
from collections.abc import Callable
from dataclasses import replace
from itertools import cycle, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from accelerate.utils import broadcast_object_list, gather_object
from datasets import Dataset
from torch import Tensor
from trl.extras.profiling import profiling_context

from rlhf_recipes.data.context import context_length
from rlhf_recipes.models.adapters import POLICY, base_name
from rlhf_recipes.models.trained_on import describe_base
from rlhf_recipes.ppo._trl import tokenized_prompts
from rlhf_recipes.ppo.vllm.adapter import check_adapter, save_version, version_of
from rlhf_recipes.ppo.vllm.colocated import start_vllm
from rlhf_recipes.ppo.vllm.engine import Adapter, Completion, Drawing, Engine, SamplingStopped, launch_command
from rlhf_recipes.ppo.vllm.server import VLLMServer

if TYPE_CHECKING:
    from rlhf_recipes.models.image_embeddings import EmbeddedPrompt
    from rlhf_recipes.ppo.config import PPOConfig

T = TypeVar("T")

_FOLDER = "vllm_adapters"  # of the versions, in that of the run
# Tokens of the text on which both sides are compared: more than a block of vLLM's cache has, 128 on CPUs
_SCORED = 160
_GOES_ON = 16  # tokens that are sampled after it
_PROMPTS = 64  # of the run, from which it is made
_TOLERANCE, _TOLERANCE_IN_16_BITS = 1e-4, 0.05
_MOVED = 0.1  # share of the tolerance by which a new version differs from the last one beyond rounding
_SEEDS = 2**62


def start_engine(trainer: Any) -> Engine:
    """Find or start the vLLM that the configuration of a PPO trainer names, after its policy was checked.

    Raises:
        ValueError: If vLLM cannot sample from such a policy, or a run cannot be as it is configured.
        SamplingStopped: If a server does not answer.
    """
    args: PPOConfig = trainer.args
    _check_policy(trainer)
    base, config = base_name(trainer.roles.model), trainer.roles.model.peft_config[POLICY]
    dtype = _dtype(trainer)
    if args.vllm_mode == "server":
        assert args.vllm_server_base_url is not None  # checked with the configuration
        launch = launch_command(base, config.r, dtype)
        engine: Engine = VLLMServer(args.vllm_server_base_url, args.vllm_server_timeout, launch)
    else:
        engine = start_vllm(
            base,
            dtype=dtype,
            four_bits=bool(getattr(trainer.roles.model.get_base_model(), "is_loaded_in_4bit", False)),
            rank=config.r,
            gpu_memory_utilization=args.vllm_gpu_memory_utilization,
            max_model_length=args.vllm_max_model_length,
            model_impl=args.vllm_model_impl,
            trust_remote_code=args.trust_remote_code,
        )
    _check_context(trainer, engine.context)
    return engine


class VLLMSampler:
    """Samples the completions of a PPO run with vLLM.

    Before a rollout the policy's adapter is sent if it has changed, as a version with a name and a folder of its own.
    Then both sides score one text, and vLLM goes on with it: a version that is not the trainer's stops the run. Each
    completion has a seed from the process's stream of random numbers, so that a run that is resumed, or a request that
    is sent again, gets the same one.

    Args:
        trainer: The PPO trainer.
        engine: vLLM, with the policy's base.

    Raises:
        SamplingStopped: If the engine is lost, refuses, or does not sample from the policy. On all processes alike.
    """

    def __init__(self, trainer: Any, engine: Engine) -> None:
        args = trainer.args
        self._trainer, self._engine = trainer, engine
        self._drawing = Drawing(trainer.temperature, args.max_completion_length, tuple(trainer.eos_token_ids))
        self._probe = Probe(trainer, engine, self._drawing)
        self._folder = Path(args.output_dir) / _FOLDER
        self._adapter: Adapter | None = None
        self._send(self._changed())

    def __call__(
        self, prompt_ids: list[list[int]], embedded: list[EmbeddedPrompt] | None = None
    ) -> tuple[list[list[int]], list[list[float]]]:
        """As `Sampler`."""
        state = torch.get_rng_state()
        seeds = torch.randint(_SEEDS, (len(prompt_ids),)).tolist()
        try:
            self._send(self._changed())
            with profiling_context(self._trainer, "vLLM.generate"):
                completions = self._together(lambda: self._sample(prompt_ids, seeds))
        except SamplingStopped:
            torch.set_rng_state(state)  # for the checkpoint from which the run goes on with this rollout
            raise
        return [each.ids for each in completions], [each.logps for each in completions]

    def _changed(self) -> Adapter | None:
        main = self._trainer.accelerator.is_main_process
        [version] = broadcast_object_list([version_of(self._trainer.roles, self._folder) if main else None])
        return None if version == self._adapter else version

    def _send(self, adapter: Adapter | None) -> None:
        """Let the engine sample from another version; the main process sends it for all."""
        if adapter is None:
            return
        main = self._trainer.accelerator.is_main_process
        with profiling_context(self._trainer, "sync_weights"):
            self._together(lambda: self._replace_by(adapter) if main else None)
        self._adapter = adapter

    def _replace_by(self, adapter: Adapter) -> None:
        save_version(self._trainer.roles, adapter)
        self._engine.load(adapter)
        self._probe.check(adapter)
        if self._adapter is not None:
            self._engine.unload(self._adapter)
            shutil.rmtree(self._adapter.folder, ignore_errors=True)

    def _sample(self, prompt_ids: list[list[int]], seeds: list[int]) -> list[Completion]:
        assert self._adapter is not None
        loads = self._engine.loads
        completions = self._engine.sample(self._adapter, prompt_ids, seeds, self._drawing)
        if self._engine.loads > loads:  # a server was restarted meanwhile, perhaps in another way
            self._probe.check(self._adapter)
        return completions

    def _together(self, work: Callable[[], T]) -> T:
        """Do something on each process; where it fails on one, all stop."""
        done: list[T] = []
        try:
            done.append(work())
            problem = None
        except SamplingStopped as stopped:
            problem = str(stopped)
        problems = [each for each in gather_object([problem]) if each is not None]
        if problems:
            raise SamplingStopped(problems[0])
        return done[0]


class Probe:
    """A text that the trainer and an engine both score, and that the engine goes on with.

    The log-probabilities of the text show whether the engine computes with the policy's base and its adapter as it is
    now. Those of the tokens after it show whether they were drawn at the temperature, and whether keys and values of
    the text are still those of an earlier version, since the text was there before.

    Args:
        trainer: The PPO trainer.
        engine: The engine.
        drawing: How completions are drawn.
    """

    def __init__(self, trainer: Any, engine: Engine, drawing: Drawing) -> None:
        self._trainer, self._engine = trainer, engine
        self._drawing = replace(drawing, max_tokens=_GOES_ON)
        contexts = [each for each in (context_length(trainer.roles.model.get_base_model()), engine.context) if each]
        self._ids = probe_text(trainer, max(2, min([_SCORED, *(each - _GOES_ON for each in contexts)])))
        args = trainer.args
        exact = not trainer.half_precision and not _quantized(trainer)
        self._tolerance = args.vllm_tolerance or (_TOLERANCE if exact else _TOLERANCE_IN_16_BITS)
        self._last: tuple[Tensor, Tensor] | None = None  # what both sides said of the text with the last version

    def check(self, adapter: Adapter) -> None:
        """Compare both sides.

        Raises:
            SamplingStopped: If they are not the same policy.
        """
        served = torch.tensor(self._engine.score(adapter, self._ids))
        [after] = self._engine.sample(adapter, [self._ids], [0], self._drawing)
        own, own_after = self._own(after.ids)
        distances = [(own - served).abs().mean().item(), (own_after - torch.tensor(after.logps)).abs().mean().item()]
        if not max(distances) <= self._tolerance:
            raise SamplingStopped(self._differ(*distances))
        if self._last is not None and torch.equal(served, self._last[1]):
            moved = (own - self._last[0]).abs().mean().item()
            if moved > _MOVED * self._tolerance:
                raise SamplingStopped(
                    "vLLM goes on with an earlier version of the policy's adapter: its log-probabilities of a text "
                    f"are to the last bit those before the update, which moved the trainer's by {moved:.2g} nats per "
                    "token. Restart it."
                )
        self._last = own, served

    @torch.no_grad()
    def _own(self, after: list[int]) -> tuple[Tensor, Tensor]:
        """The trainer's log-probabilities: of the text but its first token at temperature 1, and of what follows."""
        trainer, start = self._trainer, len(self._ids)
        model = trainer.roles.model
        training = {module: module.training for module in model.modules()}
        model.eval()
        ids = torch.tensor([self._ids + after], device=model.device)
        with trainer.accelerator.autocast():
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
        for module, mode in training.items():
            module.training = mode
        logits[start - 1 :] /= self._drawing.temperature
        logps = logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None]).squeeze(1).cpu()
        return logps[: start - 1], logps[start - 1 :]

    def _differ(self, scored: float, sampled: float) -> str:
        trainer = self._trainer
        temperature = self._drawing.temperature
        if scored <= self._tolerance:
            where, cause = (
                f"log-probabilities of the tokens that it samples after a text differ by {sampled:.2g} nats per token",
                "It must report them as it draws them (`--logprobs-mode processed_logprobs`; the temperature is "
                f"{temperature:g}), and not reuse what it kept of a text under another adapter.",
            )
        else:
            where, cause = (
                f"log-probabilities of the same text differ by {scored:.2g} nats per token",
                f"It must serve the base {base_name(trainer.roles.model)!r} with the same weights and precision (the "
                f"trainer's: {describe_base(trainer.roles.model)}; it computes in {_dtype(trainer)}) and with the "
                "adapter as it is now.",
            )
        return (
            f"vLLM does not sample from the policy: the {where} from the trainer's (allowed: {self._tolerance:g}, "
            f"`vllm_tolerance`). {cause}"
        )


def probe_text(trainer: Any, length: int) -> list[int]:
    """Token ids of prompts of the run one after another, again and again up to a length; of a stream, any words."""
    rows = trainer.train_dataset
    if isinstance(rows, Dataset):
        prompts = rows[: min(_PROMPTS, len(rows))]["prompt"]
        ids = [token for prompt in tokenized_prompts(trainer, copy.deepcopy(prompts)) for token in prompt]
    else:
        tokenizer = trainer.processing_class
        special = {*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder}
        ids = [token for token in range(min(len(tokenizer), _SCORED + len(special))) if token not in special]
    return list(islice(cycle(ids), length))


def _check_policy(trainer: Any) -> None:
    args: PPOConfig = trainer.args
    if trainer.trains_whole_model:
        raise ValueError(
            "`use_vllm` sends the LoRA adapter alone, and the policy is trained as a whole. Give it an adapter "
            "(`peft_config`, `use_peft: true`), or remove `use_vllm`."
        )
    check_adapter(trainer.roles.model.peft_config[POLICY])
    if trainer.image_reader is not None:
        raise ValueError("`use_vllm` samples after texts, and the prompts have pictures. Remove `use_vllm`.")
    if args.vllm_mode == "colocate" and trainer.accelerator.num_processes > 1:
        raise ValueError(
            "`vllm_mode: colocate` is for a run of one process. With several, start a server, and set `vllm_mode: "
            "server`."
        )


def _check_context(trainer: Any, context: int | None) -> None:
    """Check that the longest prompt and what may follow fit into vLLM's context, which may be a part of the base's.

    Raises:
        ValueError: If they do not.
    """
    own = context_length(trainer.roles.model.get_base_model())
    if context is None or (own is not None and context >= own) or not isinstance(trainer.train_dataset, Dataset):
        return
    longest = max(map(len, trainer.prompt_rules.encode(list(trainer.train_dataset["prompt"]))))
    needed = longest + trainer.args.max_completion_length
    if context < needed:
        raise ValueError(
            f"vLLM's context ends at {context} tokens, and the longest prompt and its completion have {needed}. Raise "
            "`--max-model-len` of the server, or `vllm_max_model_length`."
        )


def _quantized(trainer: Any) -> bool:
    return bool(getattr(trainer.roles.model.get_base_model(), "is_quantized", False))


def _dtype(trainer: Any) -> str:
    """In which precision the trainer's policy computes, as vLLM names it."""
    mixed = {"bf16": "bfloat16", "fp16": "float16"}.get(trainer.accelerator.mixed_precision)
    return mixed or str(trainer.roles.model.get_base_model().dtype).removeprefix("torch.")
