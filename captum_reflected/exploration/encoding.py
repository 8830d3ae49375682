"""Numbers and pictures as text that a web page can hold.

Bytes are compressed with zlib and written in base64. Values of 8 bits come with their scale.
"""

from __future__ import annotations

import base64
import io
import zlib
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from captum_reflected.masking.reflection import replace_diagonal

_LEVELS = 255
# A picture with longer sides is reduced; it is only looked at.
_LONGEST_SIDE = 1024

Bytes = npt.NDArray[np.uint8]


def pack(values: npt.NDArray[Any]) -> str:
    """An array's bytes, little-endian in raster order, compressed, in base64."""
    ordered = np.ascontiguousarray(values, dtype=values.dtype.newbyteorder("<"))
    return base64.b64encode(zlib.compress(ordered.tobytes(), 9)).decode("ascii")


def pack_floats(values: Tensor) -> str:
    """Exact float32 values."""
    return pack(values.detach().cpu().numpy().astype(np.float32))


@dataclass(frozen=True)
class Flow:
    """Relevance among image tokens in 8 bits, with a scale for each token that it comes from.

    The values that token j flows are ``low[j] + (high[j] - low[j]) * (levels[j] / 255) ** 2``. The
    square spends the levels on the small values, of which there are most. Flow of a token into
    itself is not part of the levels, since it dwarfs the rest; the largest other value stands in
    its place, as in equations 1-2 of Sago & Hotta. So ``(levels[j] / 255) ** 2`` is also the "red"
    of their Figure 4, and ``high`` min-max normalised is its "green".

    Attributes:
        levels: (J, T), by the token j that it comes from; T receiving blocks in raster order.
        low: (J,), the smallest value of each token.
        high: (J,), the largest.
        own: (J,), how much each token flows into itself.
        block: side length of a receiving block in tokens; 1 for every token by itself.
        error: the largest rounding error, as a share of the largest value of the token.
    """

    levels: Bytes
    low: Tensor
    high: Tensor
    own: Tensor
    block: int
    error: float

    def to_json(self) -> dict[str, Any]:
        """As the page's script reads it."""
        return {
            "levels": pack(self.levels),
            "low": pack_floats(self.low),
            "high": pack_floats(self.high),
            "own": pack_floats(self.own),
            "block": self.block,
        }


def flow_values(relevance: Tensor, grid_size: tuple[int, int], block: int) -> Tensor:
    """What each token flows into each block of tokens, with the diagonal replaced.

    Args:
        relevance: (J, J), [i, j] is how much j flows into i.
        grid_size: (gh, gw) of the tokens.
        block: side length of a receiving block; its value is the mean of its tokens.

    Returns:
        Tensor: (J, T), float32, by the token that it comes from.
    """
    columns = replace_diagonal(relevance.float().unsqueeze(0))[0].T
    if block == 1:
        return columns
    grid = columns.reshape(-1, 1, *grid_size)
    # The last block of a row or column may hold fewer tokens.
    return F.avg_pool2d(grid, block, ceil_mode=True, count_include_pad=False).flatten(1)


def quantise_flow(values: Tensor, own: Tensor, block: int) -> Flow:
    """The values of :func:`flow_values` in 8 bits; ``own`` (J,) is the diagonal."""
    low, high = values.amin(dim=1), values.amax(dim=1)
    span = (high - low)[:, None]
    red = torch.where(span > 0, (values - low[:, None]) / span, 0)
    levels = (red.sqrt() * _LEVELS).round()
    rounding = ((levels / _LEVELS).square() - red).abs() * span
    share = torch.where(high[:, None] > 0, rounding / high[:, None], 0)
    return Flow(levels.to(torch.uint8).numpy(), low, high, own.float(), block, float(share.max()))


def map_json(values: Tensor) -> dict[str, Any]:
    """A map (J,) in 8 bits: ``low + (high - low) * level / 255``."""
    low, high = float(values.min()), float(values.max())
    red = (values.double() - low) / (high - low) if high > low else torch.zeros_like(values)
    levels = (red * _LEVELS).round().to(torch.uint8).numpy()
    return {"low": low, "high": high, "levels": pack(levels)}


def picture_uri(picture: Tensor, *, quality: int = 90) -> str:
    """A picture (H, W, 3) from 0 to 1 as the address of a JPEG."""
    image = Image.fromarray((picture * 255).round().to(torch.uint8).numpy())
    image.thumbnail((_LONGEST_SIDE, _LONGEST_SIDE))
    file = io.BytesIO()
    image.save(file, "jpeg", quality=quality, subsampling=0)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode('ascii')}"
