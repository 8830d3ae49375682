"""Intercepts the attention maps that a forward computes, independent of its module names."""

from __future__ import annotations

import math
import types
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def _without_override_check(function: Callable[..., Any]) -> Callable[..., Any]:
    """A copy of torch's Python function without the check for an active function mode.

    Run under a mode, the copy exposes the operations inside the function to the mode. The
    original would pass itself to the mode as one operation.
    """
    unchecked = types.FunctionType(
        function.__code__,
        {**function.__globals__, "has_torch_function": lambda _: False},
        argdefs=function.__defaults__,
    )
    unchecked.__kwdefaults__ = function.__kwdefaults__
    return unchecked


multi_head_attention = _without_override_check(F.multi_head_attention_forward)
differentiate = _without_override_check(torch.autograd.grad)

_SOFTMAX = (torch.softmax, Tensor.softmax, F.softmax)


class AttentionMode(TorchFunctionMode):
    """Passes every attention map that is computed under this mode to a callback.

    Intercepts ``scaled_dot_product_attention``, ``multi_head_attention_forward`` (and so
    ``nn.MultiheadAttention``) and softmax followed by a product.

    Args:
        observe: called with each attention map, (B, h, Q, M), rows summing to one, in the
            order of the forward (the softmax of a tensor with another number of dimensions is
            passed unchanged). The model continues with its return value.
    """

    def __init__(self, observe: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._observe = observe
        self._heads: int | None = None  # number of heads of the running nn.MultiheadAttention

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Redirects the functions that compute attention maps; all others run unchanged."""
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            return self._attend(*args, **kwargs)
        if func is F.multi_head_attention_forward:
            outer, self._heads = self._heads, _heads_of(*args, **kwargs)
            try:
                with self:
                    return multi_head_attention(*args, **kwargs)
            finally:
                self._heads = outer
        output = func(*args, **kwargs)
        if func in _SOFTMAX and _is_over_last_dim(output, *args, **kwargs):
            return self._pass_to_observer(output)
        return output

    def _pass_to_observer(self, attention: Tensor) -> Tensor:
        if attention.dim() == 3 and self._heads:  # torch uses the shape (images * heads, Q, M)
            return self._observe(attention.unflatten(0, (-1, self._heads))).flatten(0, 1)
        return self._observe(attention) if attention.dim() > 2 else attention

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
        masked = is_causal or attn_mask is not None
        probabilities = _masked_softmax(scores) if masked else scores.softmax(dim=-1)
        attention = F.dropout(self._pass_to_observer(probabilities), dropout_p)
        return attention.to(value.dtype) @ value


def _masked_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; 0 where every key is masked, as in fused attention."""
    all_masked = scores.detach().isneginf().all(dim=-1, keepdim=True)
    return scores.masked_fill(all_masked, 0).softmax(dim=-1).masked_fill(all_masked, 0)


def _heads_of(
    query: Tensor, key: Tensor, value: Tensor, _: int, num_heads: int, *__: Any, **___: Any
) -> int:
    return num_heads


def _is_over_last_dim(
    output: Tensor, input: Tensor, dim: int | None = None, *_: Any, **__: Any
) -> bool:
    return dim is not None and dim % output.dim() == output.dim() - 1
