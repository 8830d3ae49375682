"""Attribution methods by key, as functions that return maps."""

from __future__ import annotations

import ast
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import cache, partial
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
        key: its name in code and in files, with the options that were given.
        title: its name in figures and tables, with these options.
        explain: a function from ``(forward_func, images, target)`` to maps (B, H, W); methods
            that roll out attention also take the options as keywords.
        rolls_out: whether it rolls out attention.
        options: names of the attributor's options that :func:`find_method` accepts.
        attributor: the attributor's class, used to check options; None if there are no options.
        settings: the options that were given with the name, and their values.
    """

    key: str
    title: str
    explain: Callable[..., Tensor]
    rolls_out: bool = False
    options: tuple[str, ...] = ()
    attributor: Callable[..., Any] | None = None
    settings: tuple[tuple[str, Any], ...] = ()


def find_method(text: str) -> Method:
    """Finds a method by its name, with or without options.

    Args:
        text: a key of :data:`METHODS` or :data:`REFERENCE_METHODS`, the name of an attributor's
            class, or a name from :data:`QUALITIES`, optionally followed by options of the
            attributor's constructor, separated by colons:
            ``"reflected_relevance:reflect=rows:combine=sum"``.

    Returns:
        Method: its key and its title include the options.

    Raises:
        ValueError: the method, the option or the option's value does not exist.

    Examples::

        >>> find_method("best").key
        'mask_regression:forwards=50'
        >>> find_method("MaskRegression:forwards=50").title
        'MaskRegression (forwards=50)'
    """
    name, settings = _parts(text)
    method = _KNOWN.get(name)
    if method is None:
        wanted = ", ".join([*QUALITIES, *_KNOWN])
        hint = did_you_mean(_letters(name), [*QUALITIES, *_SPELLINGS], _SPELLINGS)
        raise ValueError(f"method is {name!r}; wanted: one of {wanted}{hint}")
    if not settings:
        return method
    options = {}
    for setting in settings:
        option, _, value = setting.partition("=")
        if option not in method.options:
            wanted = _choices(option, method.options) or "no options"
            raise ValueError(f"method {name!r} has no option {option!r}; wanted: {wanted}")
        try:
            options[option] = ast.literal_eval(value)
        except (ValueError, SyntaxError):  # not a literal, so a string without quotes
            options[option] = value
    assert method.attributor is not None  # always set for a method with options
    try:
        method.attributor(_no_model, **options)
    except (TypeError, ValueError) as error:
        raise ValueError(f"method {text!r}: {error}") from error
    return replace(
        method,
        key=":".join([name, *settings]),
        title=f"{method.title} ({', '.join(settings)})",
        explain=partial(method.explain, **options),
        options=(),
        settings=tuple(options.items()),
    )


@cache
def method_key(text: str) -> str:
    """The key of the method that a text names, with its options; they are not checked.

    Benchmarks that were run by an earlier version store names of that time. A method that is not
    known keeps its name.

    Examples::

        >>> method_key("reflected:reflect=rows")
        'reflected_relevance:reflect=rows'
    """
    name, settings = _parts(text)
    return ":".join([name, *settings]) if name in _KNOWN else text


def class_key(name: str) -> str:
    """The key of a method whose class has this name: ``mask_regression`` for MaskRegression."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])", "_", name).lower()


def _parts(text: str) -> tuple[str, list[str]]:
    """The key of a method, or what else stands there, and the texts of the options."""
    name, *settings = (part.strip() for part in text.split(":"))
    name, *own = QUALITIES.get(name, name).split(":")
    options = {setting.partition("=")[0].strip(): setting for setting in [*own, *settings]}
    return _SPELLINGS.get(_letters(name), name), list(options.values())


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
    return _method(
        attributor.__name__,
        explain,
        rolls_out="start_layer" in names,
        options=names,
        attributor=attributor,
    )


def _method(title: str, explain: Callable[..., Tensor], **others: Any) -> Method:
    """A method whose title is the name of a class."""
    return Method(class_key(title), title, explain, **others)


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
    method.key: method
    for method in (
        _method_of(ReflectedRelevance),
        _method_of(MaskRegression),
        _method_of(BalancedRelevance),
        _method_of(TransformerAttribution),
        _method("IntegratedGradients", _integrated_gradients),
        _method("Saliency", _saliency),
        _method("InputXGradient", _input_x_gradient),
        _method_of(AttentionRollout),
        _method_of(RawAttention),
        _method_of(AttentionGradCam),
        _method("Random", _without_model(random_maps)),
        _method("CenterGaussian", _without_model(center_gaussian_maps)),
    )
}
"""The default methods of a benchmark, by key."""

REFERENCE_METHODS = {
    method.key: method
    for method in (
        Method("tis", "TIS", input_sampling_maps),
        Method("rise", "RISE", rise_maps),
        Method("vit_cx", "ViT-CX", vit_cx_maps),
        Method("legrad", "LeGrad", legrad_maps),
        Method("attn_lrp", "AttnLRP", attn_lrp_maps),
        Method("libragrad", "LibraGrad FullGrad+", libra_full_grad_maps),
        Method("caap", "CAAP", activation_patching_maps),
        Method("mda", "MDA", metric_driven_maps),
        Method("igos", "iGOS++", optimised_mask_maps),
    )
}
"""Re-implementations of other methods for comparison; used only if requested by key."""

QUALITIES = {
    "fast": "balanced_relevance",
    "good": "mask_regression",
    "best": "mask_regression:forwards=50",
}
"""Short names of the recommended methods, by cost: a forward and a backward, 20 forwards, 50.

``best`` was not clearly better than ``good`` in any metric of ``docs/study.md``.
"""

# Keys of earlier versions, which benchmarks on disk and commands in notes still hold.
_EARLIER_KEYS = {
    "reflected": "reflected_relevance",
    "rollout": "attention_rollout",
    "grad_cam": "attention_grad_cam",
}
_KNOWN = {**METHODS, **REFERENCE_METHODS}
# What may be written, to the key: keys, titles and earlier keys, whatever their case.
_SPELLINGS = (
    {_letters(old): key for old, key in _EARLIER_KEYS.items()}
    | {_letters(method.title): key for key, method in _KNOWN.items()}
    | {_letters(key): key for key in _KNOWN}
)
