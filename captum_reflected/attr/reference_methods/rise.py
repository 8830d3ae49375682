"""RISE."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.attr.reference_methods._shared import Forward
from captum_reflected.masking.scoring import score_masks


def rise_maps(
    forward_func: Forward, images: Tensor, target: Tensor, *, num_masks: int = 1024
) -> Tensor:
    """RISE (Petsiuk, Das & Saenko, BMVC 2018): (B, H, W).

    Random 7 x 7 grids, each cell on with probability one half, enlarged and shifted at random,
    weighted with the probability of the target.

    Args:
        forward_func: a function from images to logits.
        images: (B, C, H, W).
        target: (B,).
        num_masks: number of masks; the paper uses 4,000 to 8,000.
    """
    masks = _rise_masks(num_masks, (images.shape[-2], images.shape[-1])).to(images.device)
    scores = score_masks(forward_func, images, masks, target, score="probability")
    return torch.einsum("bk,khw->bhw", scores, masks) / (0.5 * num_masks)


def _rise_masks(count: int, size: tuple[int, int], cells: int = 7) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    grids = (torch.rand(count, 1, cells, cells, generator=generator) < 0.5).float()
    steps = [-(-side // cells) for side in size]
    enlarged = F.interpolate(grids, [(cells + 1) * step for step in steps], mode="bilinear")[:, 0]
    tops, lefts = (torch.randint(0, step, (count,), generator=generator).tolist() for step in steps)
    return torch.stack(
        [
            mask[top : top + size[0], left : left + size[1]]
            for mask, top, left in zip(enlarged, tops, lefts, strict=True)
        ]
    )
