"""What the attributors have in common: checks, the recorded attention, the map."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any, Literal

from captum.attr import LayerAttribution
from torch import Tensor

from captum_reflected._inputs import Batch
from captum_reflected.attention import attention_maps
from captum_reflected.tokens import TokenLayout, find_layout

InterpolateMode = Literal["bilinear", "bicubic", "nearest", "nearest-exact", "area"]


def check_constructor(forward_func: Any, start_layer: Any = 0, token_layout: Any = None) -> None:
    """Checks the constructor's arguments that attributors have in common."""
    if not callable(forward_func):
        raise TypeError(
            f"forward_func is a {type(forward_func).__name__}; wanted: a model or a function"
        )
    if not isinstance(start_layer, int) or isinstance(start_layer, bool):
        raise TypeError(f"start_layer is {start_layer!r}; wanted: an int")
    if start_layer < 0:
        raise ValueError(f"start_layer is {start_layer}; wanted: 0 or more")
    if token_layout is not None and not isinstance(token_layout, TokenLayout):
        raise TypeError(
            f"token_layout is a {type(token_layout).__name__}; wanted: "
            "TokenLayout(num_prefix_tokens, grid_size)"
        )


def enlarge(saliency: Tensor, layout: TokenLayout, batch: Batch, mode: InterpolateMode) -> Tensor:
    """Token saliency (B, J) as a (B, H, W) map."""
    grid = saliency.reshape(-1, 1, *layout.grid_size)
    enlarged: Tensor = LayerAttribution.interpolate(grid, batch.image_size, mode)
    return enlarged.squeeze(1)


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


def recorded_attention(
    forward_func: Callable[..., Any], call: Batch, told: TokenLayout | None, start_layer: int = 0
) -> tuple[list[Tensor], list[Tensor], TokenLayout]:
    """Head means (B, N, N) of the layers, (B, Q, M) of attention pooling, and the layout."""
    maps = attention_maps(
        forward_func, call, start_layer, None if told is None else told.num_tokens
    )
    layers = [attention for attention in maps if attention.shape[-2] == attention.shape[-1]]
    pooling = maps[len(layers) :]
    layout = find_layout(
        told,
        forward_func,
        layers[0].shape[-1],
        call.image_size,
        pooled_keys={attention.shape[-1] for attention in pooling},
    )
    return layers, pooling, layout
