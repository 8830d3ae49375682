r"""The rules of balanced gradients, as operations with a backward of their own.

The values of every operation are those of the model, to the last bit. Only its backward differs
(Mehri, Soleymani Baghshah & Pilehvar, *LibraGrad*, CVPR 2025):

+------------------------------------+---------------------------------------------------------+
| operation                          | backward                                                |
+====================================+=========================================================+
| softmax (attention, pooling)       | a constant: no gradient                                 |
+------------------------------------+---------------------------------------------------------+
| LayerNorm, RMSNorm, GroupNorm and  | the mean is subtracted as usual; the standard deviation |
| others                             | is a constant                                           |
+------------------------------------+---------------------------------------------------------+
| activation f with f(0) = 0         | :math:`f(y) = y \cdot (f(y) / y)`, the quotient a       |
|                                    | constant                                                |
+------------------------------------+---------------------------------------------------------+
| sigmoid, exp, root, reciprocal,    | a constant: they are gates and statistics               |
| norm, variance, what divides       |                                                         |
+------------------------------------+---------------------------------------------------------+
| product of two tensors, one of     | the gate is a constant                                  |
| which is a gate                    |                                                         |
+------------------------------------+---------------------------------------------------------+
| product of two other tensors       | half of the gradient for each (the uniform rule of      |
|                                    | Achtibat et al., *AttnLRP*, ICML 2024, section 3.3)     |
+------------------------------------+---------------------------------------------------------+
| linear operations, selections      | the ordinary gradient                                   |
+------------------------------------+---------------------------------------------------------+

Every operation is then linear in its input for the given image, so relevance, value times gradient,
is neither created nor lost: the model's output equals the sum over all inputs and biases.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function

Operation = Callable[..., Any]


class Frozen(Function):
    """A constant that still shows in the autograd graph what it was computed from.

    ``is_new`` says that the value is the result of an operation that just ran. The forward may then
    modify it in place, as it may modify the result of that operation.
    """

    @staticmethod
    def forward(ctx: Any, value: Tensor, is_new: bool = False) -> Tensor:
        """The value, unchanged."""
        ctx.set_materialize_grads(False)
        return value.data if is_new else value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[None, None]:
        """No gradient."""
        return None, None


class Half(Function):
    """Passes on half of the gradient."""

    @staticmethod
    def forward(ctx: Any, value: Tensor) -> Tensor:
        """The value, unchanged."""
        ctx.set_materialize_grads(False)
        return value.view_as(value)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> Tensor | None:
        """Half of the gradient."""
        return None if gradient is None else gradient / 2


class Proportional(Function):
    """An activation f with f(0) = 0, whose backward multiplies by the quotient f(y) / y."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, operation: Operation) -> Tensor:
        """The activation, and its quotient for the backward."""
        ctx.set_materialize_grads(False)
        value: Tensor = operation(y)
        # At y = 0, the quotient is that of a number close to 0.
        small = torch.finfo(y.dtype).eps
        near_zero = y.new_full([1, *y.shape[1:2], *[1] * (y.dim() - 2)][: y.dim()], small)
        slope = operation(near_zero) / small
        ctx.save_for_backward(torch.where(y == 0, slope, value / y))
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient times the quotient."""
        (quotient,) = ctx.saved_tensors
        return None if gradient is None else gradient * quotient, None


class Normalised(Function):
    """A normalisation over the last dimensions; its backward keeps the deviation constant."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        operation: Operation,
        dims: tuple[int, ...],
        eps: float,
    ) -> Tensor:
        """The normalisation, and its scale for the backward."""
        ctx.set_materialize_grads(False)
        value: Tensor = operation(x)
        exact = x.to(torch.promote_types(x.dtype, torch.float32))
        variance, mean = torch.var_mean(exact, dims, correction=0, keepdim=True)
        scale = (variance + eps).rsqrt()
        needs_x = weight is not None and weight.requires_grad
        ctx.save_for_backward(x if needs_x else None, mean if needs_x else None, scale, weight)
        ctx.dims, ctx.has_bias = dims, bias is not None
        return value

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, ...]:
        """The gradients of x, weight and bias."""
        nothing = (None,) * 6
        if gradient is None:
            return nothing
        x, mean, scale, weight = ctx.saved_tensors
        gradient = gradient.to(scale.dtype)
        outer = tuple(range(gradient.dim() - len(ctx.dims)))
        of_weight = of_bias = None
        if x is not None and ctx.needs_input_grad[1]:
            of_weight = (gradient * (x - mean) * scale).sum(outer).to(weight.dtype)
        if ctx.has_bias and ctx.needs_input_grad[2]:
            of_bias = gradient.sum(outer)
        if weight is not None:
            gradient = gradient * weight
        of_x = (gradient - gradient.mean(ctx.dims, keepdim=True)) * scale
        return of_x, of_weight, of_bias, *nothing[3:]


class Substituted(Function):
    """The value of a new tensor with the gradient of another."""

    @staticmethod
    def forward(ctx: Any, surrogate: Tensor, value: Tensor) -> Tensor:
        """The value."""
        ctx.set_materialize_grads(False)
        return value.data

    @staticmethod
    def backward(ctx: Any, gradient: Tensor | None) -> tuple[Tensor | None, None]:
        """The gradient, for the surrogate."""
        return gradient, None


def rms_normalised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """A tensor divided by its root mean square, which is a constant."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    scale = (exact.detach().square().mean(dims, keepdim=True) + eps).rsqrt()
    normalised: Tensor = exact * scale
    return normalised


def group_normalised(x: Tensor, groups: int, eps: float) -> Tensor:
    """Groups of channels of (B, C, ...), normalised with a constant deviation."""
    grouped = x.reshape(len(x), groups, -1)
    grouped = grouped.to(torch.promote_types(x.dtype, torch.float32))
    centred = grouped - grouped.mean(dim=-1, keepdim=True)
    variance = centred.detach().square().mean(dim=-1, keepdim=True)
    return (centred * (variance + eps).rsqrt()).reshape(x.shape)


def channel_normalised(x: Tensor, dims: tuple[int, ...], eps: float) -> Tensor:
    """(B, C, ...), normalised over some dimensions with a constant deviation."""
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    centred = exact - exact.mean(dims, keepdim=True)
    variance = centred.detach().square().mean(dims, keepdim=True)
    normalised: Tensor = centred * (variance + eps).rsqrt()
    return normalised


def per_channel(parameter: Tensor, x: Tensor) -> Tensor:
    """A parameter (C,) in the shape that multiplies (B, C, ...)."""
    return parameter.view(1, -1, *[1] * (x.dim() - 2))
