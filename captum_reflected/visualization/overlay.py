"""Overlays: a picture in colour under a heat map, as an array."""

from __future__ import annotations

import math
from dataclasses import dataclass

import matplotlib
import numpy as np
import numpy.typing as npt
from PIL import Image

# Monotonic in lightness, so it works for colour-blind readers and in greyscale print.
HEAT_COLORS = "inferno"
# Of the bright end of the colours.
OPACITY = 0.8
# Opacity of the dark end, as a share of that of the bright end. With none, the map's low values
# could not be distinguished; with much, the photo would be too dark where they are.
_DARK_SHARE = 0.3
# How much of the photo's own colours a map of full opacity removes, so that they are not mistaken
# for the map's.
_COLORS_REMOVED = 0.75
# Of red, green and blue, in the lightness of a grey picture (ITU-R BT.601).
_LIGHTNESS = np.array([0.299, 0.587, 0.114], dtype=np.float32)
# The highest values up to this share of a map's sum would hide the rest, as in Captum's pictures.
_CLIPPED_SHARE = 0.02
# How much of the colour remains where the model did not see the photo.
_UNSEEN = 0.35

Pixels = npt.NDArray[np.uint8]
_Values = npt.NDArray[np.float64]
_Colors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class HeatScale:
    """Values at the dark and the bright end of a heat map's colours."""

    low: float
    high: float

    def __call__(self, heat: _Values) -> _Values:
        """Positions from 0 (dark) to 1 (bright)."""
        if self.high <= self.low:
            return np.zeros(heat.shape)
        shares: _Values = np.clip((heat - self.low) / (self.high - self.low), 0, 1)
        return shares


@dataclass(frozen=True)
class Box:
    """The part of a photo that a model sees, in pixels of the photo; it may be larger than it."""

    left: float
    top: float
    right: float
    bottom: float

    def share_of(self, width: int, height: int) -> float:
        """The share of a photo's pixels that lie in the box."""
        seen_width = min(self.right, width) - max(self.left, 0)
        seen_height = min(self.bottom, height) - max(self.top, 0)
        return max(seen_width, 0) * max(seen_height, 0) / (width * height)


def heat_scale(heat: npt.ArrayLike) -> HeatScale:
    """The ends of the colours of a map.

    Negative values are dark; if all values are positive, the smallest is dark. The highest values,
    which together have 2 % of the map's sum above the dark end, are all at the bright end.
    """
    values = np.asarray(heat, dtype=np.float64)
    low = max(float(values.min()), 0.0)
    positive = np.sort((values - low).clip(min=0), axis=None)
    reached = np.cumsum(positive)
    place = int(np.searchsorted(reached, (1 - _CLIPPED_SHARE) * reached[-1]))
    return HeatScale(low, low + float(positive[min(place, len(positive) - 1)]))


def overlay(
    picture: npt.ArrayLike,
    heat: npt.ArrayLike,
    *,
    alpha: float = OPACITY,
    cmap: str = HEAT_COLORS,
    scale: HeatScale | None = None,
) -> Pixels:
    """Draws a heat map over a picture, which remains visible everywhere.

    The map is most opaque where it is bright; where it is dark, it has 30 % of that opacity. The
    picture's own colours are paler than without a map, so that they are not mistaken for the map's.

    Args:
        picture: (H, W, 3 or 4); from 0 to 1, or uint8.
        heat: (H, W).
        alpha: opacity of the bright end of the map's colours, from 0 to 1; 0 leaves the picture
            as it is.
        cmap: name of a colour map of matplotlib.
        scale: the values at the ends of the colours; :func:`heat_scale` of the map if None.

    Returns:
        ndarray: (H, W, 3), uint8.

    Raises:
        ValueError: shapes do not fit, ``alpha`` is not from 0 to 1, or ``cmap`` is unknown.
    """
    check_style(alpha, cmap)
    pixels = np.asarray(picture)
    values = np.asarray(heat, dtype=np.float64)
    if pixels.ndim != 3 or pixels.shape[-1] not in (3, 4) or pixels.shape[:2] != values.shape:
        raise ValueError(
            f"picture has shape {pixels.shape} and heat {values.shape}; wanted: (H, W, 3) and "
            "(H, W)"
        )
    below = pixels[..., :3].astype(np.float32)
    if pixels.dtype == np.uint8:
        below = below / np.float32(255)
    return _mixed(below, (scale or heat_scale(values))(values), alpha, cmap)


