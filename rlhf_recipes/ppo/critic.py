"""The critic: what return to expect before each completion token.

`B` sequences, `P` prompt tokens (padded on the left), `T` completion tokens (padded on the right), `H` hidden size.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_recipes.models.adapters import POLICY, is_adapter
from rlhf_recipes.models.arguments import positions_follow_mask
from rlhf_recipes.models.loading import load_sequence_classifier
from rlhf_recipes.models.packing import is_packed, pack
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.models.resumed import check_same_adapter
from rlhf_recipes.models.reward import load_reward_model
from rlhf_recipes.models.roles import CRITIC, Roles
from rlhf_recipes.models.top_layers import check_top_layers
from rlhf_recipes.ppo.padding import by_length, join_columns, positions_before, put_together, sequences, text_rows

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig

MODEL = "critic_model"  # the submodule of the policy that is a critic of its own
_HEAD_FILE = "head.safetensors"


def is_critic_parameter(name: str) -> bool:
    """Tell whether a parameter of the policy's module tree belongs to the critic.

    Example:
        >>> is_critic_parameter("base_model.model.lm_head.lora_A.critic.weight"), is_critic_parameter("lm_head.weight")
        (True, False)
    """
    return f".{CRITIC}." in f".{name}" or name.startswith(f"{MODEL}.")


class Critic:
    """Values from an adapter of its own, from a head on the policy's trunk, or from a model of its own.

    Separate adapters on one base cost one more forward pass and learn better than one adapter for both (Hydra-PPO,
    https://huggingface.co/papers/2309.00754); the head on the trunk costs almost nothing.

    Args:
        policy: The policy, to whose modules the critic's are added, so that the optimizer finds them.
        roles: The roles on the shared base.
        args: The configuration: `critic` and `critic_init`.
        reward_role: The reward adapter to start from.
        model: For `critic="model"`: a sequence classifier with one output and the policy's tokenizer, or the path of
            one, or of an adapter of one.

    Raises:
        ValueError: If what the critic is to start from is not there.
    """

    def __init__(
        self,
        policy: PreTrainedModel | PeftModel,
        roles: Roles,
        args: PPOConfig,
        reward_role: str | None = None,
        model: str | Path | PreTrainedModel | None = None,
    ) -> None:
        self.kind, self.layers = args.critic, args.critic_layers
        self._checked = False  # whether the upper layers alone were compared with the whole network
        self._policy, self._roles, self._model = policy, roles, None
        self._adapter = POLICY if self.kind == "head" else CRITIC
        self._bias = 0.0  # of the normalised score that the critic starts from, which a head without bias cannot hold
        self._on_whole_policy = self.kind == "head" and policy is not roles.model
        if (model is not None) != (self.kind == "model"):
            raise ValueError(
                f"`critic` is {self.kind!r}, and `critic_model` is {'missing' if model is None else 'given'}. Give it "
                "with `critic: model`, and only then."
            )
        if model is not None:
            self._model = _classifier(model, policy, args)
            policy.add_module(MODEL, self._model)
        elif self.kind == "head":
            roles.add_head(CRITIC)
        elif args.critic_init == "policy" or (args.critic_init is None and reward_role is None):
            roles.add_copy(CRITIC, source=POLICY)
            roles.add_head(CRITIC)
        elif reward_role is not None:
            roles.add_copy(CRITIC, source=reward_role)
            readout = roles.readouts.get(reward_role, Readout())
            if readout.readout == "last":
                head: Any = roles.heads[reward_role]
                roles.add_head(CRITIC, weight=readout.gain * head.weight)
                self._bias = readout.bias
            else:
                roles.add_head(CRITIC)  # a number of one token says nothing of the rest of the text
        else:
            raise ValueError(
                "`critic_init` is 'reward', but no reward adapter is among `reward_funcs` to start the critic from. "
                "Give the folder of a reward adapter as a reward function, or leave `critic_init` out: then it starts "
                "from the policy."
            )

        if self.layers is not None:
            if self.kind != "adapter":
                raise ValueError(
                    f"`critic_layers` is about the critic's adapter, but `critic` is {self.kind!r}. Remove it."
                )
            check_top_layers(roles.model.get_base_model(), self.layers)

    def freeze_below(self) -> None:
        """Keep the critic's adapter as it starts below the layers that are trained."""
        if self.layers is not None:
            self._roles.freeze_below(CRITIC, self.layers)

    @property
    def packed(self) -> bool:
        """Whether the critic's network reads texts one after another."""
        return self._roles.packed if self._model is None else is_packed(self._model)

    def hidden_states(self, input_ids: Tensor, **arguments: Any) -> Tensor:
        """Run the critic's network: token ids `(B, L)` (or `(1, N)`) and what `Rows` adds to `(B, L, H)`."""
        if self._model is not None or self._on_whole_policy:
            trunk: Any = self._policy.base_model if self._model is None else self._model.base_model
            hidden: Tensor = trunk(input_ids=input_ids, **arguments, use_cache=False).last_hidden_state
            return hidden
        with self._roles.use(self._adapter):
            return self._roles.hidden_states(input_ids, **arguments)

    def values(self, states: Tensor) -> Tensor:
        """Read the values before each completion token.

        The value before a token belongs to the text so far, so it is read one position earlier; the first one is read
        at the last prompt token.

        Args:
            states: Last hidden states of these positions, shape `(B, T, H)`.

        Returns:
            Values in reward units, shape `(B, T)`.
        """
        with torch.autocast(states.device.type, enabled=False):  # the network may run in 16 bits, the head does not
            if self._model is None:
                return self._roles.apply_head(CRITIC, states) + self._bias
            head: Any = self._model.score
            values: Tensor = head(states.to(head.weight.dtype))
            return values.squeeze(-1).float()

    def forward(self, batch: dict[str, Tensor]) -> Tensor:
        """Run the critic's own network on a micro-batch of a rollout.

        Args:
            batch: `prompt_ids`, `completion_ids` and their masks, and what `rollout_values` kept.

        Returns:
            Values in reward units, shape `(B, T)`.
        """
        rows = text_rows(batch, self.packed)
        if self.layers is None:
            hidden = self.hidden_states(rows.join(join_columns(batch, "ids")), **rows.arguments)
        else:
            below = rows.join(join_columns(batch, "below"))
            with self._roles.use(self._adapter):
                hidden = self._roles.hidden_states_of_top(below, self.layers, **rows.arguments)
        return self.values(rows.take(hidden, positions_before(batch)))

    @torch.no_grad()
    def rollout_values(self, batch: dict[str, Tensor], batch_size: int) -> dict[str, Tensor]:
        """Compute the values of a rollout without gradients, `batch_size` sequences at a time.

        Returns:
            `old_values` `(B, T)`; with `critic_layers` also `prompt_below` `(B, P, H)` and `completion_below`
            `(B, T, H)`, the states that enter the layers that are trained.

        Raises:
            ValueError: If the upper layers alone do not give what they give in the whole network.
        """
        length, width = batch["completion_ids"].size(1), batch["prompt_ids"].size(1)
        parts: dict[str, list[tuple[Tensor, Tensor]]] = {}
        for rows, part in by_length(sequences(batch), batch_size):
            found = {"old_values": self.forward(part)} if self.layers is None else self._values_and_below(part)
            for name, value in found.items():
                parts.setdefault(name, []).append((rows, value))
        return {
            name: put_together(each, width, left=True) if name.startswith("prompt_") else put_together(each, length)
            for name, each in parts.items()
        }

    def _values_and_below(self, part: dict[str, Tensor]) -> dict[str, Tensor]:
        assert self.layers is not None
        rows, width = text_rows(part, self.packed), part["prompt_ids"].size(1)
        input_ids = rows.join(join_columns(part, "ids"))
        with self._roles.use(self._adapter):
            hidden, below = self._roles.hidden_states_and_below(input_ids, self.layers, **rows.arguments)
        values = self.values(rows.take(hidden, positions_before(part)))
        whole = rows.split(below)
        found = {"prompt_below": whole[:, :width], "completion_below": whole[:, width:]}
        if not self._checked:  # by the states: the values of a head that starts at zero are all the same
            with self._roles.use(self._adapter):
                again = self._roles.hidden_states_of_top(below, self.layers, **rows.arguments)
            if not rows.split(again - hidden).norm() <= 1e-2 * rows.split(hidden).norm():
                raise ValueError(
                    "The upper layers of this model alone give other states than within the whole network, so it "
                    "changes what enters them. Leave `critic_layers` out."
                )
            self._checked = True
        return {"old_values": values, **found}

    def save(self, folder: str | Path) -> None:
        """Save the critic: as a sequence classifier, whole or as an adapter, or the head of a fully trained policy."""
        if self._model is not None:
            self._model.save_pretrained(str(folder))
        elif self._on_whole_policy:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(self._roles.heads[CRITIC].state_dict(), Path(folder) / _HEAD_FILE)
        else:
            self._roles.save_scalar_role(CRITIC, self._adapter, folder)
            Readout(bias=self._bias).save(folder)

    def check_saved(self, folder: str | Path) -> None:
        """Check that an adapter that `save` wrote is one as this critic has it.

        Raises:
            ValueError: If its weights would compute something else here.
        """
        if self._model is None and not self._on_whole_policy and is_adapter(folder):
            check_same_adapter(folder, self._roles.model, self._adapter, what="this run's critic")

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        if self._model is not None:
            saved = type(self._model).from_pretrained(str(folder), use_safetensors=True)
            self._model.load_state_dict(saved.state_dict())
        elif self._on_whole_policy:
            self._roles.heads[CRITIC].load_state_dict(load_file(Path(folder) / _HEAD_FILE))
        else:
            self._roles.load(folder, CRITIC, self._adapter)
            self._bias = Readout.load(folder).bias


def _classifier(given: str | Path | PreTrainedModel, policy: Any, args: PPOConfig) -> PreTrainedModel:
    model: Any = _loaded(str(given), args) if isinstance(given, str | Path) else given
    head = getattr(model, "score", None)
    if not isinstance(head, nn.Linear) or head.out_features != 1:
        raise ValueError(
            f"`critic_model` is a {type(model).__name__}, which has no score head of one output that reads each "
            "position. Give a decoder with `AutoModelForSequenceClassification` and `num_labels=1`."
        )
    known, needed = (each.get_input_embeddings().weight.size(0) for each in (model, policy))
    if known < needed:
        raise ValueError(
            f"The embeddings of `critic_model` end at {known - 1}, and those of the policy, whose tokens it reads, at "
            f"{needed - 1}. Give a critic with the policy's tokenizer, or call `resize_token_embeddings({needed})`."
        )
    positions_follow_mask(model)
    pack(model)
    if args.critic_init == "policy":
        nn.init.zeros_(head.weight)
    trained: PreTrainedModel = model.requires_grad_(True)
    return trained


def _loaded(path: str, args: PPOConfig) -> PreTrainedModel | PeftModel:
    """Load a classifier, with the adapter of a reward adapter's folder merged into it."""
    try:
        if is_adapter(path):
            return load_reward_model(path, args.adapter_tolerance, trust_remote_code=args.trust_remote_code)[0]
        return load_sequence_classifier(path, trust_remote_code=args.trust_remote_code)
    except OSError as error:
        raise FileNotFoundError(f"`critic_model` {path!r} cannot be loaded: {error}") from error
