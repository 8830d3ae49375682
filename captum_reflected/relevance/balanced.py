"""Balanced gradients as a forward function for the gradient methods of Captum."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.recording import Recorded, attention_relevances
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.modules import tensors_in, without_compilation
from captum_reflected.inputs.outputs import logits_of
from captum_reflected.relevance.balanced_mode import BalancedMode
from captum_reflected.relevance.rollout import gradient_relevance


def balanced(forward_func: Callable[..., Any]) -> nn.Module:
    r"""
    Wraps a model so that its gradients are balanced; its outputs stay the same.

    In a Transformer, the ordinary gradient times the input does not add up to the output: softmax
    attention, normalisation and activations create and lose relevance on the way back. Balanced
    gradients treat attention probabilities, standard deviations and the gates of activations as
    constants, so that the model is linear in its input for the given image. The output is then the
    sum of gradient times input and gradient times bias, over the input and all biases.

    The result is a drop-in ``forward_func`` for every gradient method of Captum:
    ``InputXGradient(balanced(model))``, ``IntegratedGradients(balanced(model))``,
    ``LayerGradientXActivation(balanced(model), layer)``, with or without ``NoiseTunnel``. The model
    is not changed: the rules apply to the operations that this call runs, in this thread. Its
    outputs are those of the model to the last bit; if the model returns an object with ``logits``,
    as Hugging Face's do, they are these logits.

    The gradient is balanced for inputs, activations and biases. Inputs are the arguments that
    require a gradient (if none does, the first argument), and all other leaf tensors that require a
    gradient and are not parameters: Captum's methods for layers put such tensors in the place of
    activations. Where an operation has no rule, a warning names it and its module; see
    :mod:`captum_reflected.relevance.balanced_rules` for the rules.

    References:
        Mehri, Soleymani Baghshah & Pilehvar, *LibraGrad: Balancing Gradient Flow for Universally
        Better Vision Transformer Attributions*, CVPR 2025.

    Args:

        forward_func (Callable): The model, or any function that runs it.

    Returns:
        *nn.Module*: a module that is called like ``forward_func``, and contains it if it is a
        module. Called under ``torch.no_grad``, it raises a RuntimeError, unless Captum
        calls it, which then needs its outputs alone.

    Raises:
        TypeError: ``forward_func`` is not callable.

    Examples::

        >>> from captum.attr import InputXGradient
        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> attributions = InputXGradient(balanced(model)).attribute(images, target=281)
    """
    if not callable(forward_func):
        raise TypeError(
            f"forward_func is a {type(forward_func).__name__}; wanted: a model or a function"
        )
    return _Balanced(forward_func)


class _Balanced(nn.Module):
    """The wrapper that :func:`balanced` returns."""

    def __init__(self, forward_func: Callable[..., Any]) -> None:
        super().__init__()
        self.forward_func = forward_func
        if isinstance(forward_func, nn.Module):
            self.training = forward_func.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            if _is_called_by_captum():
                return logits_of(self.forward_func(*args, **kwargs))
            raise RuntimeError(
                "balanced(forward_func) was called without gradients, as under torch.no_grad or "
                "inference_mode; wanted: gradients on. Only they differ from those of forward_func"
            )
        if any(isinstance(mode, AttentionMode) for mode in _get_current_function_mode_stack()):
            raise UnsupportedModelError(
                "balanced(forward_func) was given to an attributor that records attention; "
                'wanted: forward_func itself, and rule="balanced"'
            )
        sources: list[Tensor] = []
        if any(tensor.requires_grad for tensor in tensors_in((args, kwargs))):
            args, kwargs = _with_nodes((args, kwargs), sources, every=False)
        elif args:  # for the gradients of activations; what follows are additional arguments
            args = (_with_nodes(args[0], sources, every=True), *args[1:])
        with without_compilation(), _WrapperMode(sources, leaves=True) as mode:
            output = logits_of(self.forward_func(*args, **kwargs))
        outputs = list(tensors_in(output))
        if sources or not mode.is_constant(outputs):
            check_balanced(mode, outputs)
        elif any(tensor.requires_grad for tensor in outputs):
            warnings.warn(
                "balanced(forward_func) was called without a floating-point tensor, such as images "
                "or embeddings: its gradients are the ordinary ones",
                stacklevel=2,
            )
        return output


class _WrapperMode(BalancedMode):
    """Refuses activation checkpointing, whose second forward would run without the rules."""

    def ran(self, output: Any) -> None:
        """Looks for the function of torch among the callers of the operation that just ran."""
        frame: FrameType | None = sys._getframe(2)
        while frame is not None:
            if frame.f_globals.get("__name__") == "torch.utils.checkpoint":
                raise _checkpointed()
            frame = frame.f_back


def balanced_relevances(
    forward_func: Callable[..., Any],
    batch: Batch,
    start_layer: int = 0,
    num_tokens: int | None = None,
) -> Recorded:
    """Relevance of every layer: positive part of attention times balanced gradient.

    Args:
        forward_func: the model, or any function of the images that calls it.
        batch: the call, inside
            :func:`captum_reflected.inputs.batch.preserving_state` with gradients on.
        start_layer: number of first layers to leave out.
        num_tokens: N, if the caller gave a layout.

    Returns:
        Recorded: as from :func:`captum_reflected.attention.recording.attention_relevances`, which
        also lists the errors.
    """
    call = batch.with_source()

    def checked(*args: Any) -> Any:
        output = logits_of(forward_func(*args))
        check_balanced(mode, list(tensors_in(output)))
        return output

    with BalancedMode([call.images]) as mode:
        return attention_relevances(checked, call, gradient_relevance, start_layer, num_tokens)


def check_balanced(mode: BalancedMode, outputs: Sequence[Tensor]) -> None:
    """Warns of operations without a rule; raises if no gradient is left.

    Args:
        mode: the mode under which the forward ran.
        outputs: what the forward returned.

    Raises:
        UnsupportedModelError: the outputs are constants under the rules, or the model uses
            reentrant checkpointing, which hides its operations.
    """
    if mode.is_constant(outputs):
        raise UnsupportedModelError(
            "no gradient flows from the output of forward_func to its inputs under balanced "
            "gradients: it is a softmax or sigmoid, or does not depend on the inputs (as under "
            "torch.no_grad or after detach); wanted: a differentiable function that returns logits"
        )
    unbalanced = mode.unbalanced(outputs)
    if any(name.startswith("CheckpointFunction ") for name in unbalanced):
        raise _checkpointed()
    if unbalanced:
        warnings.warn(
            f"balanced gradients have no rule for {', '.join(unbalanced)}: the gradient there is "
            "the ordinary one, and the relevance need not add up to the output",
            stacklevel=3,
        )


def _checkpointed() -> UnsupportedModelError:
    return UnsupportedModelError(
        "the model uses activation checkpointing, whose second forward runs without the rules of "
        "balanced gradients; wanted: a model without it (for timm, set_grad_checkpointing(False)), "
        "or an attributor such as BalancedRelevance and use_reentrant=False"
    )


def _with_nodes(value: Any, sources: list[Tensor], *, every: bool) -> Any:
    """Nested arguments, in which the inputs have a node in the autograd graph.

    Args:
        value: an argument.
        sources: a list that the inputs are appended to.
        every: whether every floating-point tensor is an input, or those that require a gradient.
    """
    if isinstance(value, Tensor) and (value.requires_grad or (every and value.is_floating_point())):
        leaf = value if value.requires_grad else value.detach().requires_grad_()
        sources.append(leaf.view_as(leaf))
        return sources[-1]
    if type(value) in (tuple, list):
        return type(value)(_with_nodes(item, sources, every=every) for item in value)
    if type(value) is dict:
        return {name: _with_nodes(item, sources, every=every) for name, item in value.items()}
    return value


def _is_called_by_captum() -> bool:
    """Whether Captum is calling, whose convergence deltas and metrics need the outputs alone."""
    frame: FrameType | None = sys._getframe(2)
    while frame is not None:
        if str(frame.f_globals.get("__name__")).split(".")[0] in ("captum", "captum_reflected"):
            return True
        frame = frame.f_back
    return False
