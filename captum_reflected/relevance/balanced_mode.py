"""Balanced gradients of any forward call, without changing the model.

A :class:`torch.overrides.TorchFunctionMode` sees every torch function that the forward calls, in
this thread only, and runs those that have a rule (:mod:`captum_reflected.relevance.balanced_rules`)
with a backward of their own. What depends on the inputs is read from the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from captum_reflected.attention.mode import multi_head_attention
from captum_reflected.inputs.modules import running_module, tensors_in
from captum_reflected.relevance.balanced_rules import (
    Frozen,
    Half,
    Normalised,
    Operation,
    Proportional,
    Substituted,
    group_normalised,
    per_channel,
    rms_normalised,
)
from captum_reflected.relevance.dependence import CONSTANT, MOVES, Dependence, operation_of

# What a node of the autograd graph depends on: nothing of the inputs; the inputs, but it is treated
# as a constant; the same, but an attention map in it needs a gradient; or the inputs, so that the
# gradient passes through it.
FROZEN, _TAPPED, LIVE = 1, 2, 3

# Operations whose ordinary gradient needs no rule, by the names of autograd nodes.
_LINEAR = MOVES | frozenset(
    """
    AccumulateGrad Add Sub Rsub Neg Mean Sum Cumsum Nansum Real Imag Complex ViewAsReal
    ViewAsComplex FftR2C FftC2R FftC2C NativeDropout FeatureDropout NativeBatchNorm CudnnBatchNorm
    MiopenBatchNorm AvgPool1D AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D
    Amin MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D Maximum Minimum
    UpsampleNearest1D UpsampleNearest2D UpsampleNearestExact1D UpsampleNearestExact2D
    UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleBilinear2DAa UpsampleBicubic2DAa
    ReflectionPad1D ReflectionPad2D ReplicationPad1D ReplicationPad2D Col2Im Im2Col
    PixelShuffle PixelUnshuffle Trace Pad Proportional Normalised Substituted Half _Tap
    """.split()  # noqa: SIM905
)
# Products: linear if one factor is a constant.
_PRODUCTS = frozenset(
    """
    Mul Div Mm Addmm Bmm Baddbmm Addbmm Addmv Mv Dot Linear Convolution ConvolutionOverrideable
    ThnnConv2D SlowConv2D MkldnnConvolution Addcmul GridSampler2D ScaledDotProductAttention
    ScaledDotProductFlashAttention ScaledDotProductFlashAttentionForCpu
    ScaledDotProductEfficientAttention ScaledDotProductCudnnAttention
    """.split()  # noqa: SIM905
)
_HALF, _GATE, _FROZEN_NODE = "Half", "Proportional", "Frozen"
# Nodes that a gate may pass through on its way to the product.
_ELEMENTWISE = MOVES | frozenset(["Add", "Sub", "Rsub", "Neg", "Mul", "Div"])


class BalancedMode(TorchFunctionMode):
    """Gives the operations of a forward the backward of balanced gradients.

    Has to be entered before :class:`captum_reflected.attention.mode.AttentionMode`, which splits
    fused attention into single operations, and to stay active during the backward if the model uses
    activation checkpointing.

    Args:
        sources: the inputs of the forward; each requires a gradient and is not a leaf.
        leaves: whether other leaf tensors that require a gradient are inputs, too, except
            parameters. Captum's methods for layers put such tensors in the place of activations.
    """

    def __init__(self, sources: Iterable[Tensor], *, leaves: bool = False) -> None:
        super().__init__()

        def leaf_level(leaf: Tensor) -> int:
            return LIVE if leaves and not isinstance(leaf, nn.Parameter) else CONSTANT

        self._dependence = Dependence(
            [(source, LIVE) for source in sources], self._level_of, leaf_level
        )
        self._unbalanced: dict[Node, str] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Applies the rule of an operation that depends on the inputs."""
        kwargs = kwargs or {}
        if not torch.is_grad_enabled():
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if self._dependence.level(tensors) < LIVE:
            return func(*args, **kwargs)
        name = func.__name__
        is_in_place = (
            (name.endswith("_") and not name.endswith("__"))
            or name in _IN_PLACE
            or bool(kwargs.get("inplace"))
        )
        name = _IN_PLACE.get(name, name.strip("_"))
        rule = self._rule(name)
        output = NotImplemented
        if rule is not None:
            operation, operands = func, list(args)
            if is_in_place:  # on a copy, which is then written to the tensor
                operation = getattr(Tensor, name, None) or getattr(F, name)
                operands[0] = operands[0].clone()
            options = {key: arg for key, arg in kwargs.items() if key != "inplace"}
            output = rule(operation, *operands, **options)
        if output is NotImplemented:
            output = func(*args, **kwargs)
        elif is_in_place:
            output = args[0].copy_(output)
        self._dependence.level(tensors_in(output))
        self.ran(output)
        return output

    def ran(self, output: Any) -> None:
        """Called with the output of every operation that the inputs' gradient passes through."""

    def _rule(self, name: str) -> Callable[..., Any] | None:
        """The function that runs an operation of this name by its rule."""
        if name in _RULES:
            return _RULES[name]
        method = _METHODS.get(name)
        return None if method is None else partial(method, self)

    # -- rules that need to know what an operand depends on; the others are below ----------

    def _multiply(self, operation: Operation, a: Any, b: Any, **kwargs: Any) -> Any:
        if self._is_live(a) and self._is_live(b) and self._is_gate(a) != self._is_gate(b):
            a, b = (Frozen.apply(a), b) if self._is_gate(a) else (a, Frozen.apply(b))
        return operation(*self._shared((a, b)), **kwargs)

    def _matmul(self, operation: Operation, *args: Any, **kwargs: Any) -> Any:
        operands = (*args, *kwargs.values())  # the second may be a keyword, "other" or "mat2"
        return operation(*self._shared(operands)) if len(operands) == 2 else NotImplemented

    def _baddbmm(self, operation: Operation, input: Any, *factors: Any, **kwargs: Any) -> Any:
        return operation(input, *self._shared(factors), **kwargs)

    def _einsum(self, operation: Operation, equation: Any, *factors: Any) -> Any:
        if not isinstance(equation, str) or sum(map(self._is_live, factors)) > 2:
            return NotImplemented
        return operation(equation, *self._shared(factors))

    def _shared(self, factors: Sequence[Any]) -> Sequence[Any]:
        """The factors of a product; if two are live, each gets half of the gradient."""
        levels = [self._level(factor) for factor in factors]
        is_shared = levels.count(LIVE) > 1
        return [
            # Not even parameters behind a frozen factor may get a gradient.
            Frozen.apply(factor)
            if level == FROZEN
            else Half.apply(factor)
            if level == LIVE and is_shared
            else factor
            for factor, level in zip(factors, levels, strict=True)
        ]

    def _divide(self, operation: Operation, a: Any, b: Any, **kwargs: Any) -> Any:
        if not self._is_live(b):
            return operation(a, b, **kwargs)
        if not self._is_live(a):
            return _frozen(operation, a, b, **kwargs)
        return operation(a, Frozen.apply(b), **kwargs)

    def _attention(
        self,
        operation: Operation,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not self._is_live(value):
            return _frozen(operation, query, key, value, *args, **kwargs)
        if args:
            args = (_constant(args[0]), *args[1:])
        kwargs = {name: _constant(arg) for name, arg in kwargs.items()}
        return operation(query.detach(), key.detach(), value, *args, **kwargs)

    def _multi_head_attention(self, operation: Operation, *args: Any, **kwargs: Any) -> Any:
        with self:
            return multi_head_attention(*args, **kwargs)

    # -- what nodes depend on -----------------------------------------------------------

    def _level(self, operand: Any) -> int:
        return self._dependence.level([operand] if isinstance(operand, Tensor) else [])

    def _is_live(self, operand: Any) -> bool:
        return self._level(operand) == LIVE

    def _is_gate(self, operand: Tensor) -> bool:
        """Whether a factor is the result of an activation, up to elementwise operations."""
        node = operand.grad_fn
        while node is not None:
            name = operation_of(node)
            if name == _GATE:
                return True
            parents = [
                parent
                for parent, _ in node.next_functions
                if self._dependence.levels.get(parent) == LIVE
            ]
            if name not in _ELEMENTWISE or len(parents) != 1:
                return False
            (node,) = parents
        return False

    def _is_half(self, node: Node) -> bool:
        """Whether a factor of a product is halved; products of matrices reshape their factors."""
        while operation_of(node) in MOVES and len(node.next_functions) == 1:
            parent = node.next_functions[0][0]
            if parent is None:
                return False
            node = parent
        return operation_of(node) == _HALF

    def _level_of(self, node: Node, parents: Sequence[Node | None], levels: Sequence[int]) -> int:
        name = operation_of(node)
        if name == _FROZEN_NODE:
            return FROZEN
        if name == "_Tap" or max(levels) < LIVE:
            return max(_TAPPED if name == "_Tap" else FROZEN, *levels)
        live = [
            parent
            for parent, level in zip(parents, levels, strict=True)
            if parent is not None and level == LIVE
        ]
        is_linear = name in _LINEAR or (
            name in _PRODUCTS and (len(live) == 1 or all(map(self._is_half, live)))
        )
        if not is_linear:
            module = running_module().removeprefix("forward_func.")
            self._unbalanced[node] = f"{name} in {module}"
        return LIVE

    def is_constant(self, outputs: Iterable[Tensor]) -> bool:
        """Whether no gradient passes from the outputs to the inputs."""
        return self._dependence.level(outputs) < LIVE

    def unbalanced(self, outputs: Iterable[Tensor]) -> list[str]:
        """The operations without a rule that the gradient of the outputs passes through."""
        self._dependence.level(outputs := list(outputs))
        pending: list[Node | None] = [output.grad_fn for output in outputs]
        visited: set[Node | None] = set()
        while pending:
            node = pending.pop()
            if node not in visited and self._dependence.levels.get(node) == LIVE:
                assert node is not None  # None is a constant
                visited.add(node)
                pending += [parent for parent, _ in node.next_functions]
        return list(
            dict.fromkeys(name for node, name in self._unbalanced.items() if node in visited)
        )


# Rules that depend on the operation alone. Each runs it, and returns NotImplemented if it does not
# cover the arguments.


def _frozen(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    output = operation(*args, **kwargs)
    if isinstance(output, Tensor):
        return Frozen.apply(output)
    return (
        type(output)(Frozen.apply(part) for part in output)
        if isinstance(output, tuple)
        else NotImplemented
    )


def _constant(mask: Any) -> Any:
    # Which kernel runs, and so the last bit, depends on whether the mask requires a gradient.
    return Frozen.apply(mask) if isinstance(mask, Tensor) and mask.requires_grad else mask


def _activation(operation: Operation, input: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, Tensor) or any(
        arg is True for arg in args
    ):  # inplace, given by its position
        return NotImplemented
    return Proportional.apply(input, lambda y: operation(y, *args, **kwargs))


def _power(operation: Operation, input: Any, exponent: Any) -> Any:
    if not isinstance(input, Tensor) or isinstance(exponent, Tensor):
        return NotImplemented
    return (_activation if exponent >= 1 else _frozen)(operation, input, exponent)


def _clamp(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    with torch.no_grad():
        at_zero = operation(input.new_zeros(()), *args, **kwargs)
    return NotImplemented if at_zero.any() else _activation(operation, input, *args, **kwargs)


def _glu(operation: Operation, input: Tensor, dim: int = -1) -> Any:
    value, gate = input.chunk(2, dim)
    return _substituted(value * gate.detach().sigmoid(), lambda: operation(input, dim))


def _variance_and_mean(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    variance, mean = operation(input, *args, **kwargs)
    dim, keepdim = kwargs.get("dim", args[0] if args else None), mean.dim() == input.dim()
    dim = None if isinstance(dim, bool) else dim  # it is the first form's "unbiased"
    return Frozen.apply(variance), _substituted(input.mean(dim, keepdim), mean.detach)


def _layer_norm(
    operation: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    def run(x: Tensor) -> Any:
        return operation(x, normalized_shape, weight, bias, eps, *args)

    dims = tuple(range(-len(normalized_shape), 0))
    return Normalised.apply(input, weight, bias, run, dims, eps)


def _substituted(surrogate: Tensor, run: Callable[[], Tensor]) -> Any:
    with torch.no_grad():
        value = run()
    return Substituted.apply(surrogate.to(value.dtype), value)


def _rms_norm(
    operation: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    eps: float | None = None,
) -> Any:
    dims = tuple(range(-len(normalized_shape), 0))
    used = torch.finfo(input.dtype).eps if eps is None else eps
    surrogate = rms_normalised(input, dims, used)
    surrogate = surrogate if weight is None else surrogate * weight
    return _substituted(surrogate, lambda: operation(input, normalized_shape, weight, eps))


def _group_norm(
    operation: Operation,
    input: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
) -> Any:
    surrogate = group_normalised(input, num_groups, eps)
    if weight is not None:
        surrogate = surrogate * per_channel(weight, input)
    if bias is not None:
        surrogate = surrogate + per_channel(bias, input)
    return _substituted(surrogate, lambda: operation(input, num_groups, weight, bias, eps, *args))


def _normalize(
    operation: Operation,
    input: Tensor,
    p: float = 2.0,
    dim: int = 1,
    eps: float = 1e-12,
    **kwargs: Any,
) -> Any:
    if kwargs.get("out") is not None:
        return NotImplemented
    norm = input.detach().norm(p, dim, keepdim=True).clamp_min(eps)
    return _substituted(input / norm, lambda: operation(input, p, dim, eps))


def _named(names: str, rule: Any) -> dict[str, Any]:
    return dict.fromkeys(names.split(), rule)


# By the names of torch functions and methods, without the underscores of in-place ones.
_RULES: dict[str, Callable[..., Any]] = (
    _named("relu relu6 leaky_relu prelu elu celu selu gelu silu mish tanh erf", _activation)
    | _named("hardtanh hardswish softsign tanhshrink softshrink hardshrink abs", _activation)
    | _named("square", _activation)
    | _named("pow float_power", _power)
    | _named("clamp clip clamp_min clamp_max", _clamp)
    | _named("softmax softmin sigmoid hardsigmoid exp rpow sqrt rsqrt reciprocal rdiv", _frozen)
    | _named("var_mean std_mean", _variance_and_mean)
    | _named("glu", _glu)
    | _named("var std norm linalg_norm linalg_vector_norm vector_norm", _frozen)
    | _named("layer_norm", _layer_norm)
    | _named("rms_norm", _rms_norm)
    | _named("group_norm", _group_norm)
    | _named("normalize", _normalize)
)
_METHODS: dict[str, Callable[..., Any]] = (
    _named("mul multiply rmul", BalancedMode._multiply)
    | _named("matmul bmm mm rmatmul", BalancedMode._matmul)
    | _named("baddbmm", BalancedMode._baddbmm)
    | _named("einsum", BalancedMode._einsum)
    | _named("div divide true_divide truediv", BalancedMode._divide)
    | _named("scaled_dot_product_attention", BalancedMode._attention)
    | _named("multi_head_attention_forward", BalancedMode._multi_head_attention)
)
_IN_PLACE = {"__imul__": "mul", "__idiv__": "div", "__itruediv__": "div", "__ipow__": "pow"}
