"""Transformer Input Sampling."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_reflected.attr.reference_methods._shared import Forward, block_outputs, enlarged
from captum_reflected.masking.scoring import score_masks


def input_sampling_maps(
    forward_func: Forward, images: Tensor, target: Tensor, *, num_masks: int = 1024
) -> Tensor:
    """Transformer Input Sampling (Englebert et al., ICCV workshop 2023): (B, H, W).

    The activations of all channels of all blocks are clustered over the tokens by k-means;
    each centre gives a mask that keeps the half of the tokens with its highest values. The score
    of a token is the mean probability of the target over the masks that keep it.

    Args:
        forward_func: a VisionTransformer whose tokens can be left out.
        images: (B, C, H, W).
        target: (B,).
        num_masks: number of centres, each of which costs a forward with half the tokens.
    """
    tokens, layout = block_outputs(forward_func, images)
    # (B, channels of all blocks, J)
    activations = torch.cat(tokens, dim=-1)[:, layout.num_prefix_tokens :].mT
    kept = layout.num_image_tokens // 2
    centres = torch.stack([_k_means(channels.float(), num_masks) for channels in activations])
    masks = torch.zeros_like(centres).scatter_(2, centres.topk(kept, dim=2).indices, 1.0)
    scores = score_masks(
        forward_func,
        images,
        masks.unflatten(2, layout.grid_size),
        target,
        score="probability",
        drop_hidden=True,
    )
    saliency = torch.einsum("bk,bkj->bj", scores, masks) / masks.sum(dim=1).clamp(min=1)
    return enlarged(saliency, layout, images)


def _k_means(points: Tensor, count: int, iterations: int = 100) -> Tensor:
    """Lloyd's algorithm: centres (count, D) of points (n, D), initialised with random points."""
    count = min(count, len(points))
    chosen = torch.randperm(len(points), generator=torch.Generator().manual_seed(0))[:count]
    centres = points[chosen.to(points.device)]
    for _ in range(iterations):
        nearest = torch.cdist(points, centres).argmin(dim=1)
        sums = torch.zeros_like(centres).index_add_(0, nearest, points)
        sizes = torch.bincount(nearest, minlength=count)[:, None]
        moved = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
        shift = (moved - centres).square().sum()
        centres = moved
        if shift <= 1e-4:
            break
    return centres
