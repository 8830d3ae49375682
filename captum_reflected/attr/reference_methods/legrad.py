"""LeGrad."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attr.reference_methods._shared import (
    UNKNOWN_STRUCTURE,
    Forward,
    block_outputs,
    enlarged,
    inner,
)
from captum_reflected.errors import UnsupportedModelError


def legrad_maps(forward_func: Forward, images: Tensor, target: Tensor) -> Tensor:
    """LeGrad (Bousselham et al., ICCV 2025), for a classifier in place of CLIP: (B, H, W).

    For each of the last two blocks, the mean of its tokens goes through the model's norm and head.
    The positive gradient of the target with respect to that block's attention, averaged over heads
    and queries, is summed over the blocks.

    Args:
        forward_func: a timm VisionTransformer.
        images: (B, C, H, W).
        target: (B,).
    """
    model = inner(forward_func)
    if not all(hasattr(model, name) for name in ("norm", "fc_norm", "head")):
        raise UnsupportedModelError(UNKNOWN_STRUCTURE)
    attention: list[Tensor] = []

    def keep(probabilities: Tensor) -> Tensor:
        attention.append(probabilities)
        return probabilities

    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        with AttentionMode(keep):
            tokens, layout = block_outputs(forward_func, leaf)
        maps = torch.zeros(len(images), layout.num_image_tokens, device=images.device)
        for block, probabilities in zip(tokens[-2:], attention[-2:], strict=True):
            normed = model.norm(block.to(leaf.dtype).mean(dim=1))
            score = model.head(model.fc_norm(normed)).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, probabilities, retain_graph=True)
            columns = gradient.float().clamp(min=0).mean(dim=(1, 2))
            maps += columns[:, layout.num_prefix_tokens :]
    return enlarged(maps.detach(), layout, images)
