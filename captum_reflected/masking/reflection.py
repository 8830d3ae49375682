"""Section 3 of Sago & Hotta (ICPRAM 2024) as pure tensor functions.

Equations 1-4 and Figure 4: from the relevance among image tokens to one mask a token,
from masks to reflected images, and from their scores to a map. Beyond the paper: other forms
of the masks, and other ways from scores to tokens.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.inputs.request import check_option

TokenReflect = Literal["columns", "rows"]
Reflect = Literal["columns", "rows", "components"]
Combine = Literal["minmax", "sum", "square"]
Aggregate = Literal["token", "vote", "regression"]

# The prior of a regression: how far tokens are alike, in tokens, and how much of a score is
# noise, as a share of what the prior lets scores vary.
_LENGTH_SCALE = 0.7
_NOISE = 0.3


@dataclass(frozen=True)
class Reflection:
    """What :meth:`ReflectedRelevance.reflect` finds, for a batch of B images.

    Attributes:
        relevance: (B, N, N), the relevance matrix R among all tokens.
        masks: (B, K, gh, gw), values from 0 to 1. In the paper K = J, and masks[:, j] is the
            reflection of image token j (equations 1-2, Figure 4).
        scores: (B, K), what the model says of each reflected image for the target.
        class_relevance: (B, J), relevance of the image tokens for the model's answer:
            the class token's row of R.
    """

    relevance: Tensor
    masks: Tensor
    scores: Tensor
    class_relevance: Tensor


def min_max(values: Tensor, dim: int) -> Tensor:
    """Brings values to the range from 0 to 1 along ``dim``; a constant becomes 0."""
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    span = high - low
    return torch.where(span > 0, (values - low) / span, 0)


def replace_diagonal(relevance: Tensor) -> Tensor:
    """Equations 1-2: the diagonal becomes the largest other value of its column.

    Args:
        relevance: (B, J, J), relevance among image tokens.

    Returns:
        Tensor: (B, J, J), a new tensor. A single token (J = 1) has no other value; 0.
    """
    if relevance.shape[-1] == 1:
        return torch.zeros_like(relevance)
    diagonal = torch.eye(relevance.shape[-1], dtype=torch.bool, device=relevance.device)
    others = relevance.masked_fill(diagonal, -torch.inf)
    return torch.where(diagonal, others.amax(dim=-2, keepdim=True), relevance)


def reflection_masks(
    relevance: Tensor,
    grid_size: tuple[int, int],
    *,
    reflect: TokenReflect = "columns",
    scale_by_maxima: bool = True,
) -> Tensor:
    """One mask an image token, from the relevance among image tokens.

    Args:
        relevance: (B, J, J), the part of R between image tokens.
        grid_size: (gh, gw) with gh * gw = J.
        reflect: ``"columns"``: mask j shows the tokens that token j flows into (the
            paper); ``"rows"``: those that flow into token j (the same equations on the
            transposed matrix).
        scale_by_maxima: whether mask j is multiplied by its column maximum, min-max
            normalised over the columns (Figure 4, green).

    Returns:
        Tensor: (B, J, gh, gw), from 0 to 1.

    Raises:
        ValueError: ``reflect`` is another, as ``"components"`` (:func:`component_masks`) is.
    """
    check_option("reflect", reflect, get_args(TokenReflect))
    columns = replace_diagonal(relevance if reflect == "columns" else relevance.mT)
    masks = min_max(columns, dim=-2)  # Figure 4, red
    if scale_by_maxima:
        masks = masks * min_max(columns.amax(dim=-2, keepdim=True), dim=-1)  # Figure 4, green
    return masks.mT.reshape(*masks.shape[:2], *grid_size)


def component_masks(layers: Sequence[Tensor], grid_size: tuple[int, int], count: int) -> Tensor:
    """Masks that tell image tokens apart by what they give and take (not in the paper).

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


