"""Localisation metrics: compare attributions with masks of the object.

They need no model. Given attributions and masks, they return one number per image from 0 to 1;
higher is better. A map without positive values scores 0, except in :func:`average_precision`,
which depends only on the order of the pixels.

Sources: Arras, Osman & Samek, *CLEVR-XAI*, Information Fusion 81, 2022, section 3.4 (mass
and rank accuracy); Zhang et al., *Top-Down Neural Attention by Excitation Backprop*,
IJCV 126, 2018, section 4.2 (pointing game). Average precision is the sum over steps of
scikit-learn's ``average_precision_score``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.metrics._maps import as_maps


def relevance_mass_accuracy(
    attributions: Tensor | tuple[Tensor], *, masks: Tensor, ignore: Tensor | None = None
) -> Tensor:
    r"""
    Share of the positive attribution that lies inside the mask.

    Args:

        attributions (Tensor or tuple[Tensor]): (B, C, H, W) or (B, H, W); channels are summed.
        masks (Tensor): (B, H, W), boolean, true on the object.
        ignore (Tensor, optional): (B, H, W), boolean, true on pixels that count neither as
                    object nor as background, such as the uncertain outline of an object; what
                    ``masks`` says there is not used.
                    Default: None (every pixel counts)

    Returns:
        *Tensor* (B,).

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes do not fit, a mask is empty or ignored as a whole, or a value is not
                    finite.

    Examples::

        >>> heat = torch.tensor([[[3.0, 1.0], [0.0, -5.0]]])
        >>> mask = torch.tensor([[[True, False], [False, True]]])
        >>> relevance_mass_accuracy(heat, masks=mask)
        tensor([0.7500])
    """
    maps, masks = _check(attributions, masks, ignore)
    positive = maps.clamp(min=0)
    # Scaled, since the sum of very large numbers would be infinite; the shares do not change.
    positive = positive / positive.amax(dim=1, keepdim=True).clamp(min=1)
    total = positive.sum(dim=1)
    return torch.where(total > 0, (positive * masks).sum(dim=1) / total, 0)


def relevance_rank_accuracy(
    attributions: Tensor | tuple[Tensor], *, masks: Tensor, ignore: Tensor | None = None
) -> Tensor:
    r"""
    Share of the K pixels of highest attribution that lie inside the mask of K pixels.

    If several pixels tie for the last places, each counts with an equal fraction, so the
    result does not depend on their positions in the image.

    Args:

        attributions (Tensor or tuple[Tensor]): As in :func:`relevance_mass_accuracy`.
        masks (Tensor): As in :func:`relevance_mass_accuracy`.
        ignore (Tensor, optional): As in :func:`relevance_mass_accuracy`.
                    Default: None (every pixel counts)

    Returns:
        *Tensor* (B,).

    Raises:
        TypeError: As in :func:`relevance_mass_accuracy`.
        ValueError: As in :func:`relevance_mass_accuracy`.
    """
    maps, masks = _check(attributions, masks, ignore)
    mask_sizes = masks.sum(dim=1, keepdim=True)
    threshold = maps.sort(dim=1, descending=True).values.gather(1, mask_sizes - 1)
    above, tied = maps > threshold, maps == threshold
    remaining = mask_sizes - above.sum(dim=1, keepdim=True)
    fraction = remaining.to(maps) / tied.sum(dim=1, keepdim=True)
    hits = ((above + tied * fraction) * masks).sum(dim=1)
    return torch.where(maps.amax(dim=1) > 0, hits / mask_sizes.squeeze(1), 0)


def pointing_game(
    attributions: Tensor | tuple[Tensor],
    *,
    masks: Tensor,
    ignore: Tensor | None = None,
    tolerance: float = 0,
) -> Tensor:
    r"""
    Whether the highest pixel lies inside the mask.

    If several pixels share the highest value, the result is the share of them inside the mask.

    Args:

        attributions (Tensor or tuple[Tensor]): As in :func:`relevance_mass_accuracy`.
        masks (Tensor): As in :func:`relevance_mass_accuracy`.
        ignore (Tensor, optional): As in :func:`relevance_mass_accuracy`.
                    Default: None (every pixel counts)
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
    maps, counted_masks = _check(attributions, masks, ignore)
    near = _dilated(counted_masks.view(masks.shape), tolerance).flatten(1)
    highest = maps.amax(dim=1, keepdim=True)
    tied = maps == highest
    share = (tied & near).sum(dim=1).to(maps) / tied.sum(dim=1)
    return torch.where(highest.squeeze(1) > 0, share, 0)


