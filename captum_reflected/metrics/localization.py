"""Localisation metrics: compare attributions with masks of the object.

They need no model. Given attributions and masks, they return one number per image from 0 to 1;
higher is better. A map without positive values scores 0.

Sources: Arras, Osman & Samek, *CLEVR-XAI*, Information Fusion 81, 2022, section 3.4 (mass
and rank accuracy); Zhang et al., *Top-Down Neural Attention by Excitation Backprop*,
IJCV 126, 2018, section 4.2 (pointing game).
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.metrics._maps import as_maps


def relevance_mass_accuracy(attributions: Tensor | tuple[Tensor], *, masks: Tensor) -> Tensor:
    r"""
    Share of the positive attribution that lies inside the mask.

    Args:

        attributions (Tensor or tuple[Tensor]): (B, C, H, W) or (B, H, W); channels are summed.
        masks (Tensor): (B, H, W), boolean, true on the object.

    Returns:
        *Tensor* (B,).

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes do not fit, a mask is empty, or a value is not finite.

    Examples::

        >>> heat = torch.tensor([[[3.0, 1.0], [0.0, -5.0]]])
        >>> mask = torch.tensor([[[True, False], [False, True]]])
        >>> relevance_mass_accuracy(heat, masks=mask)
        tensor([0.7500])
    """
    maps, masks = _check(attributions, masks)
    positive = maps.clamp(min=0)
    # Scaled, since the sum of very large numbers would be infinite; the shares do not change.
    positive = positive / positive.amax(dim=1, keepdim=True).clamp(min=1)
    total = positive.sum(dim=1)
    return torch.where(total > 0, (positive * masks).sum(dim=1) / total, 0)


def relevance_rank_accuracy(attributions: Tensor | tuple[Tensor], *, masks: Tensor) -> Tensor:
    r"""
    Share of the K pixels of highest attribution that lie inside the mask of K pixels.

    If several pixels tie for the last places, each counts with an equal fraction, so the
    result does not depend on their positions in the image.

    Args:

        attributions (Tensor or tuple[Tensor]): As in :func:`relevance_mass_accuracy`.
        masks (Tensor): As in :func:`relevance_mass_accuracy`.

    Returns:
        *Tensor* (B,).

    Raises:
        TypeError: As in :func:`relevance_mass_accuracy`.
        ValueError: As in :func:`relevance_mass_accuracy`.
    """
    maps, masks = _check(attributions, masks)
    mask_sizes = masks.sum(dim=1, keepdim=True)
    threshold = maps.sort(dim=1, descending=True).values.gather(1, mask_sizes - 1)
    above, tied = maps > threshold, maps == threshold
    remaining = mask_sizes - above.sum(dim=1, keepdim=True)
    fraction = remaining.to(maps) / tied.sum(dim=1, keepdim=True)
    hits = ((above + tied * fraction) * masks).sum(dim=1)
    return torch.where(maps.amax(dim=1) > 0, hits / mask_sizes.squeeze(1), 0)


def pointing_game(
    attributions: Tensor | tuple[Tensor], *, masks: Tensor, tolerance: float = 0
) -> Tensor:
    r"""
    Whether the highest pixel lies inside the mask.

    If several pixels share the highest value, the result is the share of them inside the mask.

    Args:

        attributions (Tensor or tuple[Tensor]): As in :func:`relevance_mass_accuracy`.
        masks (Tensor): As in :func:`relevance_mass_accuracy`.
        tolerance (float, optional): Distance from the mask, in pixels between centres,
                    that still counts as inside; 15 in Zhang et al.
                    Default: 0

    Returns:
        *Tensor* (B,), 0 or 1 unless several pixels share the highest value.

    Raises:
        TypeError: As in :func:`relevance_mass_accuracy`, or ``tolerance`` is not a number.
        ValueError: As in :func:`relevance_mass_accuracy`, or ``tolerance`` is negative or
                    not finite.
    """
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)):
        raise TypeError(f"tolerance is {tolerance!r}; wanted: a number of pixels")
    if not 0 <= tolerance < math.inf:
        raise ValueError(f"tolerance is {tolerance}; wanted: a finite number, 0 or more")
    maps, flat = _check(attributions, masks)
    near = _dilated(masks.to(flat.device), tolerance).flatten(1)
    highest = maps.amax(dim=1, keepdim=True)
    tied = maps == highest
    share = (tied & near).sum(dim=1).to(maps) / tied.sum(dim=1)
    return torch.where(highest.squeeze(1) > 0, share, 0)


def _dilated(masks: Tensor, distance: float) -> Tensor:
    """Dilates masks (B, H, W) by a disk: adds all pixels up to this distance away."""
    reach = min(int(distance), masks.shape[-2] - 1)
    near = masks
    for row in range(-reach, reach + 1):
        half = min(int(math.sqrt(distance**2 - row**2)), masks.shape[-1])
        wide = F.max_pool1d(masks.float(), 2 * half + 1, stride=1, padding=half) > 0
        # Rows from beyond the image are empty.
        near = near | F.pad(wide, (0, 0, row, -row))
    return near


def _check(attributions: Any, masks: Any) -> tuple[Tensor, Tensor]:
    """Checks maps and masks and returns both as (B, H * W)."""
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks is a {type(masks).__name__}; wanted: a boolean tensor (B, H, W)")
    if masks.dtype != torch.bool:
        raise TypeError(f"masks has dtype {masks.dtype}; wanted: torch.bool, as masks > 0 gives")
    if masks.dim() != 3:
        raise ValueError(f"masks has shape {tuple(masks.shape)}; wanted: (B, H, W)")
    empty = (~masks.flatten(1).any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"masks is empty for image(s) {empty}; wanted: a pixel or more in each")
    given = attributions[0] if isinstance(attributions, tuple) and attributions else attributions
    channels = given.shape[1] if isinstance(given, Tensor) and given.dim() == 4 else 3
    size, height, width = masks.shape
    maps = as_maps(attributions, (size, height, width), channels).flatten(1)
    return maps, masks.to(maps.device).flatten(1)
