"""vLLM in the process of the trainer, on its device: the base is in memory a second time, for sampling."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rlhf_recipes.ppo.vllm.engine import (
    Adapter,
    Completion,
    Drawing,
    SamplingStopped,
    check_log_probs,
    checked_completion,
    largest_rank,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence


class ColocatedVLLM:
    """vLLM's `LLM`, with one LoRA adapter at a time.

    Args:
        llm: A `vllm.LLM` with `enable_lora` and `logprobs_mode="processed_logprobs"`.
        lora_request: `vllm.lora.request.LoRARequest`.
        sampling_params: `vllm.SamplingParams`.

    Raises:
        SamplingStopped: From every method, if vLLM fails.
    """

    def __init__(self, llm: Any, lora_request: Callable[..., Any], sampling_params: Callable[..., Any]) -> None:
        self._llm, self._lora_request, self._sampling_params = llm, lora_request, sampling_params
        self.loads = 0
        self.context: int | None = llm.llm_engine.model_config.max_model_len
        self._requests: dict[str, Any] = {}

    def load(self, adapter: Adapter) -> None:
        """Load an adapter; one that is there stays."""
        if adapter.name in self._requests:
            return
        self.loads += 1  # a number of its own: vLLM goes on with what it loaded under a number before
        request = self._lora_request(adapter.name, self.loads, str(adapter.folder))
        try:
            loaded = self._llm.llm_engine.add_lora(request)
        except Exception as error:  # whatever its engine raises
            raise SamplingStopped(f"vLLM refused to load the adapter: {error}") from error
        if not loaded:
            raise SamplingStopped(f"vLLM did not load the adapter in {str(adapter.folder)!r}.")
        self._requests[adapter.name] = request

    def unload(self, adapter: Adapter) -> None:
        """Forget an adapter, if it is there."""
        if request := self._requests.pop(adapter.name, None):
            self._llm.llm_engine.remove_lora(request.lora_int_id)

    def sample(
        self, adapter: Adapter, prompts: Sequence[Sequence[int]], seeds: Sequence[int], drawing: Drawing
    ) -> list[Completion]:
        """Sample one completion after each prompt, each with a seed of its own."""
        outputs = self._generate(adapter, prompts, [drawing.parameters(seed) for seed in seeds])
        completions = []
        for output in outputs:
            [sampled] = output.outputs
            ids = list(sampled.token_ids)
            logps = [place[token].logprob for place, token in zip(sampled.logprobs, ids, strict=True)]
            completions.append(checked_completion(ids, logps, drawing))
        return completions

    def score(self, adapter: Adapter, ids: Sequence[int]) -> list[float]:
        """Log-probabilities of the tokens of a text but the first, at temperature 1, in nats."""
        [output] = self._generate(adapter, [ids], [{"max_tokens": 1, "temperature": 1.0, "prompt_logprobs": 0}])
        places = output.prompt_logprobs[1:]
        values = [place[token].logprob for place, token in zip(places, ids[1:], strict=True)]
        check_log_probs(values, len(ids) - 1)
        return values

    def _generate(
        self, adapter: Adapter, prompts: Sequence[Sequence[int]], parameters: list[dict[str, Any]]
    ) -> list[Any]:
        try:
            outputs: list[Any] = self._llm.generate(
                [{"prompt_token_ids": list(ids)} for ids in prompts],
                sampling_params=[self._sampling_params(**each) for each in parameters],
                lora_request=self._requests[adapter.name],
                use_tqdm=False,
            )
        except Exception as error:  # whatever its engine raises
            raise SamplingStopped(f"vLLM failed in this process: {type(error).__name__}: {error}") from error
        return outputs


def start_vllm(
    base: str,
    *,
    dtype: str,
    four_bits: bool,
    rank: int,
    gpu_memory_utilization: float,
    max_model_length: int | None,
    model_impl: str,
    trust_remote_code: bool,
) -> ColocatedVLLM:
    """Load a base with vLLM in this process.

    Args:
        base: Folder or hub id of the base.
        dtype: In which it computes, such as `"bfloat16"`.
        four_bits: Whether it is quantized to 4 bits as bitsandbytes does it.
        rank: Rank of the adapter.
        gpu_memory_utilization: Share of the device's memory for vLLM.
        max_model_length: Tokens of the longest text; `None`: the base's context.
        model_impl: `"vllm"` or `"transformers"`.
        trust_remote_code: Whether to run code that the base brings along.

    Raises:
        ModuleNotFoundError: If vLLM is not installed beside the trainer.
    """
    try:
        from vllm import LLM, SamplingParams  # type: ignore[import-not-found]
        from vllm.lora.request import LoRARequest  # type: ignore[import-not-found]
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"`vllm_mode: colocate` imports vLLM in the trainer's own environment, and {error.name} is not installed "
            "there. Where vLLM asks for another version of transformers than this library, run it apart, with "
            "`vllm_mode: server`.",
            name=error.name,
        ) from error
    llm = LLM(
        base,
        dtype=dtype,
        quantization="bitsandbytes" if four_bits else None,
        enable_lora=True,
        max_lora_rank=largest_rank(rank),
        logprobs_mode="processed_logprobs",
        generation_config="vllm",
        gpu_memory_utilization=gpu_memory_utilization,
        max_model_len=max_model_length,
        model_impl=model_impl,
        trust_remote_code=trust_remote_code,
    )
    return ColocatedVLLM(llm, LoRARequest, SamplingParams)
