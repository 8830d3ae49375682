"""Which token stands for which part of the image, and which are read: found and proved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from captum_reflected.attention.experiments import examine
from captum_reflected.attention.recording import Recorded, attention_maps
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
    told: TokenLayout | None,
    recorded: Recorded,
) -> TokenLayout:
    """The layout with its readout, proved by running the model.

    Args:
        forward_func: the model.
        call: as it was recorded.
        told: the user's layout or ``None``.
        recorded: what its attention gave.

    Returns:
        TokenLayout: with a readout.

    Raises:
        UnsupportedModelError: the model contradicts the layout, or its readout is not known.
        ValueError: no layout fits.
    """
    layout = resolve_layout(told, forward_func, recorded.seen.num_tokens, call.image_size)
    evidence = examine(forward_func, call, layout, recorded.seen, recorded.read)
    check_layout(evidence, layout, told)
    stated = layout.readout or stated_readout(forward_func)
    read = evidence.read(layout) if recorded.read is None else recorded.read
    is_exact = call.images.dtype != torch.float16
    layout = resolve_readout(
        layout, forward_func, read, recorded.seen.pooled_keys, is_exact=is_exact
    )
    warn_of_mixing(evidence, layout, recorded.seen, is_stated=layout.readout == stated)
    warn_of_missing_gradients(forward_func, call, evidence, recorded.without_gradient)
    return layout


def recorded_attention(
    forward_func: Callable[..., Any], call: Batch, told: TokenLayout | None, start_layer: int = 0
) -> tuple[Recorded, TokenLayout]:
    """Attention averaged over heads, as :func:`attention_maps` records it, and its layout."""
    recorded = attention_maps(
        forward_func, call, start_layer, None if told is None else told.num_tokens
    )
    return recorded, find_layout(forward_func, call, told, recorded)
