"""Write `docs/models.md` from the table of families: `python -m tests.families.write_models`."""

from pathlib import Path

import transformers

from tests.families.table import FAMILIES, NO_CLASSIFIER, REASONS

PAGE = Path(__file__).resolve().parents[2] / "docs" / "models.md"
_PAGE = """\
# Models

Any causal model of transformers can be tried. The tables name the families that the tests take, with a tiny random
model, through SFT, the reward stage and PPO with both critics: `make test-slow` runs all, `make test` a few
(`tests/families/`). Log-probabilities, scores and values are held to 1e-5 against single rows of plain transformers
and PEFT, and greedy texts token by token.

A family that is not here is not refused. A PPO trainer tries its policy out on two short texts when it is built
(`rlhf_recipes/ppo/trial.py`), and stops with the reason where the model would sample from other distributions than PPO
computes: after padded prompts, with a cache, in training, or because of an output layer that TRL does not know.

- **Dropout** of every kind is off in PPO with `disable_dropout` (the default), also rates that layers keep as numbers
  (OPT), `layerdrop`, and the random numbers of routers in training (PhiMoE, DBRX).
- **Experts**: PPO adds the router's auxiliary loss with `router_aux_loss_coef` or, where that is not set, the model's
  own coefficient (0.001 in most configurations), whatever `output_router_logits` says. 0 turns it off. The loss is
  over all tokens of a micro-batch, prompts included and padding left out, and logged as `ppo/router_loss`. Where
  transformers computes no such loss, a coefficient is refused.
- **LoRA on all linear layers** (`all-linear`) leaves out the layers that LoRA cannot adapt: routers that give more
  than one tensor (PhiMoE), and those of Mamba that PEFT refuses. By name they are refused.
- **The exact KL** (`kl_estimator: full`) is refused with scaled or capped logits (Gemma 2, Granite, Cohere, Falcon-H1,
  ...); a trained output layer is fine.
- **The context** is `max_position_embeddings`, `n_positions`, `max_seq_len` or whatever the configuration calls it;
  Bloom, Mamba and others have no limit.
- **The upper layers of a critic** (`critic_layers`) need a decoder whose layers do the same whatever their number is:
  not Gemma 3 or others with windows in some layers only, unless the pattern fits.

Tried with transformers {version}: {count} variants of families, each named by its `model_type`.

## All stages: {everywhere}

{everywhere_table}
## SFT and PPO: {no_adapter}

Of these transformers has no sequence classifier. Their reward comes from elsewhere: a function, a reward model of
another family, a server.

{no_adapter_table}
## With pictures

Vision-language models that all stages read [pictures](ppo.md#pictures) with, each held with a tiny random model and
its own processor to what transformers makes of single rows: states and logits to 2e-5, packed, padded and in batches,
and greedy texts token by token (`tests/models/test_vision_families.py`, `tests/ppo/test_images.py`).

| `model_type` | what is special | tested |
|---|---|---|
| `llava` | a picture has one size | all stages, to the end of the recipe |
| `qwen2_5_vl` | positions on a grid, pictures of any size | all stages, to the end of the recipe and from its YAMLs |
| `qwen2_vl` | the same | states, texts, the score head, PPO |
| `internvl` | a picture is cut into tiles | the same |
| `idefics3` | the same | the same |
| `smolvlm` | the same; its processor needs torchvision and num2words | the same, with Idefics3's processor |
| `gemma3` | the tokens of a picture attend to each other; not packed | the same |

Others are refused by name. Instead of Qwen3-VL, whose pictures also enter deeper layers, take Qwen2.5-VL; of
PaliGemma, whose whole prompt attends in both directions, Gemma 3; of LLaVA-NeXT, LLaVA or Qwen2.5-VL. Mistral 3's
processor needs torchvision, without which it was not tried.

## The others: {others}

"A model of its own": its classifier reads something else than the last token, so that a reward model of this family is
no adapter on the policy's base.

{others_table}"""


def _grouped(families):
    """Table of model types by what is special about them."""
    types = {"nothing": []}
    for family in families:
        types.setdefault(family.note or "nothing", []).append(f"`{family.kind}`")
    rows = [f"| {note} | {', '.join(kinds)} |\n" for note, kinds in types.items()]
    return "".join(["| what is special | `model_type` |\n|---|---|\n", *rows])


def _stages(family):
    """Reasons why SFT, the reward stage and PPO refuse a family; `None` where they take it."""
    return [family.load, family.load or family.reward, family.load or family.ppo]


def _exceptions(families):
    """Table of model types with what each stage does with them, and the numbered reasons below."""
    used = []

    def cell(reason):
        if reason is None:
            return "yes"
        if reason not in used:
            used.append(reason)
        return f"no ({used.index(reason) + 1})"

    lines = []
    for family in families:
        cells = [cell(reason) for reason in _stages(family)]
        if family.other_head:
            cells[1] = "a model of its own"
        lines.append(f"| `{family.kind}` | {' | '.join([family.note, *cells])} |\n")
    reasons = [f"{number}. {REASONS[reason]}\n" for number, reason in enumerate(used, 1)]
    header = "| `model_type` | what is special | SFT | reward adapter | PPO |\n|---|---|---|---|---|\n"
    return "".join([header, *lines, "\nWhy not:\n\n", *reasons])


def page():
    """The text of the page."""
    everywhere, no_adapter, others = [], [], []
    for family in FAMILIES.values():
        if _stages(family) == [None] * 3 and not family.other_head:
            everywhere.append(family)
        elif _stages(family) == [None, NO_CLASSIFIER, None]:
            no_adapter.append(family)
        else:
            others.append(family)
    return _PAGE.format(
        version=".".join(transformers.__version__.split(".")[:2]),
        count=len(FAMILIES),
        everywhere=len(everywhere),
        no_adapter=len(no_adapter),
        others=len(others),
        everywhere_table=_grouped(everywhere),
        no_adapter_table=_grouped(no_adapter),
        others_table=_exceptions(others),
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
