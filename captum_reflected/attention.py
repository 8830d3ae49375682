"""Records attention maps of any forward call, without touching the model.

A :class:`torch.overrides.TorchFunctionMode` sees every torch function that the forward
calls, in this thread only and only while the mode is entered: no hooks, no patched
modules, no global switch. Fused attention is computed in two visible steps instead
(softmax, then the product with the values), which gives the same output.
"""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from captum_reflected._captum import run_forward
from captum_reflected._inputs import Batch, select_target


class UnsupportedModelError(ValueError):
    """The method cannot explain this forward; says what was found and what is wanted."""


def _without_override_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """Torch's own Python function, minus its question whether a mode wants to replace it.

    Run under the mode, it shows the operations inside instead of the same function again.
    """
    unchecked = types.FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda _: False},
        argdefs=function.__defaults__,
    )
    unchecked.__kwdefaults__ = function.__kwdefaults__
    return unchecked


_multi_head_attention = _without_override_check(F.multi_head_attention_forward)
_grad = _without_override_check(torch.autograd.grad)

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class AttentionMode(TorchFunctionMode):
    """Shows every self-attention map of the forward calls made under it.

    Sees ``scaled_dot_product_attention``, ``multi_head_attention_forward`` (and so
    ``nn.MultiheadAttention``) and softmax followed by a product.

    Args:
        observe: called with each attention map, (B, h, N, N) or (B * h, N, N), rows
            summing to one, in the order of the forward. The model goes on with what it
            returns.
    """

    def __init__(self, observe: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._observe = observe

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Routes the functions that make attention maps; everything else runs as it is."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            with self:
                return _multi_head_attention(*args, **kwargs)
        output = func(*args, **kwargs)
        if func in _SOFTMAX and _over_last_dim(output, *args, **kwargs):
            return self._show(output)
        return output

    def _show(self, attention: Tensor) -> Tensor:
        square = attention.dim() in (3, 4) and attention.shape[-1] == attention.shape[-2]
        return self._observe(attention) if square else attention

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        if enable_gqa:
            groups = query.shape[-3] // key.shape[-3]
            key = key.repeat_interleave(groups, dim=-3)
            value = value.repeat_interleave(groups, dim=-3)
        scale = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
        scores = (query * scale) @ key.transpose(-2, -1)
        if is_causal:
            future = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(future, -math.inf)
        if attn_mask is not None:
            if attn_mask.dtype == torch.bool:
                scores = scores.masked_fill(~attn_mask, -math.inf)
            else:
                scores = scores + attn_mask
        attention = F.dropout(self._show(scores.softmax(dim=-1)), dropout_p)
        return attention.to(value.dtype) @ value


def _over_last_dim(
    output: Tensor, input: Tensor, dim: int | None = None, *_: Any, **__: Any
) -> bool:
    return dim is not None and dim % output.dim() == output.dim() - 1


class _Tap(torch.autograd.Function):
    """Identity whose backward hands over the gradient of the attention map.

    The anchor is a leaf that every tap depends on: its gradient makes autograd run
    through all taps, and through nothing before the first of them.
    """

    @staticmethod
    def forward(ctx: Any, attention: Tensor, anchor: Tensor, use: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(attention)
        ctx.use = use
        return attention.view_as(attention)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (attention,) = ctx.saved_tensors
        ctx.use(attention, gradient)
        upstream = gradient if ctx.needs_input_grad[0] else None
        return upstream, gradient.new_zeros(()), None


def attention_relevances(
    forward_func: Callable[..., Any],
    batch: Batch,
    relevance: Callable[[Tensor, Tensor], Tensor],
    start_layer: int = 0,
) -> list[Tensor]:
    """One forward and one backward from the target; what each layer's attention gives.

    Maps and gradients are used as the backward reaches them and let go of, so that the
    gradients of two layers are never held at once.

    Args:
        forward_func: the model, or any function of the images that calls it.
        batch: the call, inside :func:`captum_reflected._inputs.isolated` with gradients on.
        relevance: from attention map and gradient, both (B, h, N, N), to (B, N, N).
        start_layer: number of first layers to leave out.

    Returns:
        list[Tensor]: (B, N, N) for each layer from ``start_layer`` on, in forward order.

    Raises:
        UnsupportedModelError: no usable self-attention was seen.
        ValueError: ``start_layer`` is not below the number of layers, or the output does
            not depend on the attention.
    """
    shapes: list[tuple[int, ...]] = []
    found: dict[int, Tensor] = {}
    anchor = torch.zeros((), device=batch.images.device, requires_grad=True)

    def tap(attention: Tensor) -> Tensor:
        layer = len(shapes)
        shapes.append(tuple(attention.shape))
        if layer < start_layer:
            return attention

        def use(probabilities: Tensor, gradient: Tensor) -> None:
            # (B * h, N, N) is how torch's own multi-head attention holds its maps.
            size = (batch.size, -1, *probabilities.shape[-2:])
            found[layer] = relevance(
                probabilities.reshape(size).to(batch.compute_dtype),
                gradient.reshape(size).to(batch.compute_dtype),
            )

        tapped: Tensor = _Tap.apply(attention, anchor, use)
        return tapped

    # The mode stays on during the backward: activation checkpointing runs the forward
    # again there, and has to meet the same operations. The clone keeps the caller's
    # images out of reach of a forward that works in place.
    with AttentionMode(tap):
        output = run_forward(forward_func, batch.images.clone(), batch.args)
        seen = list(shapes)
        selected = select_target(output, batch.target, batch.size)
        _check_self_attention(seen, batch.size)
        if start_layer >= len(seen):
            raise ValueError(
                f"start_layer is {start_layer}; wanted: less than the {len(seen)} attention "
                "layers of this model"
            )
        if selected.requires_grad:
            _grad(selected, anchor, torch.ones_like(selected), allow_unused=True)
    if not found:
        raise ValueError(
            "no gradient flows from forward_func's output to its attention maps; wanted: a "
            "differentiable forward, without torch.no_grad(), detach() or argmax inside it"
        )
    if not bool(torch.isfinite(selected).all()):
        raise ValueError(
            f"forward_func returned a target value that is not finite: {selected.tolist()}"
        )
    return [found[layer] for layer in sorted(found)]


def _check_self_attention(shapes: list[tuple[int, ...]], batch_size: int) -> None:
    if not shapes:
        raise UnsupportedModelError(
            "no self-attention was seen in forward_func; wanted: a Vision Transformer that runs "
            "scaled_dot_product_attention, softmax attention or nn.MultiheadAttention in "
            "eager mode. Convolutional networks have none, and torch.jit modules hide theirs"
        )
    tokens = {shape[-1] for shape in shapes}
    whole = all(
        shape[0] == batch_size if len(shape) == 4 else shape[0] % batch_size == 0
        for shape in shapes
    )
    if len(tokens) > 1 or not whole:
        raise UnsupportedModelError(
            f"the attention maps of forward_func have shapes {sorted(set(shapes))} for "
            f"{batch_size} image(s); wanted: in every layer one N x N map of all tokens per "
            f"head and image, shape ({batch_size}, h, N, N). Models that attend inside "
            "windows or that merge tokens (Swin, PVT) cannot be explained by this method"
        )
