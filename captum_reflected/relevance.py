"""From attention to relevance: pure tensor functions.

Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention Visualization*,
CVPR 2021, with attention times gradient as in section 2.2 of Sago & Hotta, *Vision
Transformer Interpretability via Prediction of Image Reflected Relevance Among Tokens*,
ICPRAM 2024.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def gradient_relevance(attention: Tensor, gradient: Tensor) -> Tensor:
    """Relevance of one layer: positive part of attention times gradient, averaged over heads.

    Args:
        attention: (B, h, N, N) attention probabilities.
        gradient: (B, h, N, N), gradient of the target logit with respect to them.

    Returns:
        Tensor: (B, N, N), not negative.
    """
    return (attention * gradient).clamp(min=0).mean(dim=1)


def roll_out(layers: Sequence[Tensor]) -> Tensor:
    """The relevance matrix R = (I + E_L) ... (I + E_2)(I + E_1).

    Args:
        layers: E_1 ... E_L, each (B, N, N), in forward order.

    Returns:
        Tensor: (B, N, N); R[:, i, j] is how much token j flows into token i.
    """
    first = layers[0]
    relevance = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device) + first
    for layer in layers[1:]:
        relevance = relevance + layer @ relevance
    return relevance


def roll_out_row(layers: Sequence[Tensor], row: Tensor) -> Tensor:
    """``row @ roll_out(layers)`` without forming the matrix.

    Args:
        layers: E_1 ... E_L, each (B, N, N), in forward order.
        row: (N,), weights of the tokens that the model reads its answer from.

    Returns:
        Tensor: (B, N).
    """
    rows = row.to(layers[0]).expand(layers[0].shape[0], 1, -1)
    for layer in reversed(layers):
        rows = rows + rows @ layer
    return rows.squeeze(1)
