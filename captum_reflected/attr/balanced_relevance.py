"""Balanced relevance of the residual stream (the rules of LibraGrad, CVPR 2025)."""

from __future__ import annotations

import torch
from captum.attr import GradientAttribution
from torch import Tensor

from captum_reflected.attention.layout import find_positions
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import TokenAttribution, warn_if_zero
from captum_reflected.inputs.batch import Batch
from captum_reflected.relevance.residual_stream import stream_relevances


class BalancedRelevance(TokenAttribution, GradientAttribution):
    r"""Activation times balanced gradient of the image tokens, averaged over the blocks.

    One forward and one backward. With :math:`z_l` the tokens that enter block l, and
    :math:`\nabla z_l` the balanced gradient of the target logit with respect to them
    (:func:`balanced`), the map is
    :math:`\frac{1}{L} \sum_l \sum_c z_{l,c} \, \nabla z_{l,c}`, c being the channels.

    Under balanced gradients, every block is linear in its input for the given image. In each block,
    the sum over all tokens, with the share of the biases from there on, is therefore the logit
    itself. Positive values speak for the target, negative values against it.

    The inputs of the blocks are found in the autograd graph of the forward, without knowing the
    model: they are the tensors that the whole gradient passes through before each attention. The
    rules are those of LibraGrad; the mean over the blocks is this library's, chosen in the study
    of the documentation.

    References:
        Mehri, Soleymani Baghshah & Pilehvar, *LibraGrad: Balancing Gradient Flow for Universally
        Better Vision Transformer Attributions*, CVPR 2025.

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributor = BalancedRelevance(model)
        >>> attributions = attributor.attribute(images, target=281)
    """

    def _saliency(self, call: Batch) -> tuple[Tensor, TokenLayout]:
        given = self.token_layout
        num_tokens = None if given is None else given.num_tokens
        found = stream_relevances(self.forward_func, call, num_tokens)
        layout = find_positions(self.forward_func, call, given, found.map_index)
        saliency = torch.stack(found.layers).mean(dim=0)[:, layout.num_prefix_tokens :]
        warn_if_zero(
            (saliency == 0).all(dim=-1), "the target has no balanced gradient at any block"
        )
        return saliency, layout
