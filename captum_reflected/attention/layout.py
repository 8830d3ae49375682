"""Finds the token layout of a model, and verifies it by running the model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from captum_reflected.attention.experiments import examine
from captum_reflected.attention.recording import MapIndex, Recorded, attention_maps
from captum_reflected.attention.tokens import (
    TokenLayout,
    resolve_layout,
    resolve_readout,
    stated_readout,
)
from captum_reflected.attention.verification import (
    check_layout,
    warn_of_missing_gradients,
    warn_of_mixing,
)
from captum_reflected.inputs.batch import Batch


def find_layout(
    forward_func: Callable[..., Any],
    call: Batch,
    given_layout: TokenLayout | None,
    recorded: Recorded,
) -> TokenLayout:
    """The token layout with its readout, verified by running the model.

    Args:
        forward_func: the model.
        call: the call that was recorded.
        given_layout: the user's layout or ``None``.
        recorded: the recorded attention.

    Returns:
        TokenLayout: with a readout.

    Raises:
        UnsupportedModelError: the model contradicts the layout, or its readout is not known.
        ValueError: no layout fits.
    """
    map_index = recorded.map_index
    layout = resolve_layout(given_layout, forward_func, map_index.num_tokens, call.image_size)
    evidence = examine(forward_func, call, layout, map_index, recorded.tokens_read)
    check_layout(evidence, layout, given_layout)
    stated = layout.readout or stated_readout(forward_func)
    tokens_read = recorded.tokens_read
    if tokens_read is None:
        tokens_read = evidence.tokens_read(layout)
    # Pooling that the gradient does not reach is not what the output is read by.
    pooled_keys = {
        keys
        for number, keys in zip(map_index.pooling, map_index.pooling_keys, strict=True)
        if number not in recorded.without_gradient
    }
    is_exact = call.images.dtype != torch.float16
    layout = resolve_readout(layout, forward_func, tokens_read, pooled_keys, is_exact=is_exact)
    warn_of_mixing(evidence, layout, map_index, is_stated=layout.readout == stated)
    warn_of_missing_gradients(forward_func, call, evidence, recorded.without_gradient)
    return layout


def find_positions(
    forward_func: Callable[..., Any],
    call: Batch,
    given_layout: TokenLayout | None,
    map_index: MapIndex,
) -> TokenLayout:
    """The positions of the tokens, verified by running the model; the readout is left open.

    Args:
        forward_func: the model.
        call: the call that was recorded.
        given_layout: the user's layout or ``None``.
        map_index: which of the forward's attention maps belong to the images.

    Raises:
        UnsupportedModelError: the model contradicts the layout.
        ValueError: no layout fits.
    """
    layout = resolve_layout(given_layout, forward_func, map_index.num_tokens, call.image_size)
    nothing_read = torch.zeros(layout.num_tokens, dtype=torch.bool)
    evidence = examine(forward_func, call, layout, map_index, nothing_read)
    check_layout(evidence, layout, given_layout)
    return layout


def recorded_attention(
    forward_func: Callable[..., Any],
    call: Batch,
    given_layout: TokenLayout | None,
    start_layer: int = 0,
) -> tuple[Recorded, TokenLayout]:
    """Attention averaged over heads, recorded by :func:`attention_maps`, and the token layout."""
    recorded = attention_maps(
        forward_func, call, start_layer, None if given_layout is None else given_layout.num_tokens
    )
    return recorded, find_layout(forward_func, call, given_layout, recorded)
