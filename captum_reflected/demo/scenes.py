"""Scenes whose truth is known: one textured object whose texture alone names the class."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Array = NDArray[np.float64]
Mask = NDArray[np.bool_]
Texture = Callable[[Array, Array], Array]
Paint = Callable[[Array, Array], Array]

# Lengths below are pixels of a 96-pixel scene; other sizes scale them.
_REFERENCE_SIZE = 96
_OBJECT_RADIUS = (13.0, 23.0)
_PERIOD = (7.0, 9.5)
_DISTRACTORS = (3, 6)


@dataclass(frozen=True)
class Scenes:
    """Pictures with the truth about them.

    Attributes:
        images: Colour pictures, uint8, shape ``(S, 3, size, size)``.
        masks: True exactly on the visible pixels of the object that makes the class, bool,
            shape ``(S, size, size)``.
        labels: Indices into :data:`CLASS_NAMES`, int64, shape ``(S,)``.
    """

    images: Tensor
    masks: Tensor
    labels: Tensor


def _triangle(x: Array) -> Array:
    """Triangle wave of period 1 between 0 (at whole numbers) and 1."""
    return np.asarray(1.0 - np.abs(2.0 * (x - np.floor(x)) - 1.0))


def _bands(x: Array) -> Array:
    return (_triangle(x) < 0.5).astype(np.float64)


def _cell(x: Array) -> Array:
    """Distance to the nearest whole number, signed, in [-0.5, 0.5]."""
    return np.asarray(x - np.round(x))


def _dots(u: Array, v: Array) -> Array:
    staggered = u + 0.5 * (np.round(v) % 2)
    return (np.hypot(_cell(staggered), _cell(v)) < 0.33).astype(np.float64)


def _plus_signs(u: Array, v: Array) -> Array:
    x, y = np.abs(_cell(u / 1.15)), np.abs(_cell(v / 1.15))
    return ((np.minimum(x, y) < 0.13) & (np.maximum(x, y) < 0.39)).astype(np.float64)


def _bricks(u: Array, v: Array) -> Array:
    row = np.round(v)
    joint = np.abs(_cell(0.6 * u + 0.5 * (row % 2))) < 0.1
    return (joint | (np.abs(_cell(v)) > 0.36)).astype(np.float64)


# Each texture maps coordinates in periods, v growing downwards, to 0 or 1 (which colour).
_TEXTURES: dict[str, Texture] = {
    "horizontal stripes": lambda u, v: _bands(v),
    "vertical stripes": lambda u, v: _bands(u),
    "rising diagonals": lambda u, v: _bands((u + v) * np.sqrt(0.5)),
    "falling diagonals": lambda u, v: _bands((u - v) * np.sqrt(0.5)),
    "checkerboard": lambda u, v: (np.floor(1.5 * u) + np.floor(1.5 * v)) % 2,
    "dots": _dots,
    "rings": lambda u, v: _bands(np.hypot(u, v)),
    "plus signs": _plus_signs,
    "bricks": _bricks,
    "zigzag": lambda u, v: _bands(v + 0.8 * _triangle(0.6 * u)),
}

CLASS_NAMES: tuple[str, ...] = tuple(_TEXTURES)


def generate_scenes(count: int, *, seed: int, size: int = _REFERENCE_SIZE) -> Scenes:
    """Draws scenes, each with one textured object among clutter and untextured distractors.

    The outline, size, place and colours of the object say nothing about its class; only the
    texture does. Distractors share its outlines, sizes and contrasts but are flat or noisy,
    and lie beside or behind the object, never over it. Classes are balanced to within one.

    Args:
        count: Number of scenes ``S``.
        seed: The same seed gives the same bytes. NumPy's and PyTorch's global random states
            are neither read nor changed.
        size: Height and width of the pictures in pixels.

    Returns:
        ``S`` scenes in shuffled order of class.
    """
    rng = np.random.default_rng(seed)
    labels = rng.permutation(np.arange(count) % len(CLASS_NAMES))
    images = np.empty((count, 3, size, size), np.uint8)
    masks = np.empty((count, size, size), np.bool_)
    for index, label in enumerate(labels):
        images[index], masks[index] = _draw_scene(rng, CLASS_NAMES[label], size)
    return Scenes(torch.from_numpy(images), torch.from_numpy(masks), torch.from_numpy(labels))


def _draw_scene(rng: np.random.Generator, name: str, size: int) -> tuple[NDArray[np.uint8], Mask]:
    scale = size / _REFERENCE_SIZE
    canvas = _background(rng, size)

    radius = rng.uniform(*_OBJECT_RADIUS) * scale
    centre = rng.uniform(radius + 1, size - radius - 1, 2)
    mask = _outline(rng, centre, radius, size)

    for _ in range(rng.integers(_DISTRACTORS[0], _DISTRACTORS[1] + 1)):
        other_radius = rng.uniform(*_OBJECT_RADIUS) * scale
        places = rng.uniform(0.5 * other_radius, size - 0.5 * other_radius, (12, 2))
        # The freest of a dozen places: mostly beside the object, now and then partly behind.
        clear = np.hypot(*(places - centre).T) >= 0.9 * (radius + other_radius)
        place = places[np.argmax(clear)]
        shape = _outline(rng, place, other_radius, size)
        _paint(canvas, shape, _distractor_pattern(rng, size), _contrasting_colours(rng))

    pattern = _textured_pattern(rng, name, centre, size)
    _paint(canvas, mask, pattern, _contrasting_colours(rng))
    canvas += rng.normal(0.0, 0.012, canvas.shape)
    return np.round(255 * canvas.clip(0.0, 1.0)).astype(np.uint8), mask


def _paint(canvas: Array, shape: Mask, pattern: Array, colours: Array) -> None:
    """Mixes two colours by the pattern, inside the shape only."""
    weight = pattern[shape]
    canvas[:, shape] = colours[0, :, None] * (1 - weight) + colours[1, :, None] * weight


def _textured_pattern(rng: np.random.Generator, name: str, centre: Array, size: int) -> Array:
    """The texture of the class over the whole picture, softened at its edges."""
    period = rng.uniform(*_PERIOD) * size / _REFERENCE_SIZE
    # Rings stay about the object's centre; every other texture takes any phase.
    phase = rng.uniform(-2.0, 2.0, 2) * (0.15 if name == "rings" else 1.0)
    tilt = rng.uniform(-0.12, 0.12)
    # Four samples a pixel, averaged, keep edges smooth.
    fine = (np.arange(2 * size) + 0.5) / 2
    y, x = (fine[:, None] - centre[0]) / period, (fine[None, :] - centre[1]) / period
    u = np.cos(tilt) * x + np.sin(tilt) * y + phase[0]
    v = np.cos(tilt) * y - np.sin(tilt) * x + phase[1]
    samples: Array = _TEXTURES[name](u, v).reshape(size, 2, size, 2)
    return np.asarray(samples.mean(axis=(1, 3)))


def _distractor_pattern(rng: np.random.Generator, size: int) -> Array:
    """Flat, or noise of the contrast of a texture but without its order."""
    if rng.random() < 0.5:
        return np.zeros((size, size))
    noise = _smooth_noise(rng, 1, int(rng.integers(size // 5, size // 2)), size)[0]
    return np.asarray(np.clip(0.5 + 4.0 * (noise - np.median(noise)), 0.0, 1.0))


def _outline(rng: np.random.Generator, centre: Array, radius: float, size: int) -> Mask:
    """A filled shape: disc, ellipse, polygon, star or blob, reaching at most ``radius``."""
    pixels = np.arange(size) + 0.5
    y, x = pixels[:, None] - centre[0], pixels[None, :] - centre[1]
    distance = np.hypot(x, y)
    filled: Mask = distance < radius
    rows, columns = filled.nonzero()
    angle = np.arctan2(y[rows, 0], x[0, columns]) + rng.uniform(0, 2 * np.pi)
    kind = rng.integers(5)
    reach: Array
    if kind == 0:
        reach = np.ones_like(angle)
    elif kind == 1:
        ratio = rng.uniform(0.62, 0.85)
        reach = ratio / np.hypot(ratio * np.cos(angle), np.sin(angle))
    elif kind == 2:
        half = np.pi / rng.integers(3, 8)
        reach = np.cos(half) / np.cos(angle % (2 * half) - half)
        if half > 1.0:  # a triangle is small for its reach
            reach = np.maximum(reach, 0.62)
    elif kind == 3:
        points = rng.integers(5, 8)
        inner = rng.uniform(0.55, 0.7)
        reach = inner + (1 - inner) * _triangle(angle * points / (2 * np.pi))
    else:
        waves = np.arange(2, 6)[:, None]
        weights = rng.uniform(-0.12, 0.12, (4, 1))
        phases = rng.uniform(0, 2 * np.pi, (4, 1))
        reach = 1 + (weights * np.cos(waves * angle + phases)).sum(0)
        reach = reach / reach.max()
    filled[rows, columns] = distance[rows, columns] < radius * reach
    return filled


def _background(rng: np.random.Generator, size: int) -> Array:
    """A colour gradient under smooth coloured noise and a few curved scribbles."""
    start, end = rng.uniform(0.15, 0.85, (2, 3, 1, 1))
    direction = rng.uniform(0, 2 * np.pi)
    ramp = np.linspace(-0.5, 0.5, size)
    along = 0.5 + 0.7 * (np.cos(direction) * ramp[:, None] + np.sin(direction) * ramp[None, :])
    canvas = np.asarray(start + (end - start) * along)
    canvas += 0.3 * (_smooth_noise(rng, 3, 5, size) - 0.5)
    canvas += 0.2 * (_smooth_noise(rng, 3, 16, size) - 0.5)
    for _ in range(rng.integers(3, 8)):
        _scribble(rng, canvas)
    return canvas


def _scribble(rng: np.random.Generator, canvas: Array) -> None:
    """A thin cubic curve across the canvas."""
    size = canvas.shape[-1]
    t = np.linspace(0, 1, 4 * size)
    basis = np.stack([(1 - t) ** 3, 3 * t * (1 - t) ** 2, 3 * t**2 * (1 - t), t**3], 1)
    path = np.floor(basis @ rng.uniform(-0.2 * size, 1.2 * size, (4, 2))).astype(np.int64)
    width = int(rng.integers(1, 3))
    offsets = np.stack(np.divmod(np.arange(width**2), width), 1)
    path = (path[:, None] + offsets).reshape(-1, 2)
    path = path[((path >= 0) & (path < size)).all(1)]
    canvas[:, path[:, 0], path[:, 1]] = rng.uniform(0, 1, (3, 1))


def _smooth_noise(rng: np.random.Generator, channels: int, cells: int, size: int) -> Array:
    """Noise in [0, 1] on a coarse grid, interpolated to ``(channels, size, size)``."""
    grid = rng.uniform(0, 1, (channels, cells, cells))
    # One matrix of linear weights serves both axes.
    where = np.linspace(0, cells - 1, size)
    weights = np.clip(1 - np.abs(where[:, None] - np.arange(cells)), 0, 1)
    return np.asarray(weights @ grid @ weights.T)


def _contrasting_colours(rng: np.random.Generator) -> Array:
    """Two RGB colours, shape ``(2, 3)``, clearly apart in brightness."""
    while True:
        pair = rng.uniform(0, 1, (2, 3))
        brightness = pair @ np.array([0.299, 0.587, 0.114])
        if abs(brightness[0] - brightness[1]) > 0.35:
            return np.asarray(pair)
