"""Computes relevance from attention: pure tensor functions.

References: Chefer, Gur & Wolf, *Transformer Interpretability Beyond Attention Visualization*,
CVPR 2021, with attention times gradient as in section 2.2 of Sago & Hotta, *Vision
Transformer Interpretability via Prediction of Image Reflected Relevance Among Tokens*,
ICPRAM 2024. Attention Rollout: Abnar & Zuidema, *Quantifying Attention Flow in
Transformers*, ACL 2020.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor


def gradient_relevance(attention: Tensor, gradient: Tensor) -> Tensor:
    """Relevance of one layer: positive part of attention times gradient, averaged over heads.

    Args:
        attention: (B, h, N, N) attention probabilities, or (B, h, Q, M) of attention pooling.
        gradient: gradient of the target logit with respect to them, of the same shape.

    Returns:
        Tensor: (B, N, N) or (B, Q, M), non-negative.
    """
    return (attention * gradient).clamp_(min=0).mean(dim=1)


def attention_step(attention: Tensor) -> Tensor:
    """E of Attention Rollout: I + E is attention plus identity with normalised rows.

    Args:
        attention: (B, N, N), or (B, Q, M) whose first Q keys are the queries.

    Returns:
        Tensor: of the same shape; its rows sum to zero.
    """
    identity = torch.eye(*attention.shape[-2:], dtype=attention.dtype, device=attention.device)
    mixed = attention + identity
    return mixed / mixed.sum(dim=-1, keepdim=True) - identity


def roll_out(layers: Sequence[Tensor]) -> Tensor:
    """The relevance matrix R = (I + E_L) ... (I + E_2)(I + E_1).

    Args:
        layers: E_1 ... E_L, each (B, N, N), in forward order.

    Returns:
        Tensor: (B, N, N); R[:, i, j] is how much token j flows into token i.
    """
    return deque(roll_out_steps(layers), maxlen=1).pop()


def roll_out_steps(layers: Sequence[Tensor]) -> Iterator[Tensor]:
    """The relevance matrix after each layer, R_l = (I + E_l) ... (I + E_1).

    Args:
        layers: E_1 ... E_L, each (B, N, N), in forward order.

    Yields:
        Tensor: R_1 ... R_L, each (B, N, N); the last is that of :func:`roll_out`.
    """
    first = layers[0]
    relevance = torch.eye(first.shape[-1], dtype=first.dtype, device=first.device) + first
    yield relevance
    for layer in layers[1:]:
        with _full_precision(first):
            relevance = relevance + layer @ relevance
        yield relevance


def roll_out_row(layers: Sequence[Tensor], row: Tensor) -> Tensor:
    """``row @ roll_out(layers)`` without forming the matrix.

    Args:
        layers: E_1 ... E_L, each (B, N, N), in forward order.
        row: (N,) or (B, N), weights of the tokens that the model reads its output from.

    Returns:
        Tensor: (B, N).
    """
    rows = row.to(layers[0]).expand(layers[0].shape[0], -1).unsqueeze(1)
    with _full_precision(rows):
        for layer in reversed(layers):
            rows = rows + rows @ layer
    return rows.squeeze(1)


def weighted_rows(weights: Tensor, relevance: Tensor) -> Tensor:
    """The weighted sum of the rows of (B, N, N), with weights (N,) or (B, N): (B, N)."""
    with _full_precision(relevance):
        return (weights.unsqueeze(-2) @ relevance).squeeze(-2)


def _full_precision(tensor: Tensor) -> torch.autocast:
    """Disables an outer autocast, which is meant for the model and not for the roll-out."""
    return torch.autocast(tensor.device.type, enabled=False)


def pooling_weights(pooling: Sequence[Tensor], num_tokens: int) -> Tensor:
    r"""Weights of the tokens in an output that attention pools from them.

    Attention pooling has Q queries of its own, so its relevance E (B, Q, M) is not a factor
    of the roll-out. It determines how much each token contributes to the output:
    :math:`w_j = \sum_q E_{qj} / \sum_{q,i} E_{qi}`. Uniform attention gives the weights
    of mean pooling. In class attention (CaiT), the queries are also keys and pass from layer
    to layer. With layers k = 1 ... K and :math:`s_K = 1`,
    :math:`w \propto \sum_k s_k E_k^{tokens}` and :math:`s_{k-1} = s_k (I + E_k^{queries})`.

    Args:
        pooling: E of each pooling layer, (B, Q, M), in forward order. The keys M are the last M
            of the N tokens, or the Q queries and then the N tokens.
        num_tokens: number of tokens, N.

    Returns:
        Tensor: (B, N), non-negative, summing to one; zero if there is no relevance.
    """
    batch_size, queries = pooling[-1].shape[:2]
    weights = pooling[-1].new_zeros(batch_size, num_tokens)
    share = pooling[-1].new_ones(batch_size, 1, queries)
    for layer in reversed(pooling):
        keys = layer.shape[-1]
        if keys > num_tokens:
            attended = weighted_rows(share.squeeze(1), layer)
            weights += attended[:, -num_tokens:]
            share = share + attended[:, None, :queries]
        else:
            weights[:, num_tokens - keys :] += layer.sum(dim=1)
    total = weights.sum(dim=-1, keepdim=True)
    return torch.where(total > 0, weights / total, 0)
