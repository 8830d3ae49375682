"""Published methods without a package, re-implemented from their papers for comparison.

They are used by ``tools/study.py`` and are not attributors. Details that the papers leave open
follow the code that their authors published. Random numbers come from generators of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.tokens import TokenLayout, resolve_layout
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.chunks import default_rows_per_forward
from captum_reflected.masking.model_structure import blocks_of
from captum_reflected.masking.precision import Autocast
from captum_reflected.masking.reflection import min_max
from captum_reflected.masking.scoring import score_masks

Forward = Callable[..., Any]

_UNKNOWN_STRUCTURE = (
    "the model's structure is not known; wanted: a VisionTransformer of timm, passed directly"
)


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
    tokens, layout = _block_outputs(forward_func, images)
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
    return _enlarged(saliency, layout, images)


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
    norm = getattr(_blocks(forward_func)[-1], "norm1", None)
    if not isinstance(norm, nn.Module):
        raise UnsupportedModelError(_UNKNOWN_STRUCTURE)
    normed, layout = _outputs(forward_func, images, [norm])
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
        masked = _probabilities(forward_func, image * masks[:, None] + noise, index)
        whole = _probabilities(forward_func, image + noise, index)
        own = _probabilities(forward_func, image[None], index)
        scores = (masked - whole + own) / len(masks)
        share = masks / masks.sum(dim=0).clamp(min=torch.finfo(masks.dtype).tiny)
        maps.append(torch.einsum("k,khw->hw", scores, share))
    return torch.stack(maps)


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
    model = _inner(forward_func)
    if not all(hasattr(model, name) for name in ("norm", "fc_norm", "head")):
        raise UnsupportedModelError(_UNKNOWN_STRUCTURE)
    attention: list[Tensor] = []

    def keep(probabilities: Tensor) -> Tensor:
        attention.append(probabilities)
        return probabilities

    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        with AttentionMode(keep):
            tokens, layout = _block_outputs(forward_func, leaf)
        maps = torch.zeros(len(images), layout.num_image_tokens, device=images.device)
        for block, probabilities in zip(tokens[-2:], attention[-2:], strict=True):
            normed = model.norm(block.to(leaf.dtype).mean(dim=1))
            score = model.head(model.fc_norm(normed)).gather(1, target[:, None]).sum()
            (gradient,) = torch.autograd.grad(score, probabilities, retain_graph=True)
            columns = gradient.float().clamp(min=0).mean(dim=(1, 2))
            maps += columns[:, layout.num_prefix_tokens :]
    return _enlarged(maps.detach(), layout, images)


def _inner(forward_func: Forward) -> Any:
    return forward_func.model if isinstance(forward_func, Autocast) else forward_func


def _block_outputs(forward_func: Forward, images: Tensor) -> tuple[list[Tensor], TokenLayout]:
    """The tokens (B, N, D) after each block, and the token layout."""
    return _outputs(forward_func, images, _blocks(forward_func))


def _blocks(forward_func: Forward) -> list[nn.Module]:
    blocks = blocks_of(_inner(forward_func))
    if not blocks:
        raise UnsupportedModelError(_UNKNOWN_STRUCTURE)
    return blocks


def _outputs(
    forward_func: Forward, images: Tensor, modules: list[nn.Module]
) -> tuple[list[Tensor], TokenLayout]:
    with _recorded(modules) as tokens, torch.set_grad_enabled(images.requires_grad):
        forward_func(images)
    size = (images.shape[-2], images.shape[-1])
    return tokens, resolve_layout(None, _inner(forward_func), tokens[0].shape[1], size)


@contextmanager
def _recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    outputs: list[Tensor] = []
    hooks = [
        module.register_forward_hook(lambda _module, _inputs, output: outputs.append(output))
        for module in modules
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def _probabilities(forward: Forward, rows: Tensor, target: int) -> Tensor:
    """The probability of the target for every row, (R,)."""
    with torch.no_grad():
        logits = [
            forward(part).float() for part in rows.split(default_rows_per_forward(rows.device))
        ]
    return torch.cat(logits).softmax(dim=-1)[:, target]


def _enlarged(saliency: Tensor, layout: TokenLayout, images: Tensor) -> Tensor:
    grids = saliency.reshape(-1, 1, *layout.grid_size)
    return F.interpolate(grids, images.shape[-2:], mode="bilinear").squeeze(1)


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