def shape_masks(
    masks: Tensor,
    *,
    stride: int = 1,
    smooth: float = 0.0,
    opposites: bool = False,
    keep: int | None = None,
    binary: bool = False,
) -> Tensor:
    """Fewer, smoother, crisper masks, and what they hide (not in the paper).

    Args:
        masks: (B, K, gh, gw) from :func:`reflection_masks` or :func:`component_masks`.
        stride: every so many tokens of the grid, down and across, one makes a mask, where each
            does (K = J).
        smooth: standard deviation in tokens of the Gaussian that each mask is smoothed by,
            after which it goes from 0 to 1 again.
        opposites: whether 1 less each mask follows as a mask of its own.
        keep: how many values each mask keeps, the highest; the others become 0.
        binary: whether the kept values become 1. Without ``keep``, half of them are kept (of
            an odd number the larger half), and the opposite keeps the others.

    Returns:
        Tensor: (B, K, gh, gw). A mask that is 0 throughout stays so, and its opposite is, too:
        it says nothing of where to look.
    """
    grid_size = masks.shape[-2:]
    tokens = grid_size.numel()
    if stride > 1:
        masks = masks.unflatten(1, grid_size)[:, ::stride, ::stride].flatten(1, 2)
    speaks = masks.flatten(2).any(dim=-1, keepdim=True)
    if smooth:
        masks = _smoothed(masks, smooth)
    flat = min_max(masks.flatten(2), dim=-1) if smooth else masks.flatten(2)
    shown = hidden = speaks
    if binary or keep is not None:
        # 0 for the highest value; of equal ones the first comes first.
        rank = flat.argsort(dim=-1, descending=True, stable=True).argsort(dim=-1)
        kept, left = (-(-tokens // 2), tokens // 2) if keep is None else (keep, keep)
        shown, hidden = speaks & (rank < kept), speaks & (rank >= tokens - left)
    shaped = [torch.where(shown, 1.0 if binary else flat, 0)]
    if opposites:
        shaped.append(torch.where(hidden, 1.0 if binary else 1 - flat, 0))
    return torch.cat(shaped, dim=1).to(flat).view(len(masks), -1, *grid_size)


def highest_tokens(masks: Tensor, count: int) -> Tensor:
    """The tokens where each mask is highest, of equal ones the first.

    The highest value of a mask occurs twice, for the diagonal is replaced by it.

    Args:
        masks: (..., gh, gw).
        count: how many, at most J.

    Returns:
        Tensor: (..., count), indices from 0 to J - 1 in rising order.
    """
    order = masks.flatten(-2).argsort(dim=-1, descending=True, stable=True)
    return order[..., :count].sort(dim=-1).values


def _smoothed(masks: Tensor, sigma: float) -> Tensor:
    """By a Gaussian cut at 3 sigma; beyond the border is what is at the border."""
    with torch.autocast(masks.device.type, enabled=False):
        down, across = (_smoothing(side, sigma).to(masks) for side in masks.shape[-2:])
        smooth: Tensor = down @ masks @ across.mT
    return smooth


def _smoothing(side: int, sigma: float) -> Tensor:
    """(side, side), rows summing to one: what each cell takes from each."""
    reach = min(math.ceil(3 * sigma), 4 * side)
    offsets = torch.arange(-reach, reach + 1)
    weights = (-(offsets.double() ** 2) / (2 * sigma**2)).exp()
    places = (torch.arange(side)[:, None] + offsets).clamp(0, side - 1)
    matrix = torch.zeros(side, side, dtype=torch.float64)
    return matrix.scatter_add_(1, places, (weights / weights.sum()).expand(side, -1))


def votes(masks: Tensor, scores: Tensor) -> Tensor:
    """What each token is worth if every reflected image votes for the tokens that it shows.

    Args:
        masks: (B, K, gh, gw).
        scores: (B, K), the weight of each vote, not negative.

    Returns:
        Tensor: (B, J), the sum over k of scores[k] * masks[k].
    """
    with torch.autocast(masks.device.type, enabled=False):
        return torch.einsum("bk,bkj->bj", scores, masks.flatten(2).to(scores))


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
        return (spread.mT @ weights).squeeze(-1)


def _centred(values: Tensor) -> Tensor:
    """Less the mean over dimension 1; exactly 0 where all are alike."""
    values = values - values[:, :1]
    return values - values.mean(dim=1, keepdim=True)


def reflected_images(images: Tensor, masks: Tensor, baselines: Tensor | float = 0.0) -> Tensor:
    """Equations 3-4: images seen through masks, nearest-neighbour enlarged.

    Args:
        images: (B, C, H, W), as the model receives them.
        masks: (B, K, gh, gw), for instance a slice of :attr:`Reflection.masks`.
        baselines: a number or a tensor that broadcasts to ``images``: what stands where
            the mask is 0. The paper's is 0.

    Returns:
        Tensor: (B, K, C, H, W), ``images * masks + baselines * (1 - masks)``.
    """
    enlarged = F.interpolate(masks, size=images.shape[-2:], mode="nearest").unsqueeze(2)
    enlarged = enlarged.to(images.dtype)
    reflected = images.unsqueeze(1) * enlarged
    if isinstance(baselines, Tensor):
        return reflected + baselines.unsqueeze(1) * (1 - enlarged)
    return reflected if baselines == 0 else reflected + baselines * (1 - enlarged)


def combine_terms(
    reflected: Tensor,
    class_relevance: Tensor,
    *,
    combine: Combine = "minmax",
    reflected_weight: float = 1.0,
) -> Tensor:
    """The saliency of the image tokens: scores of the reflected images plus class relevance.

    Args:
        reflected: (B, J), the scores or what they were aggregated to.
        class_relevance: (B, J).
        combine: ``"minmax"``: each term from 0 to 1 first; ``"sum"``: as they are;
            ``"square"``: the square of what ``"minmax"`` gives.
        reflected_weight: factor of the reflected images' term.

    Returns:
        Tensor: (B, J).
    """
    if combine != "sum":
        # Scores that differ by rounding only say nothing; min-max would make a map of it.
        span = reflected.amax(-1, keepdim=True) - reflected.amin(-1, keepdim=True)
        rounding = 32 * torch.finfo(reflected.dtype).eps * reflected.abs().amax(-1, keepdim=True)
        reflected = torch.where(span > rounding, reflected, 0)
        reflected, class_relevance = min_max(reflected, dim=-1), min_max(class_relevance, dim=-1)
    total = reflected_weight * reflected + class_relevance
    return total.square() if combine == "square" else total
