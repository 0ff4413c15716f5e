"""Policy, reference, critic and reward as adapters on one base model.

Every role is a named PEFT adapter on the same (4-bit) base; a role that returns a number has a head besides.
`B` sequences, `L` tokens (prompt padded on the left, completion on the right), `H` hidden size.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict, set_peft_model_state_dict
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils import AuxiliaryTrainingWrapper
from safetensors.torch import save_file
from torch import Tensor, nn

from rlhf_recipes.models.adapters import (
    HEAD_KEY,
    POLICY,
    WEIGHTS,
    load_weights,
    name_base_absolutely,
    read_adapter,
    read_policy,
    set_weights,
)
from rlhf_recipes.models.image_embeddings import EmbeddedPrompt, Pixels, embed_prompts
from rlhf_recipes.models.loading import HEAD_MODULES
from rlhf_recipes.models.packing import is_packed
from rlhf_recipes.models.plain_lora import changes_base
from rlhf_recipes.models.rows import Texts
from rlhf_recipes.models.sharding import load_whole, whole_weights
from rlhf_recipes.models.top_layers import decoder_layers, only_top, states_below
from rlhf_recipes.models.trained_on import OF_THE_SPREAD, TOLERANCE, check_trained_on, log_probs

if TYPE_CHECKING:
    from rlhf_recipes.models.readout import Readout

REFERENCE, CRITIC = "ref", "critic"
CRITIC_MODEL = "critic_model"  # the submodule of the policy that is a critic of its own
FROZEN = "frozen_base"  # the submodule of a fully trained policy that carries the other roles
_active: ContextVar[tuple[Roles, str | None] | None] = ContextVar("active_role", default=None)


def is_critic_parameter(name: str) -> bool:
    """Return whether a parameter of the policy's module tree belongs to the critic.

    Example:
        >>> is_critic_parameter("base_model.model.lm_head.lora_A.critic.weight"), is_critic_parameter("lm_head.weight")
        (True, False)
    """
    return f".{CRITIC}." in f".{name}" or name.startswith(f"{CRITIC_MODEL}.")


def checkpoint_contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
    """Give gradient checkpointing the role of the forward pass back when it recomputes it.

    Pass it as `context_fn` to `torch.utils.checkpoint.checkpoint` (with `use_reentrant=False`). Without it a layer is
    recomputed during the backward pass with whatever adapter is active then, and the critic's gradient is silently
    wrong.

    Returns:
        The contexts of the forward pass and of its recomputation.
    """
    active = _active.get()
    return nullcontext(), nullcontext() if active is None else active[0].use(active[1])


class Roles:
    """The adapters and heads on one base, and the switch between them.

    Args:
        model: A PEFT model whose adapter `"default"` is the policy.

    Attributes:
        model: The same model.
        heads: Heads by role, linear layers from `H` to 1 without bias. They are a submodule of the model too, so that
            the optimizer finds them.
        readouts: By role, what makes a head's raw numbers a score. The methods here return the raw numbers.
    """

    def __init__(self, model: PeftModel) -> None:
        self.model = model
        self.model.heads = self.heads = nn.ModuleDict()
        self.readouts: dict[str, Readout] = {}
        self._base: Any = model.get_base_model()
        self._find_layers()

    def add_copy(self, role: str, source: str = POLICY) -> None:
        """Add an adapter with the same configuration and weights as another (frozen until it is made trainable)."""
        self._add(role, copy.deepcopy(self.model.peft_config[source]))
        weights = get_peft_model_state_dict(self.model, adapter_name=source)
        set_peft_model_state_dict(self.model, {key: value.clone() for key, value in weights.items()}, role)

    def add_policy(self, role: str, path: str | Path, tolerance: float = TOLERANCE) -> None:
        """Add a saved policy, such as the reference that a policy which goes on is held to; frozen.

        Args:
            role: Name of the new role.
            path: Folder of the saved adapter.
            tolerance: As of `load_policy`.

        Raises:
            FileNotFoundError: If the folder holds no adapter.
            ValueError: As of `load_policy`.
        """
        config, weights = read_policy(path, self._base)
        self._add(role, config)
        set_weights(self.model, weights, role, path)
        with self.use(role):
            check_trained_on(path, self.model, log_probs, "nats per token", tolerance)

    def add_scalar_role(self, role: str, path: str | Path, tolerance: float = TOLERANCE) -> None:
        """Add a reward model that was saved as an adapter for sequence classification: its adapter and its head.

        Args:
            role: Name of the new role.
            path: Folder of the saved adapter.
            tolerance: How far the scores may be from those that the adapter gave on the base of its training, where
                that was quantized in another way or of another precision, as a share of their spread.

        Raises:
            FileNotFoundError: If the folder holds no adapter.
            ValueError: If the adapter belongs to another base, or holds no score head, or the base is not what it was.
        """
        policy: Any = self.model.peft_config[POLICY]
        if changes_base(policy):
            raise ValueError(
                f"The policy's adapter was started with `init_lora_weights: {policy.init_lora_weights}`, which took a "
                f"part of the base out of it: the reward adapter in {str(path)!r} would no longer read the base that "
                "it was trained on. Give the policy as the folder of its adapter, or start it with "
                "`init_lora_weights: true`."
            )
        config, weights = read_adapter(path, self._base)
        # The score head is kept outside of the adapter, because the causal model beneath has no module for it.
        others = [name for name in config.modules_to_save or [] if name not in HEAD_MODULES]
        config.task_type, config.modules_to_save, config.inference_mode = "CAUSAL_LM", others or None, False
        self._add(role, config)
        set_weights(self.model, weights, role, path)
        if HEAD_KEY not in weights:
            raise ValueError(
                f"The adapter in {str(path)!r} holds no score head ({HEAD_KEY}), so it gives no reward. Train reward "
                "models with LoRA's `task_type='SEQ_CLS'`, which is the type that saves the head."
            )
        self.add_head(role, weights[HEAD_KEY])
        check_trained_on(
            path, self.model, lambda _, row: self.scores(role, [list(row)], 0, 1).tolist(), OF_THE_SPREAD, tolerance
        )

    def add_head(self, role: str, weight: Tensor | None = None) -> None:
        """Add a head to a role: a copy of `weight` (1, H), or zeros, which give 0 for everything at first."""
        # OPT's last states may be narrower than its layers
        head = nn.Linear(self._base.get_output_embeddings().weight.size(1), 1, bias=False)
        with torch.no_grad():
            head.weight.zero_() if weight is None else head.weight.copy_(weight)
        self.heads[role] = head.requires_grad_(False).to(self.model.device)

    def set_trainable(self, *roles: str) -> None:
        """Train the adapters and heads of these roles and nothing else."""
        self.model.requires_grad_(False)
        for role in roles:
            self.unfreeze(role)

    def unfreeze(self, role: str) -> None:
        """Train the adapter and the head of a role too."""
        if role in self.model.peft_config:
            self.model.set_requires_grad(role, True)
        if role in self.heads:
            self.heads[role].requires_grad_(True)

    @contextmanager
    def use(self, role: str | None) -> Iterator[None]:
        """Compute with the adapter of a role; `None` computes with the bare base.

        PEFT's own `set_adapter` and `disable_adapter` also freeze every other adapter: the gradient of the critic
        would be exactly 0, silently. This switch leaves `requires_grad` alone.
        """
        previous = [layer._active_adapter for layer in self._layers]
        token = _active.set((self, role))
        for layer in self._layers:
            layer._active_adapter = [] if role is None else [role]
        try:
            yield
        finally:
            for layer, names in zip(self._layers, previous, strict=True):
                layer._active_adapter = names
            _active.reset(token)

    @property
    def packed(self) -> bool:
        """True if the base reads texts packed one after another."""
        return is_packed(self._base)

    @property
    def embeddings(self) -> Any:
        """The base's embeddings of tokens."""
        return self._base.get_input_embeddings()

    def hidden_states(self, input_ids: Tensor | None = None, **arguments: Any) -> Tensor:
        """Last hidden states (B, L, H) under the adapter in use, without the language model's head.

        Args:
            input_ids: Token ids as `Rows.join` gives them, (B, L) or (1, N); or `inputs_embeds` among the arguments.
            arguments: Those of the rows: their mask, or where each text begins.
        """
        outputs = self._base.base_model(input_ids=input_ids, **arguments, use_cache=False)
        hidden_states: Tensor = outputs.last_hidden_state
        return hidden_states

    def hidden_states_and_below(self, input_ids: Tensor, count: int, **arguments: Any) -> tuple[Tensor, Tensor]:
        """Last hidden states (B, L, H), and the states (B, L, H) that enter the upper `count` layers."""
        with states_below(self._base, count) as below:
            hidden_states = self.hidden_states(input_ids, **arguments)
        return hidden_states, below[0]

    def hidden_states_of_top(self, below: Tensor, count: int, **arguments: Any) -> Tensor:
        """Last hidden states (B, L, H) from those that enter the upper `count` layers, without running the others."""
        with only_top(self._base, count):
            outputs = self._base.base_model(inputs_embeds=below, **arguments, use_cache=False)
        hidden_states: Tensor = outputs.last_hidden_state
        return hidden_states

    def freeze_below(self, role: str, count: int) -> None:
        """Train a role's adapter in the upper `count` layers only."""
        upper = {id(parameter) for parameter in decoder_layers(self._base)[-count:].parameters()}
        for name, parameter in self.model.named_parameters():
            if f".{role}." in name and not name.startswith("heads.") and id(parameter) not in upper:
                parameter.requires_grad_(False)

    def apply_head(self, role: str, hidden_states: Tensor) -> Tensor:
        """Read a role's number at every position: (B, L, H) -> (B, L), in float32."""
        values: Tensor = self.heads[role](hidden_states.float())
        return values.squeeze(-1)

    def embed_prompts(self, prompt_ids: list[list[int]], pixels: list[Pixels | None]) -> list[EmbeddedPrompt]:
        """Embed prompts with pictures, which are the same for every role (`image_embeddings.py`)."""
        return embed_prompts(self._base, prompt_ids, pixels)

    def scores(self, role: str, sequences: list[list[int]], pad_token_id: int, batch_size: int) -> Tensor:
        """Score whole token sequences with a reward role, shape `(B,)`; the arguments are those of `prefix_scores`."""
        return torch.stack([prefix[-1] for prefix in self.prefix_scores(role, sequences, pad_token_id, batch_size)])

    @torch.no_grad()
    def prefix_scores(
        self,
        role: str,
        sequences: list[list[int]],
        pad_token_id: int,
        batch_size: int,
        embedded: list[EmbeddedPrompt] | None = None,
    ) -> list[Tensor]:
        """Read a reward role's score of every prefix of token sequences, in one forward pass.

        Args:
            role: A role with a head.
            sequences: Token ids of prompt and completion, with the end-of-sequence token where it was produced.
            pad_token_id: Any id; padded positions are masked.
            batch_size: Sequences per forward pass.
            embedded: Prompts with pictures, which are read in place of the first `P` ids; `None` without pictures.

        Returns:
            For each sequence the scores after each of its tokens, shape `(L,)`; the last is the sequence's score.
        """
        scores: dict[int, Tensor] = {}
        order = sorted(
            range(len(sequences)), key=lambda row: -len(sequences[row])
        )  # rows of like length: less padding
        with self.use(role):
            for start in range(0, len(sequences), batch_size):
                chunk = order[start : start + batch_size]
                texts = self._texts(sequences, chunk, pad_token_id, embedded)
                rows = texts.rows(self.packed)
                values = self.apply_head(role, self.hidden_states(**texts.network_input(rows, self.embeddings)))
                masks = torch.cat([texts.prompt_mask, texts.completion_mask], dim=1).bool()
                by_row = zip(chunk, rows.split(values), masks, strict=True)
                scores |= {row: numbers[mask] for row, numbers, mask in by_row}
        return [scores[row] for row in range(len(sequences))]

    @torch.no_grad()
    def last_token_attention(
        self,
        role: str,
        sequences: list[list[int]],
        pad_token_id: int,
        batch_size: int,
        embedded: list[EmbeddedPrompt] | None = None,
    ) -> list[Tensor]:
        """Attention of each sequence's last token in the last layer, averaged over the heads.

        Args:
            role: The role whose adapter is used.
            sequences: Token ids.
            pad_token_id: Any id; padded positions are masked.
            batch_size: Sequences per forward pass.
            embedded: As of `prefix_scores`.

        Returns:
            For each sequence the attention to each of its tokens, shape `(L,)`, with sum 1.
        """
        layer = [module for module in self._base.modules() if type(module).__name__.endswith("Attention")][-1]
        kernel = self._base.config._attn_implementation
        captured: list[Tensor] = []
        handle = layer.register_forward_hook(lambda *args: captured.append(args[-1][1]))
        self._base.set_attn_implementation("eager")  # the only kernel that returns its weights
        attention: list[Tensor] = []
        try:
            with self.use(role):
                for start in range(0, len(sequences), batch_size):
                    chunk = sequences[start : start + batch_size]
                    captured.clear()
                    texts = self._texts(sequences, range(start, start + len(chunk)), pad_token_id, embedded)
                    self.hidden_states(**texts.network_input(texts.rows(packed=False), self.embeddings))
                    weights = captured[0].float().mean(dim=1)
                    attention.extend(weights[i, len(ids) - 1, : len(ids)] for i, ids in enumerate(chunk))
        finally:
            self._base.set_attn_implementation(kernel)
            handle.remove()
        return attention

    def _texts(
        self,
        sequences: list[list[int]],
        indices: Sequence[int],
        pad_token_id: int,
        embedded: list[EmbeddedPrompt] | None,
    ) -> Texts:
        """Some of the sequences, those without embedded prompts as prompts without completions."""
        chosen = [sequences[index] for index in indices]
        prompts = None if embedded is None else [embedded[index] for index in indices]
        starts = [len(ids) for ids in chosen] if prompts is None else [len(prompt.embeds) for prompt in prompts]
        before = [ids[:start] for ids, start in zip(chosen, starts, strict=True)]
        after = [ids[start:] for ids, start in zip(chosen, starts, strict=True)]
        return Texts.padded(before, after, pad_token_id, self.model.device, prompts)

    def save_policy(self, folder: str | Path) -> None:
        """Save the policy's adapter in PEFT's format (`peft.AutoPeftModelForCausalLM` loads it)."""
        name_base_absolutely(self.model)
        weights = whole_weights(self.model)
        self.model.save_pretrained(str(folder), selected_adapters=[POLICY], state_dict=weights)

    def save_scalar_role(self, role: str, adapter: str, folder: str | Path) -> None:
        """Save a role with a head in the format of reward models (sequence classification, head included).

        Args:
            role: The role whose head is saved.
            adapter: The adapter it reads from: its own, or the policy's for a head on the policy's trunk.
            folder: Where to.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        weights = get_peft_model_state_dict(self.model, whole_weights(self.model), adapter)
        head = self.heads[role].weight
        save_file(
            {key: value.detach().cpu().contiguous() for key, value in {**weights, HEAD_KEY: head}.items()},
            folder / WEIGHTS,
            metadata={"format": "pt"},
        )
        name_base_absolutely(self.model)
        config: Any = copy.deepcopy(self.model.peft_config[adapter])
        modules_to_save = ["classifier", "score", *(config.modules_to_save or [])]
        config.task_type, config.modules_to_save, config.inference_mode = "SEQ_CLS", modules_to_save, True
        config.save_pretrained(str(folder))

    def load(self, folder: str | Path, role: str, adapter: str) -> None:
        """Load the weights of an existing role again, as `save_policy` or `save_scalar_role` wrote them."""
        weights = load_weights(self.model, folder, adapter)
        if role in self.heads:
            load_whole(self.heads[role], {"weight": weights[HEAD_KEY]})

    def _add(self, role: str, config: PeftConfig) -> None:
        if isinstance(config, LoraConfig):  # its weights follow; a start such as PiSSA's would change the base for all
            config.init_lora_weights = True
        self.model.add_adapter(role, config)
        self._find_layers()

    def _find_layers(self) -> None:
        self._layers: list[Any] = [
            m for m in self.model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)
        ]
