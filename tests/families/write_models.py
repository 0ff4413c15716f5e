"""Write `docs/models.md` from the table of families: `python -m tests.families.write_models`."""

from pathlib import Path

import transformers

from tests.families.table import FAMILIES, REASONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_HEAD = """\
# Models

Any causal model of transformers can be tried. Each line below is a family that the tests take, with a tiny random
model, through SFT, the reward stage and PPO with both critics: `make test-slow` runs them all, `make test` a few
(`tests/families/`). What is said to work is held against single rows of plain transformers and PEFT:
log-probabilities, scores and values to 1e-5, and greedy texts, token by token.

A family that is not here is not refused. When a PPO trainer is built, it tries its policy out on two short texts
(`rlhf_recipes/ppo/trial.py`), and stops with the reason where the model would sample from other distributions than PPO
computes: after padded prompts, with a cache, in training, or because of an output layer that TRL does not know.

- **Dropout** of every kind is off in PPO with `disable_dropout` (the default), also rates that layers keep as numbers
  (OPT), `layerdrop`, and the random numbers of routers in training (PhiMoE, DBRX).
- **Experts**: PPO adds the router's auxiliary loss as TRL's GRPO does, with `router_aux_loss_coef` or, where that is
  not set, with the model's own coefficient (0.001 in most configurations), whatever its configuration says of
  `output_router_logits`. `router_aux_loss_coef: 0` turns it off. It is that of all tokens of a micro-batch, prompts
  included and padding left out, and is logged as `ppo/router_loss`. Where transformers computes no such loss, a
  coefficient is refused.
- **LoRA on all linear layers** (`all-linear`) leaves out the layers that LoRA cannot adapt: routers that give more
  than one tensor (PhiMoE), and those of Mamba that PEFT refuses. By name they are refused.
- **The exact KL** (`kl_estimator: full`) needs logits that are those of the output layer alone: it is refused with
  scaled or capped logits (Gemma 2, Granite, Cohere, Falcon-H1, ...), and right with a trained output layer.
- **The context** is `max_position_embeddings`, `n_positions`, `max_seq_len` or whatever the configuration calls it;
  Bloom, Mamba and others have no limit.
- **The upper layers of a critic** (`critic_layers`) need a decoder whose layers do the same whatever their number is:
  not Gemma 3 or others with windows in some layers only, unless the pattern fits.

Of {count} families, {whole} work in all stages, {ppo} in SFT and PPO, where the reward comes from elsewhere (a
function, a reward model of another family, a server). Tried with transformers {version}.

| family | `model_type` | what is special | SFT | reward adapter | PPO |
|---|---|---|---|---|---|
"""


def page():
    """The text of the page."""
    whole = ppo = 0
    lines, used = [], []

    def cell(reason):
        if reason is None:
            return "yes"
        if reason not in used:
            used.append(reason)
        return f"no ({used.index(reason) + 1})"

    for name, family in FAMILIES.items():
        stages = [family.load, family.load or family.reward, family.load or family.ppo]
        cells = [cell(stage) for stage in stages]
        if family.other_head:
            cells[1] = "a model of its own"
        whole += cells == ["yes"] * 3
        ppo += cells[2] == "yes" and cells[1] != "yes"
        lines.append(f"| {name} | `{family.kind}` | {' | '.join([family.note, *cells])} |\n")
    version = ".".join(transformers.__version__.split(".")[:2])
    head = _HEAD.format(count=len(FAMILIES), whole=whole, ppo=ppo, version=version)
    reasons = [f"{number}. {REASONS[reason]}\n" for number, reason in enumerate(used, 1)]
    return "".join([head, *lines, "\nWhy not:\n\n", *reasons])


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
