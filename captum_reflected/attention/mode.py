"""Sees the attention maps that a forward computes, whatever its modules are called."""

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
    """Shows every attention map of the forward calls made under it.

    Sees ``scaled_dot_product_attention``, ``multi_head_attention_forward`` (and so
    ``nn.MultiheadAttention``) and softmax followed by a product.

    Args:
        observe: called with each attention map, (B, h, Q, M), rows summing to one, in the
            order of the forward (softmax of a tensor of other dimensions is shown as it
            is). The model goes on with what it returns.
    """

    def __init__(self, observe: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._observe = observe
        self._heads: int | None = None  # of the nn.MultiheadAttention that runs

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
            outer, self._heads = self._heads, _heads_of(*args, **kwargs)
            try:
                with self:
                    return _multi_head_attention(*args, **kwargs)
            finally:
                self._heads = outer
        output = func(*args, **kwargs)
        if func in _SOFTMAX and _over_last_dim(output, *args, **kwargs):
            return self._show(output)
        return output

    def _show(self, attention: Tensor) -> Tensor:
        if attention.dim() == 3 and self._heads:  # torch holds (images * heads, Q, M)
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
        attention = F.dropout(self._show(probabilities), dropout_p)
        return attention.to(value.dtype) @ value


def _masked_softmax(scores: Tensor) -> Tensor:
    """Softmax over the last dimension; 0, as fused attention has it, where every key is masked."""
    nowhere = scores.detach().isneginf().all(dim=-1, keepdim=True)
    return scores.masked_fill(nowhere, 0).softmax(dim=-1).masked_fill(nowhere, 0)


def _heads_of(
    query: Tensor, key: Tensor, value: Tensor, _: int, num_heads: int, *__: Any, **___: Any
) -> int:
    return num_heads


def _over_last_dim(
    output: Tensor, input: Tensor, dim: int | None = None, *_: Any, **__: Any
) -> bool:
    return dim is not None and dim % output.dim() == output.dim() - 1
