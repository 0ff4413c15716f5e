"""What samples the completions of a rollout: transformers, on the base that all roles share, or vLLM."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from rlhf_recipes.ppo.passes import sample_completions
from rlhf_recipes.ppo.vllm.sampler import VLLMSampler, start_engine

if TYPE_CHECKING:
    from rlhf_recipes.models.image_embeddings import EmbeddedPrompt
    from rlhf_recipes.ppo.config import PPOConfig


class Sampler(Protocol):
    """Samples from the policy as it is."""

    def __call__(
        self, prompt_ids: list[list[int]], embedded: list[EmbeddedPrompt] | None = None
    ) -> tuple[list[list[int]], list[list[float]] | None]:
        """Sample one completion after each prompt.

        Args:
            prompt_ids: Token ids of `B` prompts.
            embedded: The same as embeddings, where they have pictures.

        Returns:
            Token ids, with the end token where it was sampled; and their log-probabilities in nats where another
            engine than the trainer's networks sampled them, which compute their own.
        """


@dataclass(frozen=True)
class TransformersSampler:
    """Samples with the trainer's own networks; TRL spends time on padding, and on rows that have ended."""

    trainer: Any

    def __call__(
        self, prompt_ids: list[list[int]], embedded: list[EmbeddedPrompt] | None = None
    ) -> tuple[list[list[int]], None]:
        """As `Sampler`."""
        return sample_completions(self.trainer, prompt_ids, embedded), None


@contextmanager
def without_vllm(args: PPOConfig) -> Iterator[None]:
    """Set `use_vllm` to false within the block."""
    asked, args.use_vllm = args.use_vllm, False
    try:
        yield
    finally:
        args.use_vllm = asked


def build_sampler(trainer: Any) -> Sampler:
    """The sampler that the configuration of a PPO trainer asks for.

    Raises:
        ValueError: If vLLM cannot sample from such a policy.
        SamplingStopped: If vLLM does not answer, or computes something else than the trainer.
    """
    if not trainer.args.use_vllm:
        return TransformersSampler(trainer)
    return VLLMSampler(trainer, start_engine(trainer))
