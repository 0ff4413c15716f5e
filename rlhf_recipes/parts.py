"""How many tokens are worked on at a time, where all at once would leave a CPU's cache or take too much memory."""

from __future__ import annotations

TILE_TOKENS, TILE_VOCABULARY = 4096, 32768  # that TRL's fused output layer makes logits of at a time
_OF_THE_MLP = 2**18  # numbers of one tensor that a CPU works on at a time
_OF_THE_OUTPUT = 2**19
_FEWEST = 32  # fewer make matrix products slow


def tokens_in_mlp(inner: int, device: str) -> int:
    """Tokens that a gated MLP of an inner width is computed for at a time.

    Args:
        inner: The width.
        device: `"cpu"` or another.

    Example:
        >>> tokens_in_mlp(1024, "cpu"), tokens_in_mlp(1024, "cuda")
        (256, 4096)
    """
    return max(_OF_THE_MLP // inner, _FEWEST) if device == "cpu" else TILE_TOKENS


def tokens_in_output(vocabulary: int, device: str) -> int:
    """Tokens that TRL's fused output layer scores at a time.

    On a GPU a kernel works on the tile of logits in place. On a CPU some ten operations each make another tile.

    Args:
        vocabulary: Number of tokens there are.
        device: `"cpu"` or another.

    Example:
        >>> tokens_in_output(2048, "cpu"), tokens_in_output(150_000, "cpu"), tokens_in_output(150_000, "cuda")
        (256, 32, 4096)
    """
    if device != "cpu":
        return TILE_TOKENS
    return max(_OF_THE_OUTPUT // min(vocabulary, TILE_VOCABULARY), _FEWEST)
