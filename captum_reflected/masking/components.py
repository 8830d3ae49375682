"""Halves of an image that tell its tokens apart, and a linear surrogate fitted to their scores.

Beyond the paper: a few masks made of every layer's relevance in place of one for each token, and
a regression in place of one score for each token.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from captum_reflected.masking.reflection import min_max

# The prior of the regression: how far tokens are alike, in tokens, and how much of a score is
# noise, as a share of what the prior lets scores vary.
_LENGTH_SCALE = 0.7
_NOISE = 0.3


def component_masks(layers: Sequence[Tensor], grid_size: tuple[int, int], count: int) -> Tensor:
    """Masks that tell image tokens apart by what they give and take.

    An image token is described by its row and its column of each layer's relevance E_l: what
    it takes from every image token, and what it gives to it. Mask k is the k-th principal
    component of these numbers.

    Args:
        layers: E_1 ... E_L, each (B, J, J), the part between image tokens.
        grid_size: (gh, gw) with gh * gw = J.
        count: how many components, the first ones.

    Returns:
        Tensor: (B, K, gh, gw), from 0 to 1, with K the lesser of ``count`` and J - 1; a mask is 0
        throughout where there are fewer components.
    """
    with torch.autocast(layers[0].device.type, enabled=False):
        likeness = torch.zeros_like(layers[0])
        # Squares of very large or small numbers would leave the range of floating point.
        largest = torch.stack([layer.amax(dim=(1, 2), keepdim=True) for layer in layers]).amax(0)
        scale = torch.where(largest > 0, largest, 1)
        for layer in layers:
            scaled = layer / scale
            for described in (scaled, scaled.mT):
                centred = _centred(described)
                likeness += centred @ centred.mT
        variance, vectors = torch.linalg.eigh(likeness)
    tokens = likeness.shape[-1]
    count = min(count, tokens - 1)
    first = vectors.mT.flip(1)[:, :count]
    # An eigenvector's sign is arbitrary: where it is largest, it is positive here.
    first = first * first.gather(-1, first.abs().argmax(dim=-1, keepdim=True)).sign()
    variance = variance.flip(1)[:, :count, None]
    least = tokens * torch.finfo(likeness.dtype).eps * variance[:, :1]
    masks = torch.where(variance > least, min_max(first, dim=-1), 0)
    return masks.view(len(masks), -1, *grid_size)


def complementary_halves(masks: Tensor) -> Tensor:
    """Each mask as two: the half of the tokens where it is highest, and the other half.

    Args:
        masks: (B, K, gh, gw).

    Returns:
        Tensor: (B, 2 K, gh, gw) of zeros and ones: first the K halves where masks are highest (of
        an odd number of tokens the larger half; of equal values the first), then the K others.
        A mask that is 0 throughout gives two of zeros: it says nothing of where to look.
    """
    flat = masks.flatten(2)
    rank = flat.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
    high = rank < -(-flat.shape[-1] // 2)
    used = flat.any(dim=-1, keepdim=True)
    halves = torch.cat([used & high, used & ~high], dim=1)
    on_grid: Tensor = halves.to(masks.dtype).unflatten(2, masks.shape[2:])
    return on_grid


def regression(masks: Tensor, scores: Tensor) -> Tensor:
    r"""What each token adds to the score of a reflected image that shows it.

    Scores are taken as linear in the masks. Neighbouring tokens are held to be alike: the
    weights have a Gaussian process with the kernel :math:`k(d) = \exp(-d^2 / 2 \ell^2)` as
    prior, :math:`\ell` = 0.7 tokens, and the mean of the posterior is their estimate,
    :math:`K A^T (A K A^T + \sigma^2 I)^{-1} (s - \bar s)`, where A are the masks less their
    mean and :math:`\sigma^2` is 0.3 of the mean diagonal of :math:`A K A^T` (Rasmussen &
    Williams, *Gaussian Processes for Machine Learning*, 2006, equation 2.12).

    Args:
        masks: (B, K, gh, gw).
        scores: (B, K).

    Returns:
        Tensor: (B, J), of either sign; 0 where all masks or all scores are alike.
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
        # Without a check, which a GPU would have to be waited for: the noise makes it definite.
        factor, _ = torch.linalg.cholesky_ex(covariance + torch.diag_embed(noise.expand_as(scores)))
        weights = torch.cholesky_solve(_centred(scores).unsqueeze(-1), factor)
        token_weights: Tensor = (spread.mT @ weights).squeeze(-1)
    return token_weights


def _centred(values: Tensor) -> Tensor:
    """Less the mean over dimension 1; exactly 0 where all are alike."""
    values = values - values[:, :1]
    return values - values.mean(dim=1, keepdim=True)
