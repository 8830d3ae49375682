"""ViT-CX."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_reflected.attr.reference_methods._shared import (
    UNKNOWN_STRUCTURE,
    Forward,
    blocks,
    outputs,
    probabilities,
)
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.masking.reflection import min_max


def vit_cx_maps(forward_func: Forward, images: Tensor, target: Tensor) -> Tensor:
    """ViT-CX (Xie et al., IJCAI 2023): (B, H, W).

    The channels that go into the last block's attention, enlarged, are masks; near-identical
    ones (cosine distance up to 0.1, complete linkage) are added up. With Gaussian noise where
    a mask is low, a mask scores p(masked image with noise) - p(whole image with noise) +
    p(whole image); scores are shared among the masks that show a pixel.

    Args:
        forward_func: a Vision Transformer with ``blocks[-1].norm1``.
        images: (B, C, H, W).
        target: (B,).
    """
    norm = getattr(blocks(forward_func)[-1], "norm1", None)
    if not isinstance(norm, nn.Module):
        raise UnsupportedModelError(UNKNOWN_STRUCTURE)
    normed, layout = outputs(forward_func, images, [norm])
    features = normed[0][:, layout.num_prefix_tokens :].mT.float()
    size = (images.shape[-2], images.shape[-1])
    maps = []
    for image, channels, index in zip(images, features, target.tolist(), strict=True):
        grids = channels.reshape(1, -1, *layout.grid_size)
        enlarged = F.interpolate(grids, size, mode="bilinear", antialias=True)[0]
        masks = _merged(min_max(enlarged.flatten(1), dim=1)).unflatten(1, size)
        noise = 0.1 * torch.randn(
            (len(masks), *image.shape), generator=torch.Generator().manual_seed(0)
        ).to(image)
        noise = noise * (1 - masks[:, None])
        masked = probabilities(forward_func, image * masks[:, None] + noise, index)
        whole = probabilities(forward_func, image + noise, index)
        own = probabilities(forward_func, image[None], index)
        scores = (masked - whole + own) / len(masks)
        share = masks / masks.sum(dim=0).clamp(min=torch.finfo(masks.dtype).tiny)
        maps.append(torch.einsum("k,khw->hw", scores, share))
    return torch.stack(maps)


def _merged(masks: Tensor) -> Tensor:
    """Adds up near-identical masks out of (K, P), and normalises each sum to [0, 1]."""
    from scipy.cluster.hierarchy import fcluster, linkage

    directions = F.normalize(masks, dim=1)
    distance = (1 - directions @ directions.T).clamp(min=0).cpu().double()
    rows, columns = torch.triu_indices(len(masks), len(masks), offset=1)
    tree = linkage(distance[rows, columns].numpy(), method="complete")
    labels = torch.from_numpy(fcluster(tree, 0.1, criterion="distance")).long() - 1
    sums = masks.new_zeros(int(labels.max()) + 1, masks.shape[1])
    return min_max(sums.index_add_(0, labels.to(masks.device), masks), dim=1)
