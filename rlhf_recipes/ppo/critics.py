"""The critic: what return to expect before each completion token.

`Critic` is what PPO asks of one. Three are here: an adapter of its own on the shared base, a head on the policy's own
states, and a model of its own. `build_critic` chooses by the configuration.

`B` sequences, `P` prompt tokens (padded on the left), `T` completion tokens (padded on the right), `H` hidden size.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from rlhf_recipes.models.adapters import POLICY, is_adapter
from rlhf_recipes.models.arguments import positions_follow_mask
from rlhf_recipes.models.packing import is_packed, pack
from rlhf_recipes.models.readout import Readout
from rlhf_recipes.models.resumed import check_same_adapter
from rlhf_recipes.models.reward import load_scoring_model
from rlhf_recipes.models.roles import CRITIC, CRITIC_MODEL, Roles
from rlhf_recipes.models.rows import Rows, Texts, scatter_rows
from rlhf_recipes.models.sharding import load_whole, whole_weights
from rlhf_recipes.models.top_layers import check_top_layers, only_read_in_last_layer
from rlhf_recipes.ppo.checks import check_classifier, check_critic

if TYPE_CHECKING:
    from rlhf_recipes.ppo.config import PPOConfig
    from rlhf_recipes.ppo.rollout import Rollout

_HEAD_FILE = "head.safetensors"


@dataclass(frozen=True)
class CriticRollout:
    """What a critic says of a rollout, without gradients.

    Attributes:
        values: Values before each completion token, in reward units, shape `(B, T)`.
        prompt_below: States that enter the trained layers, where those below are frozen, shape `(B, P, H)`.
        completion_below: The same of the completions, shape `(B, T, H)`.
    """

    values: Tensor
    prompt_below: Tensor | None = None
    completion_below: Tensor | None = None


class Critic(ABC):
    """What PPO asks of a critic. One of one's own needs `forward`, `save` and `load`.

    Attributes:
        network: The module that holds the trained parameters, where they are not among the roles'. The trainer makes
            it a submodule of the policy, so that the optimizer and DDP find it.
        reads_policy: Whether training reads the values from the policy's own states, in its pass, by `read`, and does
            not call `forward`.
    """

    network: nn.Module | None = None
    reads_policy: bool = False

    @abstractmethod
    def forward(self, texts: Rollout | Texts) -> Tensor:
        """Values before each completion token in reward units, shape `(B, T)`, with gradients where they are on.

        The value before a token belongs to the text so far: it must not depend on the token itself, nor on later ones.
        What it says of padding is not used.
        """

    @abstractmethod
    def save(self, folder: str | Path) -> None:
        """Save it in a folder of its own."""

    @abstractmethod
    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""

    def read(self, states: Tensor) -> Tensor:
        """Read values `(...)` from last hidden states of the policy `(..., H)`, with `reads_policy`."""
        raise NotImplementedError(f"{type(self).__name__} computes its values in a pass of its own, by `forward`.")

    @torch.no_grad()
    def rollout(self, texts: Texts, batch_size: int) -> CriticRollout:
        """Compute the values of a rollout, `batch_size` sequences of like length at a time."""
        parts = [(rows, self.forward(part)) for rows, part in texts.by_length(batch_size)]
        return CriticRollout(scatter_rows(parts, texts.completion_ids.size(1)))

    def set_trainable(self) -> None:
        """Switch gradients on for what is trained; everything is frozen before."""
        if self.network is not None:
            self.network.requires_grad_(True)

    def check_saved(self, folder: str | Path) -> None:
        """Check that a folder that `save` wrote is one as this critic writes; `load` may check the rest.

        Raises:
            ValueError: If it would compute something else here.
        """
        return


class _RoleCritic(Critic):
    """A critic that is a role on the shared base: an adapter, its own or the policy's, and a head."""

    def __init__(self, roles: Roles, adapter: str) -> None:
        self._roles, self._adapter = roles, adapter
        self._bias = 0.0  # of the normalised score that the critic starts from, which a head without bias cannot hold

    def read(self, states: Tensor) -> Tensor:
        """Values `(...)` from last hidden states `(..., H)`."""
        with torch.autocast(states.device.type, enabled=False):  # the network may run in 16 bits, the head does not
            return self._roles.apply_head(CRITIC, states) + self._bias

    def _values(self, texts: Texts, rows: Rows, base: Any, run: Callable[[], Tensor]) -> Tensor:
        """Values before each completion token of what `run` gives, last hidden states; the others are not computed."""
        positions = texts.positions_before
        read = rows.places(positions)[texts.completion_mask.bool()]
        with only_read_in_last_layer(base, read):
            hidden = run()
        return self.read(rows.gather(hidden, positions))

    def set_trainable(self) -> None:
        """Train the head, and the adapter if it is the critic's own."""
        self._roles.unfreeze(CRITIC)

    def save(self, folder: str | Path) -> None:
        """Save adapter and head as an adapter for sequence classification."""
        self._roles.save_scalar_role(CRITIC, self._adapter, folder)
        Readout(bias=self._bias).save(folder)

    def check_saved(self, folder: str | Path) -> None:
        """Check that a saved adapter is one as this critic has it."""
        if is_adapter(folder):
            check_same_adapter(folder, self._roles.model, self._adapter, what="this run's critic")

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        self._roles.load(folder, CRITIC, self._adapter)
        self._bias = Readout.load(folder).bias


