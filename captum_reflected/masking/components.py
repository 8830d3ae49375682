"""Masks from principal components of the relevance, and a linear surrogate fitted to their scores.

Not part of the paper: uses a few masks computed from the tokens of every layer instead of one mask
per token, and a regression instead of one score per token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_reflected.masking.reflection import min_max

# The prior of the regression: the distance over which weights are correlated, in tokens, and the
# noise variance as a share of the prior variance of the scores.
_LENGTH_SCALE = 0.7
_NOISE = 0.3


def component_masks(features: Sequence[Tensor], grid_size: tuple[int, int], count: int) -> Tensor:
    """Masks that distinguish image tokens by their features.

    Mask k is the k-th principal component of the features of the tokens, over all layers.

    Args:
        features: one tensor for each layer, (B, J, D).
        grid_size: (gh, gw) with gh * gw = J.
        count: number of components, those of largest variance.

    Returns:
        Tensor: (B, K, gh, gw), from 0 to 1, with K the smaller of ``count`` and J - 1. If there
        are fewer components, the remaining masks are all zeros.
    """
    with torch.autocast(features[0].device.type, enabled=False):
        # Scaled, since squares of very large or small numbers would overflow or underflow.
        largest = torch.stack([layer.abs().amax(dim=(1, 2), keepdim=True) for layer in features])
        scale = largest.amax(dim=0)
        scale = torch.where(scale > 0, scale, 1)
        gram = torch.zeros((), device=scale.device, dtype=scale.dtype)
        for layer in features:
            centred = _centred(layer / scale)
            gram = gram + centred @ centred.mT
        variance, vectors = torch.linalg.eigh(gram)
    tokens = gram.shape[-1]
    count = min(count, tokens - 1)
    first = vectors.mT.flip(1)[:, :count]
    # The sign of an eigenvector is arbitrary: make its entry of largest magnitude positive.
    first = first * first.gather(-1, first.abs().argmax(dim=-1, keepdim=True)).sign()
    variance = variance.flip(1)[:, :count, None]
    least = tokens * torch.finfo(gram.dtype).eps * variance[:, :1]
    masks = torch.where(variance > least, min_max(first, dim=-1), 0)
    return masks.view(len(masks), -1, *grid_size)


def complementary_halves(masks: Tensor) -> Tensor:
    """Splits each mask into two: the half of the tokens with the highest values, and the rest.

    Args:
        masks: (B, K, gh, gw).

    Returns:
        Tensor: (B, 2 K, gh, gw) of zeros and ones: first the K halves with the highest values
        (one token larger if the number of tokens is odd; equal values in raster order), then the
        K other halves. A mask of zeros gives two masks of zeros, since it ranks nothing.
    """
    flat = masks.flatten(2)
    rank = flat.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    high = rank < -(-flat.shape[-1] // 2)
    is_nonzero = flat.any(dim=-1, keepdim=True)
    halves = torch.cat([is_nonzero & high, is_nonzero & ~high], dim=1)
    on_grid: Tensor = halves.to(masks.dtype).unflatten(2, masks.shape[2:])
    return on_grid


def regression(masks: Tensor, scores: Tensor) -> tuple[Tensor, Tensor]:
    r"""Estimates how much each token adds to the score of a masked image that shows it.

    The model's scores are approximated as linear in the masks. Neighbouring tokens are assumed
    to be similar: the prior of the weights is a Gaussian process with the kernel
    :math:`k(d) = \exp(-d^2 / 2 \ell^2)`, :math:`\ell` = 0.7 tokens. The estimate is the mean of
    the posterior, :math:`K A^T (A K A^T + \sigma^2 I)^{-1} (s - \bar s)`, where A are the masks
    minus their mean and :math:`\sigma^2` is 0.3 of the mean diagonal of :math:`A K A^T`
    (Rasmussen & Williams, *Gaussian Processes for Machine Learning*, 2006, equation 2.12). The
    prior's variance is that which gives the scores the variance that they have. The estimates are
    the smaller in comparison, the fewer masks there are.

    Args:
        masks: (B, K, gh, gw).
        scores: (B, K).

    Returns:
        tuple[Tensor, Tensor]: the estimates (B, J), positive or negative, and the standard
        deviation of their prior (B, 1); both are 0 if all masks or all scores are equal.
    """
    with torch.autocast(masks.device.type, enabled=False):
        design = _centred(masks.flatten(2).to(scores))
        heights = torch.arange(masks.shape[-2], device=masks.device).to(scores)
        widths = torch.arange(masks.shape[-1], device=masks.device).to(scores)
        places = torch.cartesian_prod(heights, widths)
        distance = (places.unsqueeze(0) - places.unsqueeze(1)).square().sum(dim=-1)
        spread = design @ (-distance / (2 * _LENGTH_SCALE**2)).exp()
        covariance = spread @ design.mT
        variance = covariance.diagonal(dim1=-2, dim2=-1).mean(dim=-1, keepdim=True)
        noise = torch.where(variance > 0, _NOISE * variance, 1)
        # cholesky_ex does not check for errors, which would synchronise with a GPU. The noise
        # makes the matrix positive definite.
        factor, _ = torch.linalg.cholesky_ex(covariance + torch.diag_embed(noise.expand_as(scores)))
        differences = _centred(scores)
        weights = torch.cholesky_solve(differences.unsqueeze(-1), factor)
        token_weights: Tensor = (spread.mT @ weights).squeeze(-1)
        of_scores = differences.square().mean(dim=-1, keepdim=True)
        of_weights = torch.where(variance > 0, of_scores / ((1 + _NOISE) * variance), 0)
    return token_weights, of_weights.sqrt()


def _centred(values: Tensor) -> Tensor:
    """Values minus their mean over dimension 1; exactly 0 if all are equal."""
    values = values - values[:, :1]
    return values - values.mean(dim=1, keepdim=True)