def average_precision(
    attributions: Tensor | tuple[Tensor], *, masks: Tensor, ignore: Tensor | None = None
) -> Tensor:
    r"""
    Area under the precision-recall curve of the map as a detector of the object's pixels.

    With a threshold at every value of the map, precision is the share of the pixels at or above
    it that lie inside the mask, and recall the share of the mask that is found. The area is the
    sum :math:`\sum_n (R_n - R_{n-1}) P_n`, without interpolation, as computed by scikit-learn's
    ``average_precision_score``. Tied pixels share one threshold, so the result does not depend on
    their positions in the image. A constant map scores the mask's share of the pixels.

    Args:

        attributions (Tensor or tuple[Tensor]): As in :func:`relevance_mass_accuracy`.
        masks (Tensor): As in :func:`relevance_mass_accuracy`.
        ignore (Tensor, optional): As in :func:`relevance_mass_accuracy`.
                    Default: None (every pixel counts)

    Returns:
        *Tensor* (B,).

    Raises:
        TypeError: As in :func:`relevance_mass_accuracy`.
        ValueError: As in :func:`relevance_mass_accuracy`.

    Examples::

        >>> heat = torch.tensor([[[4.0, 3.0], [2.0, 1.0]]])
        >>> mask = torch.tensor([[[True, False], [True, False]]])
        >>> average_precision(heat, masks=mask)
        tensor([0.8333])
    """
    maps, masks = _check(attributions, masks, ignore)
    values, order = maps.sort(dim=1, descending=True)
    hits = masks.gather(1, order)
    # Ignored pixels come last, after all of the mask, so they are in no precision that is used.
    ranks = torch.arange(1, maps.shape[1] + 1, device=maps.device)
    precision = hits.cumsum(dim=1).to(maps) / ranks
    # The sum is the mean, over the mask's pixels, of the precision at each one's threshold:
    # after the last pixel of the same value.
    is_last = F.pad(values[:, 1:] != values[:, :-1], (0, 1), value=True)
    ends = torch.where(is_last, ranks - 1, maps.shape[1]).flip(1).cummin(dim=1).values.flip(1)
    return (precision.gather(1, ends) * hits).sum(dim=1) / hits.sum(dim=1)


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


def _check(attributions: Any, masks: Any, ignore: Any) -> tuple[Tensor, Tensor]:
    """Checks the arguments and returns maps and masks as (B, H * W).

    Ignored pixels are -inf in the maps, below every other pixel, and false in the masks.
    """
    _check_boolean("masks", masks)
    if ignore is not None:
        _check_boolean("ignore", ignore)
        if ignore.shape != masks.shape:
            raise ValueError(
                f"ignore has shape {tuple(ignore.shape)}; wanted: {tuple(masks.shape)}, as masks"
            )
    given = attributions[0] if isinstance(attributions, tuple) and attributions else attributions
    channels = given.shape[1] if isinstance(given, Tensor) and given.dim() == 4 else 3
    size, height, width = masks.shape
    counted = masks if ignore is None else masks & ~ignore.to(masks.device)
    for name, left in (("is empty", masks), ("is ignored as a whole", counted)):
        without = (~left.flatten(1).any(dim=1)).nonzero().flatten().tolist()
        if without:
            raise ValueError(
                f"masks {name} for image(s) {without}; wanted: a pixel or more in each"
            )
    maps = as_maps(attributions, (size, height, width), channels).flatten(1)
    if ignore is not None:
        maps = maps.masked_fill(ignore.to(maps.device).flatten(1), -math.inf)
    return maps, counted.to(maps.device).flatten(1)


def _check_boolean(name: str, masks: Any) -> None:
    if not isinstance(masks, Tensor):
        raise TypeError(f"{name} is a {type(masks).__name__}; wanted: a boolean tensor (B, H, W)")
    if masks.dtype != torch.bool:
        raise TypeError(f"{name} has dtype {masks.dtype}; wanted: torch.bool, as masks > 0 gives")
    if masks.dim() != 3:
        raise ValueError(f"{name} has shape {tuple(masks.shape)}; wanted: (B, H, W)")
