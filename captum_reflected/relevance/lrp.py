"""LRP relevance of the attention maps of any forward call, without changing the model.

Autograd propagates relevance instead of gradients: under :class:`RelevanceMode`, every operation
that has a rule (see :mod:`captum_reflected.relevance.lrp_rules`) becomes an autograd node whose
backward maps the relevance of its output to the relevance of its operands. Operations that only
move or select values run unchanged, since their gradient moves relevance correctly. If a tensor is
used twice, autograd adds up its relevance. One backward, starting with 1 at the target output of
every image, then propagates relevance to every attention map.

LRP may be covered by patents in some countries; ``rule="gradient"``, the default of the
attributors, does not use it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from captum_reflected.attention.recording import Recorded, attention_relevances
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch, preserving_state
from captum_reflected.inputs.modules import running_module, tensors_in
from captum_reflected.relevance.dependence import CONSTANT, MOVES, Dependence, operation_of
from captum_reflected.relevance.lrp_rules import (
    Operation,
    contribution_rule,
    positive_rule,
    residual_rule,
)
from captum_reflected.relevance.rollout import gradient_relevance


def lrp_relevances(
    forward_func: Callable[..., Any],
    batch: Batch,
    start_layer: int = 0,
    num_tokens: int | None = None,
) -> Recorded:
    """Relevance of every layer: positive part of LRP relevance times gradient, mean over heads.

    Runs two forwards and two backwards: one for the gradients, one for the LRP relevance.

    Args:
        forward_func: the model, or any function of the images that calls it.
        batch: the call, inside
            :func:`captum_reflected.inputs.batch.preserving_state` with gradients on.
        start_layer: number of first layers to leave out.
        num_tokens: N, if the caller gave a layout.

    Returns:
        Recorded: as from :func:`captum_reflected.attention.recording.attention_relevances`.

    Raises:
        UnsupportedModelError: no usable self-attention was found, or an operation after the
            first attention map has no rule.
        ValueError: as in :func:`captum_reflected.attention.recording.attention_relevances`.
    """
    # Restores the random state, so that both forwards draw the same random numbers.
    with preserving_state(batch, gradients=True, forward_func=forward_func) as call:
        gradients = attention_relevances(
            forward_func, call, _keep_gradient, start_layer, num_tokens
        )
    maps = lrp_attention(forward_func, batch, start_layer, num_tokens)
    layers, pooling = (
        [gradient_relevance(*pair) for pair in zip(relevance_maps, gradient_maps, strict=True)]
        for relevance_maps, gradient_maps in (
            (maps.layers, gradients.layers),
            (maps.pooling, gradients.pooling),
        )
    )
    return replace(gradients, layers=layers, pooling=pooling)


def lrp_attention(
    forward_func: Callable[..., Any],
    batch: Batch,
    start_layer: int = 0,
    num_tokens: int | None = None,
) -> Recorded:
    """LRP relevance of every attention map, (B, h, N, N); arguments as in lrp_relevances."""
    call = batch.with_source()
    try:
        with RelevanceMode(call.images):
            return attention_relevances(forward_func, call, _keep_gradient, start_layer, num_tokens)
    except _AmbiguousImageDimError:
        rows = torch.arange(batch.size, device=batch.images.device)
        halves = [
            lrp_attention(forward_func, batch.select(half), start_layer, num_tokens)
            for half in rows.tensor_split(2)
        ]
        layers, pooling = (
            [torch.cat(parts) for parts in zip(*maps, strict=True)]
            for maps in (
                [half.layers for half in halves],
                [half.pooling for half in halves],
            )
        )
        return replace(halves[0], layers=layers, pooling=pooling)


class _AmbiguousImageDimError(Exception):
    """A sum has as many images as tokens, so the dimension of the images is ambiguous."""


def _keep_gradient(_: Tensor, gradient: Tensor) -> Tensor:
    return gradient


class _Relevance(torch.autograd.Function):
    """An operation whose backward propagates relevance: by a rule, or unchanged if it is None."""

    @staticmethod
    def forward(
        ctx: Any,
        operation: Operation,
        rule: Callable[..., tuple[Tensor, ...]] | None,
        *operands: Tensor,
    ) -> Tensor:
        ctx.rule = rule
        if rule is None:
            ctx.shape = operands[0].shape
        else:
            ctx.save_for_backward(*operands)
        return operation(*operands)

    @staticmethod
    def backward(ctx: Any, relevance: Tensor) -> tuple[Tensor | None, ...]:
        if ctx.rule is None:
            return None, None, relevance.sum_to_size(ctx.shape)
        # Has to be read while the modes are active: checkpointing may run a forward for it.
        operands = ctx.saved_tensors
        # A rule is not part of the model, so the modes must not intercept it. Half types are too
        # imprecise for its quotients.
        with torch._C.DisableTorchFunction(), torch.autocast(relevance.device.type, enabled=False):
            dtype = torch.promote_types(relevance.dtype, torch.float32)
            operands = [x.to(dtype) for x in operands]
            return None, None, *ctx.rule(relevance.to(dtype), *operands)


# Each of the following functions runs an operation so that its backward propagates relevance. They
# return NotImplemented if no rule covers the arguments. Constants are passed without a gradient.


def _depends(value: Any) -> bool:
    """Whether an argument depends on the image."""
    return isinstance(value, Tensor) and value.requires_grad


def _unchanged(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """Operations with one operand that depends on the image; it receives all relevance."""
    if sum(map(_depends, tensors_in((args, kwargs)))) != 1 or not any(map(_depends, args)):
        return NotImplemented
    i = [_depends(arg) for arg in args].index(True)
    return _Relevance.apply(
        lambda x: operation(*args[:i], x, *args[i + 1 :], **kwargs), None, args[i]
    )


def _product(operation: Operation, product: Operation, a: Any, b: Any) -> Any:
    """Runs ``operation(a, b)``; ``product(a, b)`` is the same operation without a bias."""
    if _depends(a) and _depends(b):
        return _Relevance.apply(operation, partial(contribution_rule, product), a, b)
    if _depends(a):
        rule = partial(positive_rule, product, b)
        return _Relevance.apply(lambda x: operation(x, b), rule, a)
    rule = partial(positive_rule, lambda x, weight: product(weight, x), a)
    return _Relevance.apply(lambda x: operation(a, x), rule, b)


def _layer(
    operation: Operation, input: Any, weight: Any, bias: Any = None, *args: Any, **kwargs: Any
) -> Any:
    if _depends(bias):
        return NotImplemented
    return _product(
        lambda x, w: operation(x, w, bias, *args, **kwargs),
        lambda x, w: operation(x, w, None, *args, **kwargs),
        input,
        weight,
    )


def _matmul(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    operands = (*args, *kwargs.values())  # the second may be a keyword, "other" or "mat2"
    return _product(operation, operation, *operands) if len(operands) == 2 else NotImplemented


def _einsum(operation: Operation, equation: Any, *operands: Any) -> Any:
    if not isinstance(equation, str) or len(operands) != 2:
        return NotImplemented
    contract = partial(operation, equation)
    return _product(contract, contract, *operands)


def _multiply(operation: Operation, input: Any, other: Any) -> Any:
    both = _depends(input) and _depends(other)
    return (_matmul if both else _unchanged)(operation, input, other)


def _divide(operation: Operation, input: Any, other: Any, **kwargs: Any) -> Any:
    if not _depends(input):
        return NotImplemented
    other = other.detach() if isinstance(other, Tensor) else other
    return _unchanged(operation, input, other, **kwargs)


def _reduce(operation: Operation, input: Any, *args: Any, **kwargs: Any) -> Any:
    def reduce(x: Tensor) -> Tensor:
        return operation(x, *args, **kwargs)

    return _Relevance.apply(reduce, partial(contribution_rule, reduce), input)


def _add(batch_size: int, operation: Operation, input: Any, other: Any, **kwargs: Any) -> Any:
    if not (_depends(input) and _depends(other)):
        return _unchanged(operation, input, other, **kwargs)
    if kwargs:
        return NotImplemented
    image_dim = _image_dim(torch.broadcast_shapes(input.shape, other.shape), batch_size)
    return _Relevance.apply(operation, partial(residual_rule, image_dim), input, other)


def _image_dim(shape: tuple[int, ...], batch_size: int) -> int | None:
    """The dimension of the images: the first, or the second of three if tokens come first."""
    if batch_size == 1:
        return None
    dims = [dim for dim in ((0, 1) if len(shape) == 3 else (0,)) if shape[dim] == batch_size]
    if len(dims) == 1:
        return dims[0]
    raise _AmbiguousImageDimError


def _named(names: str, rule: Callable[..., Any]) -> dict[str, Callable[..., Any]]:
    return dict.fromkeys(names.split(), rule)


# By the names of torch functions and methods, without the underscores of in-place ones.
_OPERATIONS = (
    _named("linear conv1d conv2d conv3d", _layer)
    | _named("matmul bmm mm", _matmul)
    | _named("einsum", _einsum)
    | _named("mul multiply", _multiply)
    | _named("div divide true_divide", _divide)
    | _named("mean sum norm linalg_norm linalg_vector_norm", _reduce)
    | _named("avg_pool1d avg_pool2d adaptive_avg_pool1d adaptive_avg_pool2d", _reduce)
    | _named("neg sub subtract rsub pow square softmax log_softmax", _unchanged)
    | _named("relu relu6 leaky_relu prelu elu celu selu gelu silu mish softplus", _unchanged)
    | _named("sigmoid logsigmoid tanh hardswish hardsigmoid hardtanh softsign", _unchanged)
    | _named("layer_norm rms_norm group_norm batch_norm instance_norm normalize", _unchanged)
    | _named("dropout dropout1d dropout2d alpha_dropout feature_dropout", _unchanged)
)

# Nodes of the autograd graph that need no rule: they move or select values, or are this package's.
_WITHOUT_RULE = MOVES | {"_Relevance", "_Tap", "AccumulateGrad"}

# What a node of the autograd graph depends on: nothing of the image, the image but no attention
# map, or an attention map, so that relevance reaches it.
_IMAGE, _RELEVANT = 1, 2


class RelevanceMode(TorchFunctionMode):
    """Makes autograd propagate relevance instead of gradients in the backward.

    Used for one forward and backward. Has to be entered before :class:`AttentionMode`, which
    splits fused attention into single operations. Relevance ends at the first attention map, so
    operations before it need no rule. Tensors that do not depend on the images are constants,
    even if they have a gradient.

    Args:
        images: (B, C, H, W), the input of the forward; requires a gradient and is not a leaf.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()
        self._operations = _OPERATIONS | {"add": partial(_add, images.shape[0])}
        self._levels = Dependence([(images, _IMAGE)], self._level_of)
        self._name: str | None = None  # of the running function

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Applies the rule of an operation; an operation without a rule may only move values."""
        kwargs = kwargs or {}
        tensors = list(tensors_in((args, kwargs)))
        if not tensors or not torch.is_grad_enabled():
            return func(*args, **kwargs)
        dependence = self._dependence(tensors)
        if dependence == CONSTANT:
            with torch.no_grad():
                return func(*args, **kwargs)
        name = func.__name__
        operation = self._operations.get(name.strip("_"))
        if dependence == _IMAGE or operation is None:
            output = func(*args, **kwargs)
            self._dependence(tensors_in(output), name)
            return output
        in_place = kwargs.get("inplace", False)
        if name.endswith("_") and not name.startswith("__"):
            in_place, func = True, getattr(Tensor, name[:-1], None) or getattr(F, name[:-1])
        operands = [self._without_gradient(arg) for arg in args]
        if in_place:  # a rule may save its operands, which must not be overwritten
            operands[0] = operands[0].clone()
        options = {
            key: self._without_gradient(arg) for key, arg in kwargs.items() if key != "inplace"
        }
        output = operation(func, *operands, **options)
        if output is NotImplemented:
            raise _unsupported(name)
        return args[0].copy_(output) if in_place else output

    def _without_gradient(self, arg: Any) -> Any:
        """The argument, detached if it is a constant tensor."""
        is_constant = isinstance(arg, Tensor) and self._dependence([arg]) == CONSTANT
        return arg.detach() if is_constant else arg

    def _dependence(self, tensors: Iterable[Tensor], name: str | None = None) -> int:
        """What the tensors depend on; raises if relevance reaches an operation without a rule."""
        self._name = name
        return self._levels.level(tensors)

    def _level_of(self, node: Node, parents: Sequence[Node | None], levels: Sequence[int]) -> int:
        operation = operation_of(node)
        level = _RELEVANT if operation == "_Tap" else max(levels)
        if level == _RELEVANT and operation not in _WITHOUT_RULE:
            raise _unsupported(self._name or operation)
        return level


def _unsupported(operation: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f'rule="lrp" has no rule for the operation "{operation}" as used in {running_module()}; '
        "wanted: linear layers, convolutions, products, sums, means, activations and "
        'normalisations. Use rule="gradient", which supports any operation'
    )
