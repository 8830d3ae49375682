"""A fast forward of many masked versions of an image.

The patch projection is linear, so a mask that is constant inside each patch commutes with it: a
patch masked with value r is projected to r times the patch's projection plus 1 - r times that of
the baseline. One projection then serves all masks, and masked images are never computed. If the
output is read from the first tokens only, the last block computes only those.

The model's own code runs, on a copy that shares its tensors, with these parts replaced. A test
run, not an analysis of the code, decides whether the copy is equivalent: both forwards are
compared on a few random masks, and if they differ, the fast one is not used. The same run shows
whether a function does nothing but call the model inside it. Leaving tokens out cannot be tested
this way; for that, every part of the model has to be of a known class.
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

from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.chunks import default_rows_per_forward, in_chunks
from captum_reflected.inputs.devices import to_device
from captum_reflected.inputs.outputs import run_model
from captum_reflected.masking.handing_on import DoesMoreError, WatchedForward
from captum_reflected.masking.masked_parts import MaskedForward, MaskedProjection
from captum_reflected.masking.model_structure import (
    does_more,
    is_in_bf16,
    may_hand_on,
    model_in,
    patch_and_block_places,
    runs_as_written,
    tokens_read,
)
from captum_reflected.masking.precision import may_use_tf32
from captum_reflected.masking.reflection import reflected_images
from captum_reflected.masking.token_dropping import can_drop_tokens

Forward = Callable[[Tensor, Tensor], Any]
"""From image indices (R,) and masks (R, gh, gw) to the model's output for each."""

# A smaller mismatch counts as rounding. The first tolerance is in units of the dtype's eps: in
# float32 it is 1e-3, while pretrained DeiT and every model family in the tests stay below 4e-5, and
# a missing block or two swapped blocks cause 0.02 to 60. A GPU may convolve in TF32, which causes
# 0.03 (emulated). Bfloat16 causes up to 0.35. It is only tested on a forward that was correct in
# float32, so its larger tolerance cannot hide a wrong block.
_TOLERANCE, _TOLERANCE_OF_TF32, _TOLERANCE_OF_BF16 = 1e4, 0.1, 1.0
_MISMATCH_TO_WARN_OF = 0.1
_warned: WeakSet[nn.Module] = WeakSet()


def plain_forward(
    forward_func: Callable[..., Any],
    batch: Batch,
    baselines: Tensor | float,
    *,
    bf16: bool = False,
) -> Forward:
    """The forward that computes the masked images and runs the model on them.

    Args:
        forward_func: any function of the images.
        batch: the images, and further arguments.
        baselines: as in :func:`masked_forward`.
        bf16: whether to run under autocast to bfloat16.
    """

    def forward(image: Tensor, masks: Tensor) -> Any:
        baseline = baselines[image] if isinstance(baselines, Tensor) else baselines
        rows = reflected_images(batch.images[image], masks.unsqueeze(1), baseline).squeeze(1)
        args, _ = batch.rows(image)
        with torch.autocast(rows.device.type, torch.bfloat16) if bf16 else nullcontext():
            return run_model(forward_func, rows, args)

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
    """The fast forward of masked images, or ``None`` if its outputs differ from the model's.

    Both forwards are compared on two random masks per tested image. One image is tested for
    every 200 expected forwards, which costs 4 rows in 200 (6 with bfloat16, which is tested after
    float32). At least one image is tested, the last of the batch, so the share is larger if few
    forwards are expected.

    Args:
        forward_func: the model; a function that does nothing but call it, as its test run shows; or
            an :class:`Autocast` of one of these to bfloat16.
        images: (B, C, H, W).
        grid_size: (gh, gw), of the masks.
        baselines: the values shown where a mask is 0: a number, or a tensor shaped like
            ``images``.
        bf16: whether the blocks compute in bfloat16.
        drop_hidden: whether image tokens whose mask is 0 are left out of the blocks' input.
            :meth:`MaskedForward.show` has to set their number before each forward.
        forwards: number of expected forwards; None tests all images.
        rows: maximal number of rows in one forward; None: the default for the device.

    Returns:
        MaskedForward or None: its outputs equal those of ``forward_func`` on the masked images,
            up to rounding; with ``drop_hidden``, on sequences of fewer tokens.
    """
    if is_in_bf16(forward_func):
        if not runs_as_written(forward_func, images):
            return None
        forward_func, bf16 = forward_func.model, True
    if images.dtype != torch.float32 and (bf16 or images.dtype != torch.float64):
        return None
    model = model_in(forward_func)
    if model is None or not (may_hand_on(forward_func) and runs_as_written(model, images)):
        return None
    places = patch_and_block_places(model)
    if places is None or (drop_hidden and not can_drop_tokens(forward_func, images)):
        return None
    watched = None if model is forward_func else WatchedForward(forward_func, model)
    # In float32 even if the fast forward is in bfloat16: rounding of both would hide more errors.
    batch = Batch(images, (), None, is_tuple=False)
    plain = plain_forward(watched or forward_func, batch, baselines)
    mismatch = math.nan
    with torch.no_grad():
        try:
            projection = MaskedProjection(
                model.get_submodule(places[0]), images, grid_size, baselines
            )
            # What a function does shows in a run of one image.
            plain_rows = rows if watched is None else 1
            comparison = _Comparison(plain, images, grid_size, forwards, plain_rows, rows)
            for read in dict.fromkeys((tokens_read(model, places[1]), None)):
                for half in (False, True) if bf16 else (False,):
                    fast = MaskedForward(
                        model, places, projection, read=read, bf16=half, drop_hidden=drop_hidden
                    )
                    mismatch = comparison.mismatch(fast)
                    if not mismatch <= _tolerance(images, bf16=half):
                        break
                else:
                    return fast
        except DoesMoreError:
            does_more(forward_func)
            return None
        except Exception:
            return None  # whatever failed, the plain forward still works
    if _MISMATCH_TO_WARN_OF < mismatch < math.inf and model not in _warned:
        _warned.add(model)
        warnings.warn(
            f"a faster forward of masked images was tried on this {type(model).__name__}, "
            f"and its outputs are off by {mismatch:.2g} of the change that a mask causes; the "
            "model itself runs on every masked image instead: the result is right, but takes "
            "longer",
            stacklevel=2,
        )
    return None


