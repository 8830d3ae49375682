"""AttnLRP (Achtibat et al., ICML 2024)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_reflected.attention.mode import AttentionMode
from captum_reflected.inputs.outputs import logits_of
from captum_reflected.relevance.balanced_mode import BalancedMode


class AttnLRPMode(BalancedMode):
    """Gives the operations of a forward the backward of AttnLRP's rules.

    They differ from those of balanced gradients in attention: the softmax keeps its ordinary
    gradient (proposition 3.1), and the product of attention and values is a product of two tensors,
    each of which gets half of the relevance (proposition 3.3).
    """

    def _rule(self, name: str) -> Callable[..., Any] | None:
        return None if name in ("softmax", "log_softmax") else super()._rule(name)


def attn_lrp_maps(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    """Input times gradient under AttnLRP's rules, summed over channels: (B, H, W).

    The epsilon rule is used in all linear layers (equation 8, epsilon going to 0), which makes
    relevance equal to input times gradient. The paper's gamma rule for linear layers of Vision
    Transformers is left out.

    Args:
        forward_func: a function from images to logits.
        images: (B, C, H, W).
        target: (B,).
    """
    with torch.enable_grad():
        leaf = images.detach().requires_grad_()
        source = leaf.view_as(leaf)
        # Splits fused attention into the operations that have a rule.
        with AttnLRPMode([source]), AttentionMode(lambda attention: attention):
            logits = logits_of(forward_func(source))
        score = logits.gather(1, target[:, None]).sum()
        (gradient,) = torch.autograd.grad(score, leaf)
    return (images * gradient).sum(dim=1)
