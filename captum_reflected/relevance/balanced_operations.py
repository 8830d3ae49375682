"""How balanced gradients run each operation, where that depends on the operation alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_reflected.inputs.modules import tensors_in
from captum_reflected.relevance.balanced_rules import (
    Frozen,
    Normalised,
    Operation,
    Proportional,
    Substituted,
    channel_normalised,
    group_normalised,
    per_channel,
    rms_normalised,
)

# Each runs the operation, and returns NotImplemented if it does not cover the arguments.


def frozen(operation: Operation, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation whose result is a constant."""
    output = operation(*args, **kwargs)
    if isinstance(output, Tensor):
        return Frozen.apply(output, True)
    return (
        type(output)(Frozen.apply(part, True) for part in output)
        if isinstance(output, tuple)
        else NotImplemented
    )


def constant(mask: Any) -> Any:
    """An operand that gets no gradient."""
    # Which kernel runs, and so the last bit, depends on whether the mask requires a gradient.
    return Frozen.apply(mask) if isinstance(mask, Tensor) and mask.requires_grad else mask


def _activation(operation: Operation, input: Any, *args: Any, **kwargs: Any) -> Any:
    if not isinstance(input, Tensor) or any(
        arg is True for arg in args
    ):  # inplace, given by its position
        return NotImplemented
    return Proportional.apply(input, lambda y: operation(y, *args, **kwargs))


def _power(operation: Operation, input: Any, exponent: Any) -> Any:
    if isinstance(exponent, Tensor):
        return NotImplemented if isinstance(input, Tensor) else frozen(operation, input, exponent)
    return (_activation if exponent >= 1 else frozen)(operation, input, exponent)


def _clamp(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    # On the CPU, so that nothing waits for the device of the input; bounds may be tensors there.
    bounds = tensors_in((args, kwargs))
    zero = input.new_zeros((), device=next((bound.device for bound in bounds), "cpu"))
    with torch.no_grad():
        at_zero = operation(zero, *args, **kwargs)
    return NotImplemented if at_zero.any() else _activation(operation, input, *args, **kwargs)


def _glu(operation: Operation, input: Tensor, dim: int = -1) -> Any:
    value, gate = input.chunk(2, dim)
    return _substituted(value * gate.detach().sigmoid(), lambda: operation(input, dim))


def _variance_and_mean(operation: Operation, input: Tensor, *args: Any, **kwargs: Any) -> Any:
    variance, mean = operation(input, *args, **kwargs)
    dim = kwargs.get("dim", kwargs.get("axis", args[0] if args else None))
    keepdim = mean.dim() == input.dim()
    dim = None if isinstance(dim, bool) else dim  # it is the first form's "unbiased"
    return Frozen.apply(variance, True), _substituted(input.mean(dim, keepdim), mean.detach)


def _layer_norm(
    operation: Operation,
    input: Tensor,
    normalized_shape: Sequence[int],
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    *args: Any,
    **kwargs: Any,
) -> Any:
    def run(x: Tensor) -> Any:
        return operation(x, normalized_shape, weight, bias, eps, *args, **kwargs)

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
    **kwargs: Any,
) -> Any:
    def run() -> Any:
        return operation(input, num_groups, weight, bias, eps, *args, **kwargs)

    return _affine(group_normalised(input, num_groups, eps), weight, bias, run)


def _affine(
    normalised: Tensor, weight: Tensor | None, bias: Tensor | None, run: Callable[[], Tensor]
) -> Any:
    surrogate = normalised
    if weight is not None:
        surrogate = surrogate * per_channel(weight, normalised)
    if bias is not None:
        surrogate = surrogate + per_channel(bias, normalised)
    return _substituted(surrogate, run)


def _batch_norm(
    operation: Operation,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not training:  # it is linear
        return NotImplemented

    def run() -> Any:
        parameters = (running_mean, running_var, weight, bias)
        return operation(input, *parameters, training, momentum, eps, *args, **kwargs)

    dims = tuple(dim for dim in range(input.dim()) if dim != 1)
    return _affine(channel_normalised(input, dims, eps), weight, bias, run)


def _instance_norm(
    operation: Operation,
    input: Tensor,
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *args: Any,
    **kwargs: Any,
) -> Any:
    if not use_input_stats:  # it is linear
        return NotImplemented

    def run() -> Any:
        parameters = (running_mean, running_var, weight, bias)
        return operation(input, *parameters, use_input_stats, momentum, eps, *args, **kwargs)

    dims = tuple(range(2, input.dim()))
    return _affine(channel_normalised(input, dims, eps), weight, bias, run)


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


def named(names: str, rule: Any) -> dict[str, Any]:
    """A rule by the names of its operations."""
    return dict.fromkeys(names.split(), rule)


# By the names of torch functions and methods, without the underscores of in-place ones.
RULES: dict[str, Callable[..., Any]] = (
    named("relu relu6 leaky_relu prelu elu celu selu gelu silu mish tanh erf", _activation)
    | named("hardtanh hardswish softsign tanhshrink softshrink hardshrink abs", _activation)
    | named("square special_erf", _activation)
    | named("pow float_power", _power)
    | named("clamp clip clamp_min clamp_max", _clamp)
    | named("softmax softmin sigmoid hardsigmoid exp rpow sqrt rsqrt reciprocal rdiv", frozen)
    | named("exp2 special_exp2 special_expit special_softmax", frozen)
    | named("var_mean std_mean", _variance_and_mean)
    | named("glu", _glu)
    | named("var std norm linalg_norm linalg_vector_norm vector_norm linalg_matrix_norm", frozen)
    | named("layer_norm", _layer_norm)
    | named("rms_norm", _rms_norm)
    | named("group_norm", _group_norm)
    | named("batch_norm", _batch_norm)
    | named("instance_norm", _instance_norm)
    | named("normalize", _normalize)
)