class AdapterCritic(_RoleCritic):
    """An adapter of its own on the shared base, with a head.

    Separate adapters for policy and critic cost one more forward pass, and learn better than one adapter for both
    (Hydra-PPO, https://huggingface.co/papers/2309.00754).

    Args:
        roles: The roles on the shared base, to which the critic is added.
        source: Role whose adapter it starts as a copy of.
        layers: Upper layers in which the adapter is trained; `None`: all. The states that enter them are computed
            once for a rollout.

    Raises:
        ValueError: If the model has not so many layers, or cannot be run from the middle.
    """

    def __init__(self, roles: Roles, source: str, layers: int | None = None) -> None:
        super().__init__(roles, CRITIC)
        self._layers = layers
        self._checked = False  # whether the upper layers alone were compared with the network
        roles.add_copy(CRITIC, source=source)
        readout = roles.readouts.get(source, Readout())
        if source == POLICY or readout.readout != "last":  # a number of one token says nothing of the rest of the text
            roles.add_head(CRITIC)
        else:
            head: Any = roles.heads[source]
            roles.add_head(CRITIC, weight=readout.gain * head.weight)
            self._bias = readout.bias
        if layers is not None:
            check_top_layers(roles.model.get_base_model(), layers)

    def forward(self, texts: Rollout | Texts) -> Tensor:
        """Values before each completion token; with `layers` from the states that `rollout` kept."""
        rows, roles, layers = texts.rows(self._roles.packed), self._roles, self._layers

        def run() -> Tensor:
            """Last hidden states of all layers, or of the upper ones."""
            if layers is None:
                return roles.hidden_states(**texts.network_input(rows, roles.embeddings))
            below: Any = (texts.prompt_below, texts.completion_below)  # type: ignore[union-attr]  # a rollout
            return roles.hidden_states_of_top(rows.join(torch.cat(below, dim=1)), layers, **rows.arguments)

        with roles.use(CRITIC):
            return self._values(texts, rows, roles.model.get_base_model(), run)

    @torch.no_grad()
    def rollout(self, texts: Texts, batch_size: int) -> CriticRollout:
        """Values of a rollout, and with `layers` the states that enter the trained ones.

        Raises:
            ValueError: If the upper layers alone do not give what they give within the network.
        """
        if self._layers is None:
            return super().rollout(texts, batch_size)
        width, length = texts.prompt_ids.size(1), texts.completion_ids.size(1)
        parts = [(indices, self._values_and_below(part)) for indices, part in texts.by_length(batch_size)]
        values, prompt, completion = ([(indices, each[i]) for indices, each in parts] for i in range(3))
        below = scatter_rows(prompt, width, left=True), scatter_rows(completion, length)
        return CriticRollout(scatter_rows(values, length), *below)

    def _values_and_below(self, part: Texts) -> tuple[Tensor, Tensor, Tensor]:
        layers: Any = self._layers
        rows, width = part.rows(self._roles.packed), part.prompt_ids.size(1)
        with self._roles.use(CRITIC):
            hidden, below = self._roles.hidden_states_and_below(rows.join(part.ids), layers, **rows.arguments)
            if not self._checked:  # by the states: the values of a head that starts at zero are all the same
                again = self._roles.hidden_states_of_top(below, layers, **rows.arguments)
                if not rows.split(again - hidden).norm() <= 1e-2 * rows.split(hidden).norm():
                    raise ValueError(
                        "The upper layers of this model alone give other states than within the whole network, so it "
                        "changes what enters them. Leave `critic_layers` out."
                    )
                self._checked = True
        states = rows.split(below)
        return self.read(rows.gather(hidden, part.positions_before)), states[:, :width], states[:, width:]

    def set_trainable(self) -> None:
        """Train adapter and head, the adapter in the upper layers only where they are told."""
        super().set_trainable()
        if self._layers is not None:
            self._roles.freeze_below(CRITIC, self._layers)


