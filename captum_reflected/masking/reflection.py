"""Section 3 of Sago & Hotta (ICPRAM 2024) as pure tensor functions.

Equations 1-4 and Figure 4: the relevance among image tokens gives one mask per token, the masks
give reflected images, and their scores give the map.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.inputs.checks import check_option

Reflect = Literal["columns", "rows"]
Combine = Literal["minmax", "sum"]
Aggregate = Literal["token", "mask_weighted"]


@dataclass(frozen=True)
class Reflection:
    """The result of :meth:`ReflectedRelevance.reflect`, for a batch of B images.

    Attributes:
        relevance: (B, N, N), the relevance matrix R among all tokens.
        masks: (B, J, gh, gw), values from 0 to 1; masks[:, j] is the reflection of image token
            j (equations 1-2, Figure 4).
        scores: (B, J), the model's score of the target for each reflected image.
        class_relevance: (B, J), relevance of the image tokens for the model's output:
            the class token's row of R.
    """

    relevance: Tensor
    masks: Tensor
    scores: Tensor
    class_relevance: Tensor


def min_max(values: Tensor, dim: int) -> Tensor:
    """Min-max normalises values to [0, 1] along ``dim``; constant values become 0."""
    low, high = values.amin(dim, keepdim=True), values.amax(dim, keepdim=True)
    span = high - low
    return torch.where(span > 0, (values - low) / span, 0)


def replace_diagonal(relevance: Tensor) -> Tensor:
    """Equations 1-2: replaces each diagonal entry by the largest other value of its column.

    Args:
        relevance: (B, J, J), relevance among image tokens.

    Returns:
        Tensor: (B, J, J), a new tensor. For a single token (J = 1), which has no other value,
        it is 0.
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
    reflect: Reflect = "columns",
    scale_by_maxima: bool = True,
) -> Tensor:
    """Computes one mask per image token from the relevance among image tokens.

    Args:
        relevance: (B, J, J), the part of R between image tokens.
        grid_size: (gh, gw) with gh * gw = J.
        reflect: ``"columns"``: mask j shows the tokens that token j flows into (the
            paper); ``"rows"``: those that flow into token j (the same equations on the
            transposed matrix).
        scale_by_maxima: whether to multiply mask j by its column maximum, min-max normalised
            over the columns (Figure 4, green).

    Returns:
        Tensor: (B, J, gh, gw), from 0 to 1.

    Raises:
        ValueError: ``reflect`` is not one of these.
    """
    check_option("reflect", reflect, get_args(Reflect))
    columns = replace_diagonal(relevance if reflect == "columns" else relevance.mT)
    masks = min_max(columns, dim=-2)  # Figure 4, red
    if scale_by_maxima:
        masks = masks * min_max(columns.amax(dim=-2, keepdim=True), dim=-1)  # Figure 4, green
    return masks.mT.reshape(*masks.shape[:2], *grid_size)


def reflected_images(images: Tensor, masks: Tensor, baselines: Tensor | float = 0.0) -> Tensor:
    """Equations 3-4: applies masks to images, after enlarging them by nearest neighbours.

    Args:
        images: (B, C, H, W), as the model receives them.
        masks: (B, K, gh, gw), for instance a slice of :attr:`Reflection.masks`.
        baselines: the values shown where a mask is 0: a number, or a tensor that broadcasts to
            ``images``. The paper uses 0.

    Returns:
        Tensor: (B, K, C, H, W), ``images * masks + baselines * (1 - masks)``.
    """
    enlarged = F.interpolate(masks, size=images.shape[-2:], mode="nearest").unsqueeze(2)
    enlarged = enlarged.to(images.dtype)
    reflected = images.unsqueeze(1) * enlarged
    if isinstance(baselines, Tensor):
        return reflected + baselines.unsqueeze(1) * (1 - enlarged)
    return reflected if baselines == 0 else reflected + baselines * (1 - enlarged)


def mask_weighted_scores(masks: Tensor, scores: Tensor) -> Tensor:
    """Token scores for which every reflected image adds its score to the tokens that it shows.

    Args:
        masks: (B, K, gh, gw).
        scores: (B, K), non-negative.

    Returns:
        Tensor: (B, J), the sum over k of scores[k] * masks[k].
    """
    with torch.autocast(masks.device.type, enabled=False):
        return torch.einsum("bk,bkj->bj", scores, masks.flatten(2).to(scores))


def combine_terms(
    reflected: Tensor,
    class_relevance: Tensor,
    *,
    combine: Combine = "minmax",
    reflected_weight: float = 1.0,
) -> Tensor:
    """The saliency of the image tokens: the token scores plus the class relevance.

    Args:
        reflected: (B, J), token scores from the reflected images.
        class_relevance: (B, J).
        combine: ``"minmax"``: normalises each term to [0, 1] before adding; ``"sum"``: adds the
            terms unchanged.
        reflected_weight: factor of the first term.

    Returns:
        Tensor: (B, J).
    """
    if combine != "sum":
        # Scores that differ only by rounding carry no information; min-max would amplify them.
        span = reflected.amax(-1, keepdim=True) - reflected.amin(-1, keepdim=True)
        rounding = 32 * torch.finfo(reflected.dtype).eps * reflected.abs().amax(-1, keepdim=True)
        reflected = torch.where(span > rounding, reflected, 0)
        reflected, class_relevance = min_max(reflected, dim=-1), min_max(class_relevance, dim=-1)
    return reflected_weight * reflected + class_relevance
