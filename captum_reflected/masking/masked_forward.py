"""The forward of many masked versions of an image, for less than a forward each.

A mask that is constant inside each patch passes through the patch projection, which is linear:
a patch seen through r is projected to r times the patch's projection plus 1 - r times that of
the baseline. One projection then serves all masks, and masked images are never made. Where the
answer is read out of the first tokens only, the last block ends with them.

The model's own code runs, on a copy that shares its tensors and has these parts exchanged.
Whether that gives the model's answers is not guessed from its code but tried out: both forwards
answer a few random masks first, and where they differ the fast one is not used. What cannot be
tried out is leaving tokens out; for that, every part of the model has to be known.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from captum_reflected._captum import run_forward
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.chunks import default_rows_per_forward, in_chunks
from captum_reflected.masking.masked_parts import MaskedForward, MaskedProjection
from captum_reflected.masking.model_structure import (
    can_drop_tokens,
    is_in_bf16,
    patch_and_block_places,
    runs_as_written,
    tokens_read,
)
from captum_reflected.masking.reflection import reflected_images

Forward = Callable[[Tensor, Tensor], Any]
"""From images (R,), by index, and masks (R, gh, gw) to the model's output for each."""

# Up to this, a mismatch is rounding. The first is in units of the dtype's eps: in float32 it is
# 1e-3, while pretrained DeiT and every family of the tests stay below 4e-5, and a block left out or
# two blocks swapped make 0.02 to 60. A GPU may convolve in TF32: 0.03, emulated. Bfloat16 makes up
# to 0.35, and is tried on what was found right in float32, so that no wrong block hides in it.
_TOLERANCE, _TOLERANCE_OF_TF32, _TOLERANCE_OF_BF16 = 1e4, 0.1, 1.0
_LARGE = 0.1  # the user is told of a mismatch beyond this
_told: WeakSet[nn.Module] = WeakSet()


def plain_forward(
    forward_func: Callable[..., Any],
    batch: Batch,
    baselines: Tensor | float,
    *,
    bf16: bool = False,
) -> Forward:
    """The forward of masked images that are made.

    Args:
        forward_func: any function of the images.
        batch: the images, and further arguments.
        baselines: as in :func:`masked_forward`.
        bf16: whether it runs under autocast to bfloat16.
    """

    def forward(image: Tensor, masks: Tensor) -> Any:
        shown = baselines[image] if isinstance(baselines, Tensor) else baselines
        rows = reflected_images(batch.images[image], masks.unsqueeze(1), shown).squeeze(1)
        args, _ = batch.rows(image)
        with torch.autocast(rows.device.type, torch.bfloat16) if bf16 else nullcontext():
            return run_forward(forward_func, rows, args)

    return forward