class HeadCritic(_RoleCritic):
    """Only a head, on the policy's own last states. It costs almost nothing, and its loss trains the policy too.

    Args:
        policy: The policy, an adapter on the roles' base or a model that is trained as a whole.
        roles: The roles, to which the head is added; it starts at zero.
    """

    reads_policy = True

    def __init__(self, policy: PreTrainedModel | PeftModel, roles: Roles) -> None:
        super().__init__(roles, POLICY)
        self._policy, self._on_adapter = policy, policy is roles.model
        roles.add_head(CRITIC)

    def forward(self, texts: Rollout | Texts) -> Tensor:
        """Values before each completion token, in a pass of its own; training reads them in the policy's."""
        policy: Any = self._policy
        rows, trunk = texts.rows(is_packed(policy)), policy.get_base_model() if self._on_adapter else policy

        def run() -> Tensor:
            """Last hidden states of the policy."""
            tokens = texts.network_input(rows, policy.get_input_embeddings())
            hidden: Tensor = trunk.base_model(**tokens, use_cache=False).last_hidden_state
            return hidden

        with self._roles.use(POLICY):
            return self._values(texts, rows, trunk, run)

    def save(self, folder: str | Path) -> None:
        """Save the head, with the policy's adapter as an adapter for sequence classification."""
        if self._on_adapter:
            super().save(folder)
        else:
            Path(folder).mkdir(parents=True, exist_ok=True)
            save_file(self._roles.heads[CRITIC].state_dict(), Path(folder) / _HEAD_FILE)

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        if self._on_adapter:
            super().load(folder)
        else:
            load_whole(self._roles.heads[CRITIC], load_file(Path(folder) / _HEAD_FILE))


class ModelCritic(Critic):
    """A sequence classifier of its own, which reads each position.

    Args:
        model: A decoder for sequence classification with one output.
        vocabulary: Token ids that the policy's embeddings know.

    Raises:
        ValueError: If it is of another kind, or does not know the policy's tokens.
    """

    network: PreTrainedModel

    def __init__(self, model: Any, vocabulary: int) -> None:
        check_classifier(model, vocabulary)
        positions_follow_mask(model)
        pack(model)
        self.network = model

    def forward(self, texts: Rollout | Texts) -> Tensor:
        """Values before each completion token."""
        model: Any = self.network
        rows = texts.rows(is_packed(model))
        hidden = model.base_model(input_ids=rows.join(texts.ids), **rows.arguments, use_cache=False).last_hidden_state
        states = rows.gather(hidden, texts.positions_before)
        with torch.autocast(states.device.type, enabled=False):
            values: Tensor = model.score(states.to(model.score.weight.dtype))
        return values.float().sum(dim=-1)  # of one: FSDP does not like a view

    def save(self, folder: str | Path) -> None:
        """Save it as a sequence classifier."""
        self.network.save_pretrained(str(folder), state_dict=whole_weights(self.network))

    def load(self, folder: str | Path) -> None:
        """Read what `save` wrote."""
        saved = type(self.network).from_pretrained(str(folder), use_safetensors=True)
        load_whole(self.network, saved.state_dict())


def build_critic(
    policy: PreTrainedModel | PeftModel,
    roles: Roles,
    args: PPOConfig,
    reward_role: str | None = None,
    model: str | Path | PreTrainedModel | Critic | None = None,
) -> Critic:
    """Make the critic that the configuration asks for.

    Args:
        policy: The policy, to whose modules the critic's are added.
        roles: The roles on the shared base.
        args: The configuration: `critic`, `critic_init` and `critic_layers`.
        reward_role: The reward adapter to start from.
        model: For `critic="model"`: a sequence classifier with one output and the policy's tokenizer, or the path of
            one, or of an adapter of one; or a `Critic` of one's own. Else the folder of a critic of the same kind that
            goes on.

    Raises:
        ValueError: If what the critic is to start from is not there, or an option has no meaning for it.
    """
    check_critic(args, reward_role, model)
    critic: Critic
    if args.critic != "model":
        critic = _role_critic(policy, roles, args, reward_role)
        if model is not None:
            critic.check_saved(str(model))
            critic.load(str(model))
    elif isinstance(model, Critic):
        critic = model
    else:
        classifier: Any = model
        if isinstance(model, str | Path):
            classifier = load_scoring_model(str(model), args.adapter_tolerance, args.trust_remote_code)
        embeddings: Any = policy.get_input_embeddings()
        critic = ModelCritic(classifier, embeddings.weight.size(0))
        if args.critic_init == "policy":
            nn.init.zeros_(classifier.score.weight)
    if critic.network is not None:
        policy.add_module(CRITIC_MODEL, critic.network.to(policy.device))
    return critic


def _role_critic(
    policy: PreTrainedModel | PeftModel, roles: Roles, args: PPOConfig, reward_role: str | None
) -> _RoleCritic:
    if args.critic == "head":
        return HeadCritic(policy, roles)
    source = POLICY if args.critic_init == "policy" else reward_role or POLICY
    return AdapterCritic(roles, source, args.critic_layers)
