"""Small language models from scratch, for machines that cannot download one: tokenizers, a Llama, and its training."""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import Tensor
from tqdm.auto import tqdm
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from rlhf_recipes.models.rows import pad_rows
from rlhf_recipes.models.states import language_model_loss

PAD, EOS, UNKNOWN = "<pad>", "<eos>", "<unk>"


def word_tokenizer(words: Sequence[str]) -> PreTrainedTokenizerFast:
    """Make a tokenizer with one token per word, for texts whose words are separated by spaces.

    Args:
        words: The vocabulary, each word once. Every other word becomes the unknown token.

    Returns:
        The tokenizer, with distinct padding and end tokens.

    Raises:
        ValueError: If a word comes twice, is empty or has a space in it.

    Example:
        >>> tokenizer = word_tokenizer(["hello", "world"])
        >>> tokenizer("hello big world <eos>").input_ids
        [3, 2, 4, 1]
    """
    vocabulary = {word: index for index, word in enumerate([PAD, EOS, UNKNOWN, *words])}
    if len(vocabulary) != len(words) + 3 or any(word.split() != [word] for word in words):
        raise ValueError("`words` must be distinct single words without spaces, and none of <pad>, <eos>, <unk>.")
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, unk_token=UNKNOWN, padding_side="left"
    )