def heat_bar(*, alpha: float = OPACITY, cmap: str = HEAT_COLORS) -> Pixels:
    """The colours of an overlay from the dark to the bright end, over a mid-grey picture.

    Args:
        alpha: as in :func:`overlay`.
        cmap: as in :func:`overlay`.

    Returns:
        ndarray: (1, 256, 3), uint8.
    """
    check_style(alpha, cmap)
    below = np.full((1, 256, 3), 0.5, dtype=np.float32)
    return _mixed(below, np.linspace(0.0, 1.0, 256)[None], alpha, cmap)


def _mixed(below: _Colors, places: _Values, alpha: float, cmap: str) -> Pixels:
    """Colours (H, W, 3) from 0 to 1, under a map whose values are at these places (H, W)."""
    grey = (below @ _LIGHTNESS)[..., None]
    paler = below + _COLORS_REMOVED * alpha * (grey - below)
    opacity = (alpha * (_DARK_SHARE + (1 - _DARK_SHARE) * places))[..., None].astype(np.float32)
    colors = matplotlib.colormaps[cmap](places)[..., :3].astype(np.float32)
    mixed = (1 - opacity) * paler + opacity * colors
    result: Pixels = (255 * mixed.clip(0, 1)).round().astype(np.uint8)
    return result


def photo_overlay(
    photo: Pixels,
    heat: npt.ArrayLike,
    box: Box,
    *,
    alpha: float = OPACITY,
    cmap: str = HEAT_COLORS,
    scale: HeatScale | None = None,
) -> Pixels:
    """Draws the map of a model's input over the whole photo, at the photo's own size.

    Args:
        photo: (H, W, 3), uint8.
        heat: (h, w), the map of the model's input.
        box: where that input lies in the photo. The rest of the photo, which the model did not
            see, is faded.
        alpha: as in :func:`overlay`.
        cmap: as in :func:`overlay`.
        scale: as in :func:`overlay`.

    Returns:
        ndarray: (H, W, 3), uint8.
    """
    values = np.asarray(heat, dtype=np.float32)
    height, width = photo.shape[:2]
    left, right = max(round(box.left), 0), min(round(box.right), width)
    top, bottom = max(round(box.top), 0), min(round(box.bottom), height)
    per_x = values.shape[1] / (box.right - box.left)
    per_y = values.shape[0] / (box.bottom - box.top)
    part = (
        max((left - box.left) * per_x, 0.0),
        max((top - box.top) * per_y, 0.0),
        min((right - box.left) * per_x, values.shape[1]),
        min((bottom - box.top) * per_y, values.shape[0]),
    )
    size = (right - left, bottom - top)
    enlarged = Image.fromarray(values).resize(size, Image.Resampling.BILINEAR, box=part)
    result = (255 - _UNSEEN * (255 - photo.mean(axis=-1, keepdims=True))).repeat(3, axis=-1)
    pixels: Pixels = result.round().astype(np.uint8)
    pixels[top:bottom, left:right] = overlay(
        photo[top:bottom, left:right],
        np.asarray(enlarged),
        alpha=alpha,
        cmap=cmap,
        scale=scale or heat_scale(values),
    )
    return pixels


def check_style(alpha: float, cmap: str) -> None:
    """Raises ValueError unless the opacity is from 0 to 1 and matplotlib has the colour map."""
    if not (isinstance(alpha, (int, float)) and math.isfinite(alpha) and 0 <= alpha <= 1):
        raise ValueError(f"alpha is {alpha!r}; wanted: a number from 0 to 1")
    if cmap not in matplotlib.colormaps:
        raise ValueError(
            f"cmap is {cmap!r}; wanted: a colour map of matplotlib, such as inferno, viridis, turbo"
        )
