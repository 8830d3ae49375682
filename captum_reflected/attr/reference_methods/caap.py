"""Causal Attribution via Activation Patching."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_reflected.attr.reference_methods._shared import Forward, blocks, enlarged, outputs
from captum_reflected.inputs.chunks import default_rows_per_forward, in_chunks
from captum_reflected.inputs.outputs import logits_of
from captum_reflected.inputs.random_state import random_state_kept


def activation_patching_maps(forward_func: Forward, images: Tensor, target: Tensor) -> Tensor:
    """CAAP (Izadi et al., *Causal Attribution via Activation Patching*, 2026): (B, H, W).

    The model runs on a neutral image. After each block of an intermediate range, the token of one
    patch is replaced by the token that the explained image has there. The target's score is the
    attribution of the patch.

    The settings are a reading of the paper's summary, as no code was found: the neutral image is
    zero, the range is the middle third of the blocks, the score is the logit, and each patch is
    inserted alone.

    Args:
        forward_func: a Vision Transformer whose blocks return tokens (B, N, D).
        images: (B, C, H, W).
        target: (B,).
    """
    found = blocks(forward_func)
    first = len(found) // 3
    middle = found[first : max(2 * len(found) // 3, first + 1)]
    with random_state_kept(forward_func), torch.no_grad():
        source, layout = outputs(forward_func, images.detach(), middle)
        count = layout.num_image_tokens
        neutral = torch.zeros_like(images[:1])

        def score(start: int, stop: int) -> Tensor:
            row = torch.arange(start, stop, device=images.device)
            image, place = row // count, layout.num_prefix_tokens + row % count
            with _inserted(middle, [tokens[image, place] for tokens in source], place):
                logits: Tensor = logits_of(forward_func(neutral.expand(stop - start, -1, -1, -1)))
            return logits.float().gather(1, target[image, None])[:, 0]

        scores = in_chunks(
            score,
            len(images) * count,
            default_rows_per_forward(images.device),
            description="patches",
            show_progress=False,
        )
    return enlarged(scores, layout, images)


@contextmanager
def _inserted(modules: list[nn.Module], values: list[Tensor], place: Tensor) -> Iterator[None]:
    """Replaces one token of every row after each module: values (R, D) at places (R,)."""

    def hook_for(value: Tensor) -> Any:
        def insert(_module: nn.Module, _inputs: Any, output: Tensor) -> Tensor:
            row = torch.arange(len(place), device=output.device)
            return output.index_put((row, place), value.to(output.dtype))

        return insert

    hooks = [
        module.register_forward_hook(hook_for(value))
        for module, value in zip(modules, values, strict=True)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