def _tolerance(images: Tensor, *, bf16: bool) -> float:
    if bf16:
        return _TOLERANCE_OF_BF16
    rounding = _TOLERANCE * torch.finfo(images.dtype).eps
    is_rounded_more = images.dtype == torch.float32 and may_use_tf32(images.device)
    return max(rounding, _TOLERANCE_OF_TF32) if is_rounded_more else rounding


class _Comparison:
    """Compares forwards with the model's outputs for two random masks per tested image.

    Args:
        plain: the model's forward.
        images, grid_size, forwards, rows: as in :func:`masked_forward`.
        plain_rows: the same as ``rows``, for the model's forward.
    """

    def __init__(
        self,
        plain: Forward,
        images: Tensor,
        grid_size: tuple[int, int],
        forwards: int | None,
        plain_rows: int | None,
        rows: int | None,
    ) -> None:
        count = len(images)
        if forwards is not None:
            count = min(max(round(forwards / 200), 1), count)
        # Starts from the last image, to detect a forward that is correct for the first one only.
        index = torch.linspace(len(images) - 1, 0, count).round().long().repeat_interleave(2)
        masks = torch.rand(len(index), *grid_size, generator=torch.Generator().manual_seed(0)) ** 3
        # One dark and one bright mask: the larger the change, the more sensitive the comparison.
        masks[1::2] = 1 - masks[1::2]
        self._image = to_device(index, images.device)
        self._masks = to_device(masks.to(images.dtype), images.device)
        default = default_rows_per_forward(images.device)
        self._rows = rows or default
        self._expected = self._outputs(plain, plain_rows or default)

    def mismatch(self, fast: Forward) -> float:
        """How far the outputs of the fast forward are from the model's.

        Returns:
            float: the largest difference in any output, divided by the change between the two
            masks of an image (root mean square over outputs). 0.001 of the largest output is
            added to the divisor, for models whose outputs masks do not change.
        """
        expected, actual = self._expected, self._outputs(fast, self._rows)
        if (actual.shape, actual.dtype) != (expected.shape, expected.dtype):
            return math.inf
        expected, actual = (
            outputs.double().reshape(-1, 2, outputs[0].numel()) for outputs in (expected, actual)
        )
        change = (expected[:, 0] - expected[:, 1]).square().mean(dim=-1).sqrt()
        unit = change + 1e-3 * expected.abs().amax(dim=(1, 2))
        return float(((actual - expected).abs().amax(dim=(1, 2)) / unit).max())

    def _outputs(self, forward: Forward, rows: int) -> Tensor:
        def run(start: int, stop: int) -> Tensor:
            output = forward(self._image[start:stop], self._masks[start:stop])
            if not isinstance(output, Tensor) or len(output) != stop - start:
                raise TypeError("there is no output for each image")
            return output

        return in_chunks(run, len(self._image), rows, description="", show_progress=False)
