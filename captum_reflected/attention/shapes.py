"""Checks by their shapes whether attention maps can be rolled out."""

from __future__ import annotations

from collections.abc import Sequence

from captum_reflected.errors import UnsupportedModelError

# As many prefix tokens as any published model has (one class token and 16 registers). With more,
# a layout could not be inferred reliably.
MAX_PREFIX_TOKENS = 17


def check_shapes(shapes: Sequence[tuple[int, ...]], batch_size: int) -> None:
    """Checks that attention maps can be rolled out.

    Args:
        shapes: the shapes of all maps, in forward order.
        batch_size: B.

    Raises:
        UnsupportedModelError: the maps cannot be rolled out; the message says why.
    """
    if not shapes:
        raise UnsupportedModelError(
            "no self-attention was seen in forward_func; wanted: a Vision Transformer that runs "
            "scaled_dot_product_attention, softmax attention or nn.MultiheadAttention in "
            "eager mode. Convolutional networks have no attention, and modules of torch.jit and "
            "torch.export hide it"
        )
    if reason := _unsupported_reason(shapes, batch_size):
        unique = list(dict.fromkeys(shapes))
        more = ", ..." if len(unique) > 6 else ""
        raise UnsupportedModelError(
            f"{reason}: the attention maps of forward_func have shapes "
            f"{', '.join(map(str, unique[:6]))}{more} for {batch_size} image(s); wanted: in every "
            f"layer one N x N map of all tokens per head and image, shape ({batch_size}, h, N, N). "
            "If these are several models, token_layout says which one to explain"
        )


def has_tokens(shape: tuple[int, ...], num_tokens: int) -> bool:
    """Whether a map is self-attention among N tokens, or may pool them into the output."""
    queries, keys = shape[-2:]
    if queries == keys:
        return keys == num_tokens
    without_prefix = num_tokens - MAX_PREFIX_TOKENS <= keys <= num_tokens
    return without_prefix or keys == queries + num_tokens


def _unsupported_reason(shapes: Sequence[tuple[int, ...]], batch_size: int) -> str | None:
    """Why maps of these shapes cannot be rolled out; ``None`` if they can."""
    square = [shape for shape in shapes if shape[-1] == shape[-2]]
    pooling = shapes[len(square) :]
    if any(len(shape) == 3 for shape in shapes):
        return "images and heads of the attention are one dimension, so they cannot be told apart"
    if any(len(shape) > 4 or shape[0] != batch_size for shape in shapes):
        return "the model attends inside windows or groups of tokens"
    if len({shape[-1] for shape in square}) > 1:
        return "there are several sets of tokens, or attention is between channels"
    if not square or any(shape[-1] == shape[-2] for shape in pooling):
        return "queries and keys of the model are different tokens"
    if len(set(square)) > 1:
        return "the number of heads changes, as between stages with different tokens"
    tokens = square[0][-1]
    if not all(has_tokens(shape, tokens) for shape in pooling):
        return "the answer is read out of another set of tokens, or attention is between channels"
    if len({shape[-2:] for shape in pooling}) > 1 and any(shape[-1] > tokens for shape in pooling):
        return "the answer is read out by attention of several kinds"
    return None
