"""LibraGrad's FullGrad+."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from captum_reflected.attention.tokens import TokenLayout, resolve_layout
from captum_reflected.attr.reference_methods._shared import Forward, blocks, enlarged, inner
from captum_reflected.relevance.balanced import balanced


def libra_full_grad_maps(forward_func: Forward, images: Tensor, target: Tensor) -> Tensor:
    """FullGrad+ under LibraGrad's rules, the form that its paper recommends: (B, H, W).

    The sum of value times balanced gradient over the inputs of all blocks and over all biases that
    are added to tokens (Mehri, Soleymani Baghshah & Pilehvar, CVPR 2025, section 2.1).

    Args:
        forward_func: a Vision Transformer whose blocks take tokens (B, N, D).
        images: (B, C, H, W).
        target: (B,).
    """
    found = blocks(forward_func)
    model: nn.Module = inner(forward_func)
    inputs: list[Tensor] = []
    biased: list[tuple[Tensor, Tensor]] = []  # the bias, and the output that it was added to

    def keep_input(_module: nn.Module, args: tuple[Any, ...]) -> None:
        inputs.append(args[0])

    def keep_output(module: nn.Module, _args: tuple[Any, ...], output: Any) -> None:
        bias = getattr(module, "bias", None)
        if isinstance(bias, Tensor) and isinstance(output, Tensor) and output.dim() > 2:
            biased.append((bias.detach(), output))

    with ExitStack() as hooks, torch.enable_grad():
        for block in found:
            hooks.callback(block.register_forward_pre_hook(keep_input).remove)
        for module in model.modules():
            if not list(module.children()):
                hooks.callback(module.register_forward_hook(keep_output).remove)
        logits = balanced(forward_func)(images.detach())
        score = logits.gather(1, target[:, None]).sum()
        outputs = [output for _, output in biased]
        gradients = torch.autograd.grad(score, inputs + outputs, allow_unused=True)
    size = (images.shape[-2], images.shape[-1])
    layout = resolve_layout(None, model, inputs[0].shape[1], size)
    total = torch.zeros(len(images), layout.num_tokens, device=images.device)
    for tokens, gradient in zip(inputs, gradients, strict=False):
        total += (tokens * gradient).detach().float().sum(dim=-1)
    for (bias, _), gradient in zip(biased, gradients[len(inputs) :], strict=True):
        if gradient is not None:
            _add_share(total, bias, gradient, layout)
    return enlarged(total[:, layout.num_prefix_tokens :], layout, images)


def _add_share(total: Tensor, bias: Tensor, gradient: Tensor, layout: TokenLayout) -> None:
    """Adds a bias times its gradient at every token, (B, N, D), or patch, (B, D, gh, gw)."""
    if gradient.dim() == 4:
        gradient = gradient.flatten(2).mT
    share = (gradient * bias).float().sum(dim=-1)
    if share.shape[1] == layout.num_tokens:
        total += share
    elif share.shape[1] == layout.num_image_tokens:
        total[:, layout.num_prefix_tokens :] += share
