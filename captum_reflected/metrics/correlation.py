"""Measures how similarly two maps rank the pixels."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def rank_correlation(first: Tensor, second: Tensor) -> Tensor:
    r"""
    Spearman's rank correlation of each pair of maps.

    This is the Pearson correlation of the ranks; equal values share the mean of their ranks
    (Spearman, *The Proof and Measurement of Association between Two Things*, American
    Journal of Psychology 1904).

    Args:

        first (Tensor): (B, ...), maps of any shape; all dimensions after the first are
                    flattened.
        second (Tensor): Of the same shape.

    Returns:
        *Tensor* (B,), float64, from -1 to 1; NaN if a map is constant and so defines no ranking.

    Raises:
        TypeError: an argument is not a tensor of real numbers.
        ValueError: the shapes differ or have no pixels, or a value is not finite.

    Examples::

        >>> first = torch.tensor([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]])
        >>> second = torch.tensor([[1.0, 4.0, 9.0], [3.0, 2.0, 1.0]])
        >>> rank_correlation(first, second)
        tensor([ 1., -1.], dtype=torch.float64)
    """
    _check("first", first)
    _check("second", second)
    if first.shape != second.shape or first.dim() < 2:
        raise ValueError(
            f"first has shape {tuple(first.shape)} and second {tuple(second.shape)}; wanted: "
            "one shape (B, ...)"
        )
    ranks = [average_ranks(maps.detach().flatten(1)) for maps in (first, second)]
    left, right = (rank - rank.mean(dim=1, keepdim=True) for rank in ranks)
    right = right.to(left.device)
    # Ranks are multiples of one half, so the variance of a constant map is exactly zero. The root
    # is taken of the product, so the correlation of a map with itself is exactly 1.
    scale = (left.square().sum(dim=1) * right.square().sum(dim=1)).sqrt()
    product = (left * right).sum(dim=1)
    return torch.where(scale > 0, product / scale, torch.nan).clamp(-1, 1)


def average_ranks(values: Tensor) -> Tensor:
    """The rank of each value in its row, from 1; equal values share the mean of their ranks.

    Args:
        values: (B, P).

    Returns:
        Tensor: (B, P), float64.
    """
    ordered, order = values.sort(dim=1)
    starts = torch.ones_like(order)
    starts[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
    run = starts.cumsum(dim=1) - 1  # index of the run of equal values that each entry belongs to
    lengths = torch.zeros_like(order).scatter_add_(1, run, torch.ones_like(order))
    last = lengths.cumsum(dim=1)
    mean = last - (lengths - 1).to(torch.float64) / 2
    ranks = torch.empty_like(mean)
    return ranks.scatter_(1, order, mean.gather(1, run))


def _check(name: str, maps: Any) -> None:
    if not isinstance(maps, Tensor):
        raise TypeError(f"{name} is a {type(maps).__name__}; wanted: a tensor (B, ...)")
    if maps.is_complex():
        raise TypeError(f"{name} has dtype {maps.dtype}; wanted: real numbers")
    if maps.numel() == 0:
        raise ValueError(f"{name} has shape {tuple(maps.shape)}; wanted: none of it empty")
    if not bool(torch.isfinite(maps).all()):
        raise ValueError(f"{name} holds NaN or infinite values; wanted: finite numbers")
