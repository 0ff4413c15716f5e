"""A base for the recipe's reward models: word vectors from the texts, and layers that pass their mean on.

python recipes/sentence_polarity/base.py --kind encoder --output_dir outputs/sentence_polarity/encoder_base
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_array
from scipy.sparse.linalg import svds
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from transformers import BertConfig, BertModel, LlamaForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rlhf_recipes.config import parse_stage
from rlhf_recipes.data import load_rows
from rlhf_recipes.models.tiny import tiny_llama, word_tokenizer
from rlhf_recipes.tracking import start_run

BERT_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]


@dataclass
class BaseArguments:
    """Kind and size of the model, and its texts."""

    kind: Literal["encoder", "decoder"] = field(metadata={"help": "encoder: BERT; decoder: Llama."})
    output_dir: str = field(metadata={"help": "A new folder for the model and its tokenizer."})
    dataset_name: str = field(
        default="outputs/sentence_polarity/data/texts",
        metadata={"help": "Dataset with a column `text`: words and marks with spaces between."},
    )
    vocab_size: int = field(default=16000, metadata={"help": "Words, at most: the most frequent ones."})
    hidden_size: int = field(default=128, metadata={"help": "Width, a multiple of 64."})
    layers: int = field(default=1, metadata={"help": "Number of layers."})
    heads: int = field(default=2, metadata={"help": "Number of attention heads."})
    dropout: float = field(default=0.5, metadata={"help": "Dropout of the encoder's layers. Llama has none."})
    attention_dropout: float = field(default=0.25, metadata={"help": "Share of the words that a text's score misses."})
    context_length: int = field(default=128, metadata={"help": "Longest sequence that the model is made for."})
    window: int = field(default=15, metadata={"help": "How far apart two words occur together, at most."})
    vector_std: float = field(default=0.05, metadata={"help": "Spread of the numbers in the word vectors."})
    seed: int = field(default=0, metadata={"help": "Seed of the random weights."})


ARGUMENTS = (BaseArguments,)


def main(args: BaseArguments) -> None:
    folder = Path(args.output_dir)
    if folder.exists():
        raise FileExistsError(f"{folder} is there already. Remove it, or choose another `--output_dir`.")
    texts = [text.split() for text in load_rows(args.dataset_name)["text"]]
    counts = Counter(chain.from_iterable(texts))
    words = [word for word, _ in counts.most_common(args.vocab_size) if word not in BERT_TOKENS]

    torch.manual_seed(args.seed)
    tokenizer, model = (encoder if args.kind == "encoder" else decoder)(words, args)
    vectors = args.vector_std * word_vectors(texts, words, args.hidden_size, args.window)
    rows = tokenizer.convert_tokens_to_ids(words)
    model.get_input_embeddings().weight.data[rows] = torch.tensor(vectors, dtype=torch.float32)
    model.config.initializer_range = 0.002  # a reward model's head starts near 0, not in a random direction

    start_run(stage="base", output_dir=args.output_dir, config=asdict(args), parent=args.dataset_name)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"{model.num_parameters():,} parameters, {len(words):,} words in {folder}")


def encoder(words: Sequence[str], args: BaseArguments) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Build a BERT of words as tokens, and its tokenizer, with the format of BERT: [CLS] prompt [SEP] answer [SEP]."""
    vocabulary = {word: index for index, word in enumerate([*BERT_TOKENS, *words])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    inner.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
    )
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "cls", "sep", "mask")}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="[SEP]", **special)
    config = BertConfig(
        vocab_size=len(vocabulary),
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        hidden_dropout_prob=args.dropout,
        attention_probs_dropout_prob=args.attention_dropout,
        max_position_embeddings=args.context_length,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = BertModel(config)
    for layer in model.encoder.layer:
        pass_on(layer.attention.self.value, layer.attention.output.dense)
    pass_on(model.pooler.dense)
    return tokenizer, model


def decoder(words: Sequence[str], args: BaseArguments) -> tuple[PreTrainedTokenizerFast, PreTrainedModel]:
    """Build a Llama whose tokens are words, and its tokenizer."""
    tokenizer = word_tokenizer(words)
    sizes = {"hidden_size": args.hidden_size, "layers": args.layers, "heads": args.heads}
    config = tiny_llama(tokenizer, **sizes, max_position_embeddings=args.context_length).config
    config.initializer_range = 0.02  # layers that start small do not drown the word vectors
    config.attention_dropout = args.attention_dropout
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        pass_on(layer.self_attn.v_proj, layer.self_attn.o_proj)
    return tokenizer, model


def pass_on(*linears: nn.Linear) -> None:
    """Let layers start as the identity: what attention then passes on is the mean of the words' vectors."""
    for linear in linears:
        nn.init.eye_(linear.weight)


def word_vectors(texts: Sequence[Sequence[str]], words: Sequence[str], size: int, window: int) -> NDArray[np.float64]:
    """Vectors of words by the company they keep, with a standard deviation of 1 over all numbers.

    Positive pointwise mutual information of words and neighbours (which count by 1 over their distance, with
    frequencies to the power of 0.75), reduced by a singular value decomposition.

    Source: https://huggingface.co/papers/1411.2738 is word2vec's account; Levy, Goldberg and Dagan, Improving
    Distributional Similarity with Lessons Learned from Word Embeddings (TACL 2015), is this method's.
    """
    if size >= len(words):
        raise ValueError(
            f"`hidden_size` is {size}, but the texts have only {len(words)} words. Give more texts, or less width."
        )
    index = {word: row for row, word in enumerate(words)}
    # Texts in one line, with gaps that no window reaches over; -1 is a gap or an unknown word.
    line = np.array([row for text in texts for row in [*(index.get(word, -1) for word in text), *[-1] * window]])
    near = csr_array((len(words), len(words)))
    for distance in range(1, window + 1):
        left, right = line[:-distance], line[distance:]
        known = (left >= 0) & (right >= 0)
        counts = csr_array((np.full(known.sum(), 1 / distance), (left[known], right[known])), shape=near.shape)
        near = near + counts + counts.T
    totals = near.sum(axis=1)
    context = totals**0.75 / (totals**0.75).sum()
    pairs = near.tocoo()
    information = np.log(pairs.data / (totals[pairs.row] * context[pairs.col]))
    positive = information > 0
    cells = (pairs.row[positive], pairs.col[positive])
    left_vectors, strengths, _ = svds(csr_array((information[positive], cells), shape=near.shape), k=size, rng=0)
    vectors = left_vectors * np.sqrt(strengths)
    return vectors / vectors.std()


if __name__ == "__main__":
    main(*parse_stage(ARGUMENTS))
