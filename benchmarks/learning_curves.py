"""Held-out evaluation of the weights that a run kept: one function for both sides of the learning benchmark."""

import json
from pathlib import Path

import torch
from learning_world import load_policy, praise_share, read_praise, read_prompts, read_settings
from safetensors.torch import load_file

SAMPLING_SEED = 7  # the same draws for every policy


@torch.no_grad()
def evaluate(policy, reference, prompt_ids, praise, settings):
    """Sample one completion per prompt, and measure it.

    Args:
        policy: The policy.
        reference: What it started from.
        prompt_ids: Held-out prompts, padded on the left, shape `(B, P)`.
        praise: Token ids that the reward rule counts.
        settings: Length, temperature and scale of the score.

    Returns:
        Means over the completions: `score` in reward units; `kl`, in nats per completion, the exact KL of the two
        next-token distributions, summed over the completion's tokens; and `length` in tokens.
    """
    torch.manual_seed(SAMPLING_SEED)
    eos, pad, start = policy.config.eos_token_id, policy.config.pad_token_id, prompt_ids.size(1)
    prompt_mask = (prompt_ids != pad).long()
    sequences = policy.generate(
        input_ids=prompt_ids,
        attention_mask=prompt_mask,
        do_sample=True,
        top_k=0,
        temperature=settings.temperature,
        max_new_tokens=settings.completion_length,
    )
    completions = sequences[:, start:]
    ended = (completions == eos).long()
    mask = ended.cumsum(dim=1) - ended == 0  # up to the end token, with it
    rows = [row[counts].tolist() for row, counts in zip(completions, mask, strict=True)]
    attention_mask = torch.cat([prompt_mask, mask.long()], dim=1)
    inputs = {
        "attention_mask": attention_mask,
        "position_ids": (attention_mask.cumsum(dim=1) - 1).clamp(min=0),
    }
    logps, reference_logps = (
        (model(sequences, **inputs).logits[:, start - 1 : -1] / settings.temperature).log_softmax(dim=-1)
        for model in (policy, reference)
    )
    kl = (logps.exp() * (logps - reference_logps)).sum(dim=-1).masked_fill(~mask, 0.0).sum(dim=1)
    scores = [settings.score_scale * praise_share(row, praise) for row in rows]
    return {
        "score": sum(scores) / len(scores),
        "kl": kl.mean().item(),
        "length": mask.sum(dim=1).float().mean().item(),
    }


def curve(folder, name):
    """Evaluate what the run `name` kept: one row for each update, the first one before any; made once, then read."""
    run = Path(folder) / "runs" / name
    if not (run / "curve.json").exists():
        settings, policy, reference = read_settings(folder), load_policy(folder), load_policy(folder)
        prompt_ids = torch.tensor([row["input_ids"] for row in read_prompts(folder, "test")])
        measured = (prompt_ids, read_praise(folder), settings)
        rows = [{"update": 0} | evaluate(policy, reference, *measured)]
        for file in sorted(run.glob("update_*.safetensors")):
            policy.load_state_dict(load_file(file))
            rows.append({"update": int(file.stem.removeprefix("update_"))} | evaluate(policy, reference, *measured))
        (run / "curve.json").write_text(json.dumps(rows))
    return json.loads((run / "curve.json").read_text())