def bpe_tokenizer(texts: Iterable[str], vocab_size: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer: every string can be encoded, and decoding gives it back.

    Source: https://huggingface.co/papers/1508.07909 over bytes, as in GPT-2.

    Args:
        texts: Texts to learn merges from.
        vocab_size: Number of tokens, special tokens included; at least 258 (all bytes, padding and end).

    Returns:
        The tokenizer, with distinct padding and end tokens.

    Raises:
        ValueError: If `vocab_size` cannot hold all bytes.

    Example:
        >>> tokenizer = bpe_tokenizer(["good film", "good play"], vocab_size=270)
        >>> tokenizer.decode(tokenizer("a good naïve film").input_ids)
        'a good naïve film'
    """
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    if vocab_size < len(alphabet) + 2:
        raise ValueError(f"`vocab_size` must be at least {len(alphabet) + 2} (all bytes, pad, eos), got {vocab_size}.")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size, special_tokens=[PAD, EOS], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token=PAD, eos_token=EOS, padding_side="left")


def tiny_llama(
    tokenizer: PreTrainedTokenizerFast,
    hidden_size: int = 128,
    layers: int = 3,
    heads: int = 4,
    intermediate_size: int | None = None,
    max_position_embeddings: int = 512,
) -> LlamaForCausalLM:
    """Make a small Llama with random weights (seed torch first) for a tokenizer.

    Args:
        tokenizer: Gives the vocabulary and the special tokens.
        hidden_size: Width `H`; a multiple of 64.
        layers: Number of transformer layers.
        heads: Number of attention heads; divides `hidden_size`.
        intermediate_size: Width of the MLP, a multiple of 64; `2 * hidden_size` by default.
        max_position_embeddings: Longest sequence, in tokens.

    Returns:
        The model, in float32, with generation settings that sample until the end token.

    Raises:
        ValueError: If a width is no multiple of 64, the block of 4-bit weights, or cannot be shared out to the heads.

    Example:
        >>> tiny_llama(word_tokenizer(["hello", "world"]), hidden_size=64, layers=1, heads=2).num_parameters()
        41792
    """
    intermediate_size = intermediate_size or 2 * hidden_size
    for name, width in (("hidden_size", hidden_size), ("intermediate_size", intermediate_size)):
        if width < 64 or width % 64:
            raise ValueError(f"`{name}` must be a multiple of 64, the block of 4-bit weights, got {width}.")
    if heads < 1 or hidden_size % (2 * heads):
        raise ValueError(f"`heads` must split `hidden_size` ({hidden_size}) into even parts, got {heads}.")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        max_position_embeddings=max_position_embeddings,
        pad_token_id=tokenizer.pad_token_id,
        eos_token_id=tokenizer.eos_token_id,
        bos_token_id=None,
        tie_word_embeddings=False,
        initializer_range=hidden_size**-0.5,
    )
    model = LlamaForCausalLM(config)
    model.generation_config = GenerationConfig(
        do_sample=True, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id
    )
    return model


def train_language_model(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    texts: Sequence[str],
    *,
    batch_size: int = 64,
    learning_rate: float = 3e-3,
    epochs: float = 1.0,
    max_length: int = 256,
    seed: int = 0,
) -> list[float]:
    """Train all weights of a small model on next-token prediction, with a progress bar.

    AdamW, 5 % warm-up, then linear decay to 0; gradients are clipped to norm 1. Every text gets an end token; texts
    longer than `max_length` tokens are cut into pieces of that length.

    Args:
        model: The model; trained in place and left in evaluation mode.
        tokenizer: Its tokenizer.
        texts: Documents.
        batch_size: Pieces of text per step.
        learning_rate: Highest learning rate.
        epochs: Passes over the texts; may be a fraction.
        max_length: Longest piece, in tokens.
        seed: Seed of the order of the batches.

    Returns:
        The loss of every step, in nats per token.

    Raises:
        ValueError: If there is no text, or less than one step would be made.

    Example:
        >>> tokenizer = word_tokenizer(["hello", "world"])
        >>> model = tiny_llama(tokenizer, hidden_size=64, layers=1, heads=2)
        >>> losses = train_language_model(model, tokenizer, ["hello world"] * 64, batch_size=8)
        >>> losses[-1] < losses[0]
        True
    """
    pieces = _pieces(tokenizer, texts, max_length)
    steps = round(epochs * len(pieces) / batch_size)
    if steps < 1:
        raise ValueError(f"{len(texts)} texts for {epochs} epochs at batch size {batch_size} make less than one step.")
    optimizer = torch.optim.AdamW(model.parameters(), lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.01)
    warmup = max(1, steps // 20)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min((step + 1) / warmup, (steps - step) / (steps - warmup + 1))
    )
    losses = []
    model.train()
    batches = _batches(pieces, batch_size, steps, random.Random(seed))
    progress = tqdm(batches, total=steps, desc="base model", disable=None)  # `None`: where it would not be a terminal
    for batch in progress:
        loss = _loss(model, batch, tokenizer.pad_token_id)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        progress.set_postfix(loss=f"{losses[-1]:.3f}")
    model.eval()
    return losses


@torch.no_grad()
def held_out_loss(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_length: int = 256
) -> float:
    """Mean loss over texts that were not trained on, in nats per token; `exp` of it is the perplexity.

    Raises:
        ValueError: If there is no text.
    """
    pieces = sorted(_pieces(tokenizer, texts, max_length), key=len)
    total, tokens, head = 0.0, 0, model.get_output_embeddings()
    for start in range(0, len(pieces), 64):
        batch = pieces[start : start + 64]
        ids, mask = pad_rows(batch, tokenizer.pad_token_id, model.device)
        states = model.base_model(input_ids=ids, use_cache=False).last_hidden_state
        count = sum(len(piece) - 1 for piece in batch)
        total += language_model_loss(states, ids, mask, head).item() * count
        tokens += count
    return total / tokens


def _pieces(tokenizer: PreTrainedTokenizerFast, texts: Sequence[str], max_length: int) -> list[list[int]]:
    documents: list[list[int]] = tokenizer([text + tokenizer.eos_token for text in texts]).input_ids if texts else []
    pieces = [ids[i : i + max_length] for ids in documents for i in range(0, len(ids), max_length)]
    pieces = [piece for piece in pieces if len(piece) > 1]  # one token predicts nothing
    if not pieces:
        raise ValueError("There is no text to train on or to measure: every document is empty.")
    return pieces


def _batches(pieces: list[list[int]], batch_size: int, steps: int, rng: random.Random) -> Iterator[list[list[int]]]:
    # Batches hold pieces of similar length, which saves almost half of the computation on short texts of mixed
    # lengths, and come in random order. Each pass over the texts makes new ones.
    batches: list[list[list[int]]] = []
    for _ in range(steps):
        if not batches:
            order = sorted(rng.sample(pieces, len(pieces)), key=len)
            batches = [order[start : start + batch_size] for start in range(0, len(order), batch_size)]
            rng.shuffle(batches)
        yield batches.pop()


def _loss(model: LlamaForCausalLM, batch: list[list[int]], pad_token_id: int) -> Tensor:
    rows = [torch.tensor(piece, device=model.device) for piece in batch]
    input_ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=pad_token_id)
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    # No attention mask is needed: padding is on the right, where a causal model does not look.
    loss: Tensor = model(input_ids=input_ids, labels=labels, use_cache=False).loss
    return loss
