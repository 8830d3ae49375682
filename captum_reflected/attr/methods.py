"""Attribution methods by name, as functions that return maps."""

from __future__ import annotations

import ast
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from inspect import Parameter, signature
from typing import Any

from captum.attr import InputXGradient, IntegratedGradients, Saliency
from torch import Tensor

from captum_reflected._suggestions import did_you_mean
from captum_reflected.attr import (
    AttentionGradCam,
    AttentionRollout,
    BalancedRelevance,
    MaskRegression,
    RawAttention,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.attr._base import TokenAttribution
from captum_reflected.attr.controls import center_gaussian_maps, random_maps
from captum_reflected.attr.reference_methods import (
    activation_patching_maps,
    attn_lrp_maps,
    input_sampling_maps,
    legrad_maps,
    libra_full_grad_maps,
    metric_driven_maps,
    optimised_mask_maps,
    rise_maps,
    vit_cx_maps,
)
from captum_reflected.inputs.outputs import returning_logits


@dataclass(frozen=True)
class Method:
    """An attribution method.

    Attributes:
        title: its name in figures and tables.
        explain: a function from ``(forward_func, images, target)`` to maps (B, H, W); methods
            that roll out attention also take the options as keywords.
        rolls_out: whether it rolls out attention.
        options: names of the attributor's options that :func:`find_method` accepts.
        attributor: the attributor's class, used to check options; None if there are no options.
        settings: the options that were given with the name, and their values.
    """

    title: str
    explain: Callable[..., Tensor]
    rolls_out: bool = False
    options: tuple[str, ...] = ()
    attributor: Callable[..., Any] | None = None
    settings: tuple[tuple[str, Any], ...] = ()


def find_method(text: str) -> Method:
    """Finds a method by its name, with or without options.

    Args:
        text: a name from :data:`METHODS` or :data:`REFERENCE_METHODS`, or the name of an
            attributor's class, optionally followed by options of its constructor, separated by
            colons: ``"reflected:reflect=rows:combine=sum"``; or a name from :data:`QUALITIES`.

    Returns:
        Method: its title includes the options.

    Raises:
        ValueError: the method, the option or the option's value does not exist.

    Examples::

        >>> find_method("mask_regression:forwards=50").title
        'MaskRegression (forwards=50)'
    """
    text = QUALITIES.get(text.strip(), text)
    name, *settings = (part.strip() for part in text.split(":"))
    known = {**METHODS, **REFERENCE_METHODS}
    # A method may also be named like its class: MaskRegression is mask_regression.
    names = {_letters(known[key].title): key for key in reversed(known)}
    names |= {_letters(key): key for key in known}
    key = names.get(_letters(name))
    if key is None:
        raise ValueError(
            f"method is {name!r}; wanted: one of {_choices(name, [*QUALITIES, *known])}"
        )
    name, method = key, known[key]
    if not settings:
        return method
    options = {}
    for setting in settings:
        key, _, value = setting.partition("=")
        if key not in method.options:
            wanted = _choices(key, method.options) or "no options"
            raise ValueError(f"method {name!r} has no option {key!r}; wanted: {wanted}")
        try:
            options[key] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # not a literal, so a string without quotes
            options[key] = value
    assert method.attributor is not None  # always set for a method with options
    try:
        method.attributor(_no_model, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {text!r}: {error}") from error
    return replace(
        method,
        title=f"{method.title} ({', '.join(settings)})",
        explain=partial(method.explain, **options),
        options=(),
        settings=tuple(options.items()),
    )


def _letters(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _choices(given: str, known: Iterable[str]) -> str:
    """What can be written, and which of it was perhaps meant."""
    names = list(known)
    return ", ".join(names) + did_you_mean(given, names)


def _no_model(images: Tensor) -> Tensor:
    raise AssertionError("options are checked without running a model")


def _method_of(attributor: type[TokenAttribution]) -> Method:
    """A method with the options of its attributor's constructor."""

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
        attributor.__name__,
        explain,
        rolls_out="start_layer" in names,
        options=names,
        attributor=attributor,
    )


def _integrated_gradients(
    forward_func: Callable[..., Any], images: Tensor, target: Tensor
) -> Tensor:
    # Captum's default of 50 steps, in forwards of bounded size.
    attributions: Tensor = IntegratedGradients(returning_logits(forward_func)).attribute(
        images, target=target, internal_batch_size=max(16, images.shape[0])
    )
    return attributions.sum(dim=1)


def _saliency(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    # The largest channel of the absolute gradient: Simonyan, Vedaldi & Zisserman, *Deep Inside
    # Convolutional Networks*, ICLR workshop 2014, section 3.1.
    attributions: Tensor = Saliency(returning_logits(forward_func)).attribute(
        _leaf(images), target, abs=True
    )
    return attributions.amax(dim=1)


def _input_x_gradient(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
    attributions: Tensor = InputXGradient(returning_logits(forward_func)).attribute(
        _leaf(images), target
    )
    return attributions.detach().sum(dim=1)


def _leaf(images: Tensor) -> Tensor:
    """A separate leaf tensor, since Captum sets flags on the tensor that it differentiates by."""
    return images.detach().requires_grad_()


def _without_model(maps: Callable[[Tensor], Tensor]) -> Callable[..., Tensor]:
    def explain(forward_func: Callable[..., Any], images: Tensor, target: Tensor) -> Tensor:
        return maps(images)

    return explain


METHODS = {
    "reflected": _method_of(ReflectedRelevance),
    "mask_regression": _method_of(MaskRegression),
    "balanced_relevance": _method_of(BalancedRelevance),
    "transformer_attribution": _method_of(TransformerAttribution),
    "integrated_gradients": Method("IntegratedGradients", _integrated_gradients),
    "saliency": Method("Saliency", _saliency),
    "input_x_gradient": Method("InputXGradient", _input_x_gradient),
    "rollout": _method_of(AttentionRollout),
    "raw_attention": _method_of(RawAttention),
    "grad_cam": _method_of(AttentionGradCam),
    "random": Method("Random", _without_model(random_maps)),
    "center_gaussian": Method("CenterGaussian", _without_model(center_gaussian_maps)),
}
"""The default methods of a benchmark."""

REFERENCE_METHODS = {
    "tis": Method("TIS", input_sampling_maps),
    "rise": Method("RISE, 1024 masks", rise_maps),
    "vit_cx": Method("ViT-CX", vit_cx_maps),
    "legrad": Method("LeGrad", legrad_maps),
    "attn_lrp": Method("AttnLRP", attn_lrp_maps),
    "libragrad": Method("LibraGrad FullGrad+", libra_full_grad_maps),
    "caap": Method("CAAP", activation_patching_maps),
    "mda": Method("MDA", metric_driven_maps),
    "igos": Method("iGOS++", optimised_mask_maps),
}
"""Re-implementations of other methods for comparison; used only if requested by name."""

QUALITIES = {
    "fast": "balanced_relevance",
    "good": "mask_regression",
    "best": "mask_regression:forwards=50",
}
"""The recommended methods by cost: about 3, 20 and 50 forwards per image."""
