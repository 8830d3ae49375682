"""What the attributors have in common: checks, the recorded attention, the map."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

import torch
from captum.attr import LayerAttribution
from torch import Tensor

from captum_reflected.attention.recording import Recorded, attention_maps, check_finite
from captum_reflected.attention.tokens import (
    TokenLayout,
    resolve_layout,
    resolve_readout,
    stated_readout,
)
from captum_reflected.attention.verification import (
    check_layout,
    examine,
    warn_of_missing_gradients,
    warn_of_mixing,
)
from captum_reflected.inputs.modules import modules_of
from captum_reflected.inputs.request import Batch

InterpolateMode = Literal["bilinear", "bicubic", "nearest", "nearest-exact", "area"]


def check_constructor(forward_func: Any, start_layer: Any = None, token_layout: Any = None) -> None:
    """Checks the constructor's arguments that attributors have in common."""
    if not callable(forward_func):
        raise TypeError(
            f"forward_func is a {type(forward_func).__name__}; wanted: a model or a function"
        )
    if start_layer is not None and (
        not isinstance(start_layer, int) or isinstance(start_layer, bool)
    ):
        raise TypeError(f"start_layer is {start_layer!r}; wanted: an int or None")
    if start_layer is not None and start_layer < 0:
        raise ValueError(f"start_layer is {start_layer}; wanted: 0 or more")
    if token_layout is not None and not isinstance(token_layout, TokenLayout):
        raise TypeError(
            f"token_layout is a {type(token_layout).__name__}; wanted: "
            "TokenLayout(num_prefix_tokens, grid_size)"
        )


def recommended_start_layer(forward_func: Callable[..., Any]) -> int:
    """The first layer of the roll-out that a model recommends; 0 for others.

    A :class:`~captum_reflected.models.ZeroShotClassifier` does, also inside another module or a
    function.
    """
    layers = (
        getattr(module, "recommended_start_layer", None) for module in modules_of(forward_func)
    )
    return next((layer for layer in layers if layer is not None), 0)


def first_layer(start_layer: int | None, forward_func: Callable[..., Any]) -> int:
    """The given first layer of the roll-out, else the one that the model recommends."""
    return recommended_start_layer(forward_func) if start_layer is None else start_layer


def enlarge(saliency: Tensor, layout: TokenLayout, batch: Batch, mode: InterpolateMode) -> Any:
    """Token saliency (B, J) as attributions in the form of the caller's inputs, checked."""
    grid = saliency.reshape(-1, 1, *layout.grid_size)
    enlarged: Tensor = LayerAttribution.interpolate(grid, batch.image_size, mode)
    enlarged = enlarged.squeeze(1).to(batch.images.dtype)
    check_finite([enlarged], "the map")
    return batch.format(enlarged)


def warn_if_zero(
    zero: Tensor, reason: str = "no attention has a positive gradient towards the target"
) -> None:
    """Warns once if the relevance (a (B,) boolean says for which images) is zero throughout."""
    if bool(zero.any()):
        images = zero.nonzero().flatten().tolist()
        warnings.warn(
            f"the relevance is zero throughout for image(s) {images} of the batch, so their map "
            f"is zero: {reason}",
            stacklevel=4,
        )


def find_layout(
    forward_func: Callable[..., Any],
    call: Batch,
    told: TokenLayout | None,
    recorded: Recorded,
    *,
    num_tokens: int,
    pooled_keys: set[int],
) -> TokenLayout:
    """The layout with its readout, proved by running the model.

    Args:
        forward_func: the model.
        call: as it was recorded.
        told: the user's layout or ``None``.
        recorded: what its attention gave.
        num_tokens: N.
        pooled_keys: as in :func:`captum_reflected.attention.tokens.resolve_readout`.

    Returns:
        TokenLayout: with a readout.

    Raises:
        UnsupportedModelError: the model contradicts the layout, or its readout is not known.
        ValueError: no layout fits.
    """
    layout = resolve_layout(told, forward_func, num_tokens, call.image_size)
    evidence = examine(forward_func, call, layout, recorded.seen, recorded.read)
    check_layout(evidence, layout, told)
    stated = layout.readout or stated_readout(forward_func)
    read = evidence.read(layout) if recorded.read is None else recorded.read
    is_exact = call.images.dtype != torch.float16
    layout = resolve_readout(layout, forward_func, read, pooled_keys, is_exact=is_exact)
    warn_of_mixing(evidence, layout, recorded.seen, is_stated=layout.readout == stated)
    warn_of_missing_gradients(forward_func, call, evidence, recorded.without_gradient)
    return layout


def recorded_attention(
    forward_func: Callable[..., Any], call: Batch, told: TokenLayout | None, start_layer: int = 0
) -> tuple[list[Tensor], list[Tensor], TokenLayout]:
    """Head means (B, N, N) of the layers, (B, Q, M) of attention pooling, and the layout."""
    recorded = attention_maps(
        forward_func, call, start_layer, None if told is None else told.num_tokens
    )
    layout = find_layout(
        forward_func,
        call,
        told,
        recorded,
        num_tokens=recorded.layers[0].shape[-1],
        pooled_keys={attention.shape[-1] for attention in recorded.pooling},
    )
    return recorded.layers, recorded.pooling, layout
