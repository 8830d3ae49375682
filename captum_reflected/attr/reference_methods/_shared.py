"""What several reference methods use: outputs of blocks, probabilities, and enlarged maps."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_reflected.attention.tokens import TokenLayout, resolve_layout
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.chunks import default_rows_per_forward
from captum_reflected.inputs.outputs import logits_of
from captum_reflected.masking.model_structure import blocks_of
from captum_reflected.masking.precision import Autocast

Forward = Callable[..., Any]

UNKNOWN_STRUCTURE = (
    "the model's structure is not known; wanted: a VisionTransformer of timm, passed directly"
)


def inner(forward_func: Forward) -> Any:
    """The model itself, without this package's wrapper."""
    return forward_func.model if isinstance(forward_func, Autocast) else forward_func


def block_outputs(forward_func: Forward, images: Tensor) -> tuple[list[Tensor], TokenLayout]:
    """The tokens (B, N, D) after each block, and the token layout."""
    return outputs(forward_func, images, blocks(forward_func))


def blocks(forward_func: Forward) -> list[nn.Module]:
    """The blocks in forward order, at least one."""
    found = blocks_of(inner(forward_func))
    if not found:
        raise UnsupportedModelError(UNKNOWN_STRUCTURE)
    return found


def outputs(
    forward_func: Forward, images: Tensor, modules: list[nn.Module]
) -> tuple[list[Tensor], TokenLayout]:
    """The outputs (B, N, D) of modules that each run once, and the token layout."""
    with recorded(modules) as tokens, torch.set_grad_enabled(images.requires_grad):
        forward_func(images)
    size = (images.shape[-2], images.shape[-1])
    return tokens, resolve_layout(None, inner(forward_func), tokens[0].shape[1], size)


@contextmanager
def recorded(modules: list[nn.Module]) -> Iterator[list[Tensor]]:
    """A list to which the modules append their outputs during the block."""
    outputs: list[Tensor] = []

    def keep(_module: nn.Module, _inputs: Any, output: Any) -> None:
        if not isinstance(output, Tensor):  # a tuple, in old versions of transformers
            raise UnsupportedModelError(UNKNOWN_STRUCTURE)
        outputs.append(output)

    hooks = [module.register_forward_hook(keep) for module in modules]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()


def probabilities(forward: Forward, rows: Tensor, target: int) -> Tensor:
    """The probability of the target for every row, (R,)."""
    with torch.no_grad():
        logits = [
            logits_of(forward(part)).float()
            for part in rows.split(default_rows_per_forward(rows.device))
        ]
    return torch.cat(logits).softmax(dim=-1)[:, target]


def enlarged(saliency: Tensor, layout: TokenLayout, images: Tensor) -> Tensor:
    """Values (B, J) of the image tokens as maps (B, H, W)."""
    grids = saliency.reshape(-1, 1, *layout.grid_size)
    return F.interpolate(grids, images.shape[-2:], mode="bilinear").squeeze(1)
