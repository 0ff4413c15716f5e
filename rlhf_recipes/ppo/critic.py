"""The critic: what return to expect before each completion token.

`B` sequences, `P` prompt tokens (padded on the left), `T` completion tokens (padded on the right), `H` hidden size.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from rlhf_recipes.models.roles import CRITIC, POLICY, Roles


class Critic:
    """Values from an adapter of its own, or from a head on the policy's trunk.

    Separate adapters on one base cost one more forward pass and learn better than one adapter for both (Hydra-PPO,
    https://huggingface.co/papers/2309.00754); the head on the trunk costs almost nothing.

    Args:
        roles: The roles on the shared base.
        kind: `"adapter"` or `"head"`.
        init: Start of the adapter: `"reward"` (with the reward's head) or `"policy"` (with a zero head).
        reward_role: The reward adapter to start from.

    Raises:
        ValueError: If the critic is to start from a reward adapter and there is none.
    """

    def __init__(
        self,
        roles: Roles,
        kind: Literal["adapter", "head"],
        init: Literal["reward", "policy"],
        reward_role: str | None,
    ) -> None:
        self.kind = kind
        self.adapter = POLICY if kind == "head" else CRITIC
        self._roles = roles
        if kind == "head":
            roles.add_head(CRITIC)
        elif init == "policy":
            roles.add_copy(CRITIC, source=POLICY)
            roles.add_head(CRITIC)
        elif reward_role is not None:
            roles.add_copy(CRITIC, source=reward_role)
            roles.add_head(CRITIC, weight=roles.heads[reward_role].weight)  # type: ignore[arg-type]
        else:
            raise ValueError(
                "`critic_init` is 'reward', but no reward adapter is among `reward_funcs` to start the critic from. "
                "Give the folder of a reward adapter as a reward function, or set `critic_init: policy`."
            )

    def hidden_states(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Run the base with the critic's adapter: `(B, P + T)` token ids to `(B, P + T, H)`."""
        with self._roles.use(self.adapter):
            return self._roles.hidden_states(input_ids, attention_mask)

    def values(self, hidden_states: Tensor, completion_length: int) -> Tensor:
        """Read the values before each completion token.

        The value before a token belongs to the text so far, so it is read one position earlier; the first one is read
        at the last prompt token.

        Args:
            hidden_states: Last hidden states, shape `(B, P + T, H)`.
            completion_length: `T`.

        Returns:
            Values in reward units, shape `(B, T)`.
        """
        return self._roles.apply_head(CRITIC, hidden_states[:, -completion_length - 1 : -1])

    @torch.no_grad()
    def rollout_values(self, input_ids: Tensor, attention_mask: Tensor, length: int, batch_size: int) -> Tensor:
        """Compute the values `(B, length)` of a rollout without gradients, `batch_size` sequences at a time."""
        chunks = zip(input_ids.split(batch_size), attention_mask.split(batch_size), strict=True)
        return torch.cat([self.values(self.hidden_states(ids, mask), length) for ids, mask in chunks])
