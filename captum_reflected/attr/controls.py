"""Control maps that do not depend on the model; an explanation has to score better."""

from __future__ import annotations

import math
import zlib
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.inputs.batch import make_batch


def random_maps(inputs: Tensor, *, grid_size: tuple[int, int] = (14, 14)) -> Tensor:
    r"""
    Uniform noise, as coarse as the maps of a Vision Transformer.

    Noise per pixel would not be comparable: removing scattered pixels disturbs a model in
    another way than removing patches. So the noise has the resolution of the token grid and is
    enlarged bilinearly, like token maps.

    The noise of an image is seeded by its content. It does not depend on the batch, the order,
    the process or the state of the random number generators.

    Args:

        inputs (Tensor): Images (B, C, H, W); only their content counts.
        grid_size (tuple[int, int], optional): Rows and columns of the noise.
                    Default: ``(14, 14)``, the tokens of 224 x 224 pixels in patches of 16

    Returns:
        *Tensor* (B, H, W), from 0 to 1, in the dtype and on the device of the images.

    Raises:
        TypeError: not a tensor of floating point numbers.
        ValueError: not of the shape (B, C, H, W), not finite, or no grid.
    """
    TokenLayout(0, grid_size)  # checks the grid
    batch = make_batch(inputs, None, None)
    grids = [
        torch.rand(grid_size, generator=torch.Generator().manual_seed(_checksum(image)))
        for image in batch.images
    ]
    maps = F.interpolate(torch.stack(grids)[:, None], size=batch.image_size, mode="bilinear")
    return maps[:, 0].to(batch.images)


def center_gaussian_maps(inputs: Tensor, *, sigma: float = 0.25) -> Tensor:
    r"""
    A Gaussian at the centre of every image, where photographers tend to place the object.

    Metrics that only use the ranking of the pixels (deletion, insertion, rank accuracy) do not
    depend on ``sigma``.

    Args:

        inputs (Tensor): Images (B, C, H, W); only their shape counts.
        sigma (float, optional): Standard deviation, as a share of height and width.
                    Default: 0.25

    Returns:
        *Tensor* (B, H, W), from 0 to 1, in the dtype and on the device of the images.

    Raises:
        TypeError: not a tensor of floating point numbers, or ``sigma`` is not a number.
        ValueError: not of the shape (B, C, H, W), not finite, or ``sigma`` is not positive.
    """
    if isinstance(sigma, bool) or not isinstance(sigma, (int, float)):
        raise TypeError(f"sigma is {sigma!r}; wanted: a number, as a share of the image's sides")
    if not 0 < sigma < math.inf:
        raise ValueError(f"sigma is {sigma}; wanted: a finite number above 0")
    batch = make_batch(inputs, None, None)
    rows, columns = (
        torch.exp(-(((torch.arange(side) + 0.5) / side - 0.5) ** 2) / (2 * sigma**2))
        for side in batch.image_size
    )
    gaussian = torch.outer(rows, columns).to(batch.images)
    return gaussian.repeat(batch.size, 1, 1)


def _checksum(image: Tensor) -> int:
    content: Any = image.detach().float().cpu().contiguous().numpy()
    return zlib.crc32(content.tobytes())
