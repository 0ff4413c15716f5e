"""The floor of the speed benchmark: the generation and the passes that no trainer can do without."""

import torch
from speed_clock import Clock, seconds
from speed_world import DEVICE, LORA, dtype_of, load, prompts
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def floor(given, clock: Clock) -> None:
    """The same generation, forward and backward passes, and nothing else: what no trainer can do without.

    With `head` the critic reads the policy's hidden states; with `adapter` it has passes of its own. The old
    log-probabilities, the reference, the reward (and the critic's adapter) take one forward pass each.
    """
    from peft import LoraConfig, get_peft_model

    tokenizer = PreTrainedTokenizerFast.from_pretrained(given.world / "policy", padding_side="left")
    model = load(given.world, AutoModelForCausalLM, given.precision)
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA))
    texts, own = prompts(given.world)["prompt"], given.system == "floor_adapter"
    optimizer = torch.optim.AdamW([part for part in model.parameters() if part.requires_grad], lr=0.0)
    for update in range(given.updates):
        clock.begin()
        inputs = tokenizer(texts[update * given.batch : (update + 1) * given.batch], return_tensors="pt", padding=True)
        inputs = inputs.to(DEVICE)
        with torch.no_grad(), autocast(given):
            sequences = clock.timed(model.generate)(
                **inputs, max_new_tokens=given.completion_length, do_sample=True, top_k=0, top_p=1.0
            )
            length = sequences.size(1) - inputs["input_ids"].size(1)
            ends = (sequences[:, -length:] == tokenizer.eos_token_id).int()
            mask = torch.cat([inputs["attention_mask"], (ends.cumsum(1) - ends == 0).long()], dim=1)
            clock.tokens = int(mask.sum())
            for batch in zip(sequences.split(given.micro_batch), mask.split(given.micro_batch), strict=True):
                passes(model, batch, length, heads=2, trunks=2 if own else 1)
        for _ in range(given.epochs):
            clock.first_pass = clock.first_pass or seconds()
            for batch in zip(sequences.split(given.micro_batch), mask.split(given.micro_batch), strict=True):
                with autocast(given):
                    loss = passes(model, batch, length, heads=1, trunks=1 if own else 0)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            clock.last_step = seconds()
        clock.end()


def autocast(given):
    return torch.autocast(DEVICE, torch.bfloat16, enabled=dtype_of(given.precision) == torch.bfloat16)


def passes(model, batch, length, heads: int, trunks: int):
    """Run the model with its output layer, or its trunk alone, and return a loss over all of it."""
    ids, mask = batch
    loss = torch.zeros((), device=DEVICE)
    for _ in range(heads):
        logits = model(input_ids=ids, attention_mask=mask, logits_to_keep=length + 1).logits[:, :-1]
        loss = loss + torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), ids[:, -length:].flatten())
    for _ in range(trunks):
        loss = loss + model.get_base_model().model(input_ids=ids, attention_mask=mask).last_hidden_state.float().mean()
    return loss
