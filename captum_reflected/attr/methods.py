"""Attribution methods by name, as maps ready to draw and to score."""

from __future__ import annotations

import ast
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor

from captum_reflected.attr import (
    AttentionGradCam,
    AttentionRollout,
    MaskRegression,
    RawAttention,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.attr._base import TokenAttribution
from captum_reflected.attr.controls import center_gaussian_maps, random_maps
from captum_reflected.attr.reference_methods import (
    input_sampling_maps,
    legrad_maps,
    rise_maps,
    vit_cx_maps,
)


@dataclass(frozen=True)
class Method:
    """One way to explain a model.

    Attributes:
        title: its name in figures and tables.
        explain: ``(forward_func, images, target)`` to (B, H, W) maps; methods that roll
            out attention also take ``options``.
        rolls_out: whether it rolls out attention.
        options: names of its attributor's options that a text can give.
        attributor: makes it, so that options can be checked; None where there are none.
    """

    title: str
    explain: Callable[..., Tensor]
    rolls_out: bool = False
    options: tuple[str, ...] = ()
    attributor: Callable[..., Any] | None = None


def find_method(text: str) -> Method:
    """A method by its name, with options or without.

    Args:
        text: one of :data:`METHODS` or :data:`REFERENCE_METHODS`, and options of its attributor's
            constructor with colons between: ``"reflected:reflect=rows:combine=sum"``.

    Returns:
        Method: its title names the options.

    Raises:
        ValueError: there is no such method or option, or the option does not take the value.

    Examples::

        >>> find_method("mask_regression:num_masks=10").title
        'MaskRegression (num_masks=10)'
    """
    name, *settings = (part.strip() for part in text.split(":"))
    known = {**METHODS, **REFERENCE_METHODS}
    if name not in known:
        raise ValueError(f"{name!r} is no method; wanted: one of {', '.join(known)}")
    method = known[name]
    if not settings:
        return method
    options = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in method.options:
            options_known = ", ".join(method.options) or "none"
            raise ValueError(f"method {name!r} has no option {key!r}; its options: {options_known}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # a word
            options[key] = value
    assert method.attributor is not None  # it has options
    try:
        method.attributor(_no_model, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {text!r}: {error}") from error
    return replace(
        method,
        title=f"{method.title} ({', '.join(settings)})",
        explain=partial(method.explain, **options),
        options=(),
    )


def _no_model(images: Tensor) -> Tensor:
    raise AssertionError("options are checked without a model")


def _rolled_out(attributor: type[TokenAttribution]) -> Method:
    """A method that has the options of its attributor's constructor."""

    def explain(
        forward_func: Callable[..., Any],
        images: Tensor,
        target: Tensor,
        **options: Any,
    ) -> Tensor:
        attributions: Tensor = attributor(forward_func, **options).attribute(images, target)
        return attributions[:, 0]

    names = tuple(
        name
        for name, parameter in signature(attributor).parameters.items()
        if parameter.kind is Parameter.KEYWORD_ONLY and name != "token_layout"
    )
    return Method(
        attributor.__name__, explain, rolls_out=True, options=names, attributor=attributor
    )


def _last_attention(
    attributor: type[RawAttention | AttentionGradCam],
) -> Callable[..., Tensor]:
    def explain(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
        return attributor(forward_func).attribute(images, target)[:, 0]

    return explain


def _integrated(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    # Captum's default of 50 steps, in forwards of bounded size.
    attributions: Tensor = IntegratedGradients(forward_func).attribute(
        images, target=target, internal_batch_size=max(16, images.shape[0])
    )
    return attributions.sum(dim=1)


def _saliency(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    # The largest channel of the absolute gradient: Simonyan, Vedaldi & Zisserman, *Deep Inside
    # Convolutional Networks*, ICLR workshop 2014, section 3.1.
    attributions: Tensor = Saliency(forward_func).attribute(_leaf(images), target, abs=True)
    return attributions.amax(dim=1)


def _input_x_gradient(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    attributions: Tensor = InputXGradient(forward_func).attribute(_leaf(images), target)
    return attributions.detach().sum(dim=1)


def _leaf(images: Tensor) -> Tensor:
    """A tensor of its own, since Captum sets flags on what it differentiates by."""
    return images.detach().requires_grad_()


def _knows_nothing(maps: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def explain(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
        return maps(images)

    return explain


METHODS = {
    "reflected": _rolled_out(ReflectedRelevance),
    "mask_regression": _rolled_out(MaskRegression),
    "transformer_attribution": _rolled_out(TransformerAttribution),
    "integrated_gradients": Method("IntegratedGradients", _integrated),
    "saliency": Method("Saliency", _saliency),
    "input_x_gradient": Method("InputXGradient", _input_x_gradient),
    "rollout": _rolled_out(AttentionRollout),
    "raw_attention": Method("RawAttention", _last_attention(RawAttention)),
    "grad_cam": Method("AttentionGradCam", _last_attention(AttentionGradCam)),
    "random": Method("Random", _knows_nothing(random_maps)),
    "center_gaussian": Method("CenterGaussian", _knows_nothing(center_gaussian_maps)),
}
"""The methods of a benchmark, unless others are asked for."""

REFERENCE_METHODS = {
    "tis": Method("TIS", input_sampling_maps),
    "rise": Method("RISE, 1024 masks", rise_maps),
    "vit_cx": Method("ViT-CX", vit_cx_maps),
    "legrad": Method("LeGrad", legrad_maps),
}
"""Re-implementations to compare with, by name where methods are asked for."""