def masked_forward(
    forward_func: Callable[..., Any],
    images: Tensor,
    grid_size: tuple[int, int],
    baselines: Tensor | float,
    *,
    bf16: bool = False,
    drop_hidden: bool = False,
    forwards: int | None = None,
    rows: int | None = None,
) -> MaskedForward | None:
    """The fast forward of masked images, or ``None`` where its answers are not the model's.

    Two random masks of an image go through both forwards. One image is tried for every 200
    forwards to come, which costs 4 rows in 200 (with bfloat16, which is tried after float32, 6),
    and at least one, the last of the batch: a larger share where few forwards are to come.

    Args:
        forward_func: the model, or an :class:`Autocast` of it to bfloat16.
        images: (B, C, H, W).
        grid_size: (gh, gw), of the masks.
        baselines: what stands where a mask is 0: a number, or a tensor shaped like ``images``.
        bf16: whether the blocks compute in bfloat16.
        drop_hidden: whether image tokens whose mask is 0 will not be fed to the blocks; how many
            are is then said before each forward, by :meth:`MaskedForward.show`.
        forwards: how many are to come; None: so many that all images are tried.
        rows: how many a forward may see; None: what suits the device.

    Returns:
        MaskedForward or None: its answers are those of ``forward_func`` on the masked images, up
            to rounding; with ``drop_hidden``, on sequences of fewer tokens.
    """
    if not (isinstance(forward_func, nn.Module) and runs_as_written(forward_func, images)):
        return None
    model: nn.Module = forward_func
    if is_in_bf16(model):
        model, bf16 = model.model, True
    if images.dtype != torch.float32 and (bf16 or images.dtype != torch.float64):
        return None
    places = patch_and_block_places(model)
    if places is None or (drop_hidden and not can_drop_tokens(model, images)):
        return None
    # In float32 for bfloat16, too: the rounding of both together would hide more.
    plain = plain_forward(model, Batch(images, (), None, is_tuple=False), baselines)
    mismatch = math.nan
    with torch.no_grad():
        try:
            projection = MaskedProjection(
                model.get_submodule(places[0]), images, grid_size, baselines
            )
            trial = _Trial(plain, images, grid_size, forwards, rows)
            for read in dict.fromkeys((tokens_read(model, places[1]), None)):
                for half in (False, True) if bf16 else (False,):
                    fast = MaskedForward(
                        model, places, projection, read=read, bf16=half, drop_hidden=drop_hidden
                    )
                    mismatch = trial.mismatch(fast)
                    if not mismatch <= _tolerance(images, bf16=half):
                        break
                else:
                    return fast
        except Exception:
            return None  # whatever it was, the plain forward is there
    if _LARGE < mismatch < math.inf and forward_func not in _told:
        _told.add(forward_func)
        warnings.warn(
            f"a faster forward of masked images was tried on this {type(forward_func).__name__}, "
            f"and its answers are off by {mismatch:.2g} of what a mask changes; the model itself "
            "runs on every masked image instead: the result is right, but takes longer",
            stacklevel=2,
        )
    return None


def _tolerance(images: Tensor, *, bf16: bool) -> float:
    if bf16:
        return _TOLERANCE_OF_BF16
    rounding = _TOLERANCE * torch.finfo(images.dtype).eps
    return rounding if images.device.type == "cpu" else max(rounding, _TOLERANCE_OF_TF32)


class _Trial:
    """What a model says of two random masks of an image, for some of the images.

    Args:
        plain: the model's forward.
        images, grid_size, forwards, rows: as in :func:`masked_forward`.
    """

    def __init__(
        self,
        plain: Forward,
        images: Tensor,
        grid_size: tuple[int, int],
        forwards: int | None,
        rows: int | None,
    ) -> None:
        count = len(images)
        if forwards is not None:
            count = min(max(round(forwards / 200), 1), count)
        # The last image first: a forward that is right for the first one only has to be found out.
        index = torch.linspace(len(images) - 1, 0, count).round().long().repeat_interleave(2)
        masks = torch.rand(len(index), *grid_size, generator=torch.Generator().manual_seed(0)) ** 3
        masks[1::2] = 1 - masks[1::2]  # one dark, one bright: the more they change, the better
        self._image, self._masks = index.to(images.device), masks.to(images)
        self._rows = rows or default_rows_per_forward(images.device)
        self._expected = self._answers(plain)

    def mismatch(self, fast: Forward) -> float:
        """How far the fast forward is off.

        Returns:
            float: the largest difference in any output, in units of what the other mask of an
            image changes, root mean square over outputs. To that, 0.001 of the outputs is
            added, for models that masks change nothing for.
        """
        expected, given = self._expected, self._answers(fast)
        if (given.shape, given.dtype) != (expected.shape, expected.dtype):
            return math.inf
        expected, given = (
            every.double().reshape(-1, 2, every[0].numel()) for every in (expected, given)
        )
        change = (expected[:, 0] - expected[:, 1]).square().mean(dim=-1).sqrt()
        unit = change + 1e-3 * expected.abs().amax(dim=(1, 2))
        return float(((given - expected).abs().amax(dim=(1, 2)) / unit).max())

    def _answers(self, forward: Forward) -> Tensor:
        def run(start: int, stop: int) -> Tensor:
            output = forward(self._image[start:stop], self._masks[start:stop])
            if not isinstance(output, Tensor) or len(output) != stop - start:
                raise TypeError("there is no output for each image")
            return output

        return in_chunks(run, len(self._image), self._rows, description="", show_progress=False)
