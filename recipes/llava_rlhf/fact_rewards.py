"""Rewards of the recipe: the correct-answer term of the paper, and what the twin's judge counts."""

from pictures import count_statements, note


def correct_answer(completions, caption_type, **kwargs):
    """Pay for an answer that can be checked by its letters: 1, 0.5, 0, or -0.5.

    A multiple-choice answer starts with the right letter, or names it as the correct option: 1. A question whose
    answer is no: 0.5 for "No", -0.5 for "Yes". Nothing for questions whose answer is yes, so that a policy does not
    learn to say it always, and nothing where any text may be right.

    Source: LLaVA-RLHF, https://github.com/llava-rlhf/LLaVA-RLHF, RLHF/models/ppo_trainer.py (weight 2).

    Args:
        completions: Texts, or lists with one message.
        caption_type: For each prompt `general`, the right letter `A` to `D`, `yes` or `no`.

    Example:
        >>> correct_answer(["B. A cat.", "No, it is not.", "Yes.", "Yes."], ["B", "no", "no", "yes"])
        [1.0, 0.5, -0.5, 0.0]
    """
    texts = [text if isinstance(text, str) else text[-1]["content"] for text in completions]
    return [_bonus(text.strip(), kind) for text, kind in zip(texts, caption_type, strict=True)]


def _bonus(answer: str, kind: str) -> float:
    if kind in ("A", "B", "C", "D"):
        return float(answer.startswith(f"{kind}.") or f"correct option is {kind}." in answer)
    if kind == "no":
        return 0.5 * answer.lower().startswith("no") - 0.5 * answer.lower().startswith("yes")
    if kind in ("general", "yes"):
        return 0.0
    raise ValueError(f"`caption_type` must be 'general', 'A' to 'D', 'yes' or 'no', got {kind!r}.")


def gold(completions, caption_type, facts, **kwargs):
    """True minus false statements: what the simulated annotator prefers."""
    return [float(note(*row)) for row in zip(completions, caption_type, facts, strict=True)]


def stated(completions, caption_type, facts, **kwargs):
    """Attributes that a description states."""
    return _counts(completions, caption_type, facts, 0)


def hallucinated(completions, caption_type, facts, **kwargs):
    """Attributes that a description states and that are not true."""
    return _counts(completions, caption_type, facts, 1)


def _counts(completions, caption_type, facts, place):
    rows = zip(completions, caption_type, facts, strict=True)
    return [float(count_statements(text, own)[place]) if kind == "general" else None for text, kind, own in rows]
