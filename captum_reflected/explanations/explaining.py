"""Explains images in one call, by any method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeAlias

import torch
from captum.attr import Attribution, GradientAttribution
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_reflected.attr._base import TokenAttribution
from captum_reflected.attr.methods import class_key, find_method
from captum_reflected.explanations.explanation import Explanation
from captum_reflected.inputs.batch import Batch, make_batch, without_inference_mode
from captum_reflected.inputs.class_names import find_class_names
from captum_reflected.inputs.logits import class_logits
from captum_reflected.inputs.modules import modules_of
from captum_reflected.inputs.pictures import picture_scale
from captum_reflected.metrics._maps import as_maps

AnyMethod: TypeAlias = str | type[Attribution] | Attribution
"""A method by its key or its class, or an attributor."""

_WANTED = (
    "logits of two classes or more, (B, K). For other outputs, use an attributor's attribute, such "
    "as MaskRegression(model).attribute(images, target)"
)


def explain(
    model: Callable[..., Any],
    images: Tensor | tuple[Tensor],
    target: Any = None,
    *,
    method: AnyMethod = "good",
    class_names: Sequence[str] | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
) -> Explanation:
    r"""
    Explains a model's predictions, and returns maps that can be shown.

    A thin layer on ``attribute``: ``explain(model, images).attributions`` holds the same values as
    ``MaskRegression(model).attribute(images, target)``, once per pixel.

    Args:

        model (Callable): The model, or any function of the images that runs it and returns
                    logits of shape (B, K), K of 2 or more, or an object with ``logits``, as
                    Hugging Face's models do.
        images (Tensor or tuple[Tensor]): Images (B, 3, H, W), as the model takes them.
        target (int, Tensor or list, optional): The class to explain: one index for all images, or
                    one for each. None explains the predicted class of each image.
                    Default: None
        method (str, type or Attribution, optional): The key of a method in
                    :data:`captum_reflected.attr.methods.METHODS`, or its class; the key may have
                    options after colons: ``"mask_regression:forwards=30"``; ``"fast"`` for
                    ``"balanced_relevance"``, one forward and one backward, ``"good"`` for
                    ``"mask_regression"``, 20 forwards, or ``"best"`` for
                    ``"mask_regression:forwards=50"``, in no metric that was measured clearly
                    better than ``"good"``; or an attributor of this package or of Captum that is
                    explained with, such as ``IntegratedGradients(model)``.
                    Default: ``"good"``
        class_names (Sequence[str] or str, optional): The name of each class, for texts, in the
                    order of the model's classes; or ``"imagenet-1k"``, ``"imagenet-12k"``,
                    ``"imagenet-21k"``, ``"imagenet-21k-miil"``, ``"imagenet-22k"`` or
                    ``"imagenet-22k-ms"`` for the names of ImageNet's classes. None takes the names
                    that the model states, as :class:`~captum_reflected.models.ZeroShotClassifier`
                    and classifiers of Hugging Face do; other classes are called ``class 281``,
                    since a model of 1000 classes need not be one of ImageNet.
                    Default: None
        mean (float or Sequence[float], optional): The mean that the preprocessing of the images
                    subtracts, one number or one per channel; needed to show the images. None
                    takes that of timm's ``pretrained_cfg``; without one, images from 0 to 1 are
                    shown as they are, and the colours of others are stretched to that range, with
                    a warning.
                    Default: None
        std (float or Sequence[float], optional): The standard deviation that it divides by.
                    Default: None

    Returns:
        *Explanation*: ``.attributions`` (B, H, W), ``.target`` (B,), ``.probability`` (B,),
        ``.overlay()``, ``.plot()``, ``.save(path)``; a notebook shows its figure. ``[3]`` or
        ``[:8]`` are the explanations of some of the images.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes or values do not fit; the message says what was given.
        UnsupportedModelError: the method cannot explain this model.

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> images = images.clamp(0, 1)  # of a model without preprocessing
        >>> explanation = explain(model, images, target=281)
        >>> explanation.save("explanation.png")  # doctest: +SKIP
    """
    found = explain_all(
        model, images, target, [method], class_names=class_names, mean=mean, std=std
    )
    return next(iter(found.values()))


def explain_all(
    model: Callable[..., Any],
    images: Tensor | tuple[Tensor],
    target: Any,
    methods: Sequence[AnyMethod] | Mapping[str, AnyMethod],
    *,
    class_names: Sequence[str] | None,
    mean: float | Sequence[float] | Tensor | None,
    std: float | Sequence[float] | Tensor | None,
    show_progress: bool = False,
) -> dict[str, Explanation]:
    """Explains images by several methods; what these share is computed once.

    Args:
        model: as in :func:`explain`, which also lists the errors.
        images: as there.
        target: as there.
        methods: the methods, or the methods by title.
        class_names: as there.
        mean: as there.
        std: as there.
        show_progress: whether to show a progress bar.
    """
    if not callable(model):
        raise TypeError(f"model is a {type(model).__name__}; wanted: a model or a function")
    found = _find_all(model, methods)
    # Autograd cannot use tensors of inference mode, which the caller may be in.
    with torch.inference_mode(False), torch.enable_grad():
        batch = without_inference_mode(make_batch(images, target, None, name="images"))
        pictures = picture_scale(model, batch.images, mean, std)(batch.images)
        logits = class_logits(model, batch, wanted=_WANTED)
        explained = _explained_classes(batch, logits)
        probabilities = logits.softmax(dim=-1)
        best = probabilities.max(dim=-1)
        make = partial(
            Explanation,
            pictures=pictures,
            target=explained,
            probability=probabilities.gather(1, explained.unsqueeze(1)).squeeze(1),
            predicted=best.indices,
            predicted_probability=best.values,
            model=_name_of(model),
            class_names=find_class_names(model, class_names, logits.shape[1]),
        )
        bar = tqdm(found.items(), desc="explaining", unit="method", disable=not show_progress)
        return {
            name: make(
                attributions=method.compute(batch.images, explained),
                method=method.key,
                title=method.title,
            )
            for name, method in bar
        }


@dataclass(frozen=True)
class _Found:
    """A method: its key with the options, its title, and (images, target) -> maps (B, H, W)."""

    key: str
    title: str
    compute: Callable[[Tensor, Tensor], Tensor]


def _find_all(
    model: Callable[..., Any],
    methods: Sequence[AnyMethod] | Mapping[str, AnyMethod],
) -> dict[str, _Found]:
    """The methods by the titles given to them, or by their keys."""
    if isinstance(methods, Mapping):
        return {
            title: replace(_find(model, method), title=title) for title, method in methods.items()
        }
    found: dict[str, _Found] = {}
    for method in methods:
        one = _find(model, method)
        if one.key in found:
            raise ValueError(
                f"methods has {one.title} twice; wanted: each method once, or a dictionary from "
                "titles of your own to methods"
            )
        found[one.key] = one
    return found


def _find(model: Callable[..., Any], method: AnyMethod) -> _Found:
    """A method by its name or its class, or as an attributor."""
    if isinstance(method, type) and issubclass(method, Attribution):
        method = method(model)
    if isinstance(method, str):
        found = find_method(method)

        def explain_by_name(images: Tensor, target: Tensor) -> Tensor:
            return found.explain(model, images, target).detach()

        return _Found(found.key, found.title, explain_by_name)
    if not isinstance(method, Attribution):
        raise TypeError(
            f"method is a {type(method).__name__}; wanted: a name such as 'mask_regression', or "
            "an attributor such as MaskRegression(model)"
        )

    others, own = modules_of(getattr(method, "forward_func", model)), modules_of(model)
    if others and own and set(others).isdisjoint(own):
        raise ValueError(
            f"method is a {type(method).__name__} of another model; wanted: one of the model to be "
            "explained"
        )

    def attribute(images: Tensor, target: Tensor) -> Tensor:
        if isinstance(method, GradientAttribution):  # else Captum warns that it makes one
            images = images.detach().requires_grad_()
        attributions = method.attribute(images, target=target)
        if isinstance(method, TokenAttribution):  # the channels are equal
            attributions = attributions[:, :1]
        count, channels, height, width = images.shape
        return as_maps(attributions, (count, height, width), channels)

    title = type(method).__name__
    options = method.changed_options() if isinstance(method, TokenAttribution) else []
    key = ":".join([class_key(title), *options])
    return _Found(key, f"{title} ({', '.join(options)})" if options else title, attribute)


def _explained_classes(batch: Batch, logits: Tensor) -> Tensor:
    """(B,) indices of the explained classes."""
    if batch.target is None:
        return logits.argmax(dim=-1)
    target = batch.target
    if target.shape[1] != 1 or bool(((target < 0) | (target >= logits.shape[1])).any()):
        raise ValueError(
            f"target is {target.squeeze(1).tolist()}; wanted: classes from 0 to "
            f"{logits.shape[1] - 1}, one number for each image"
        )
    return target.squeeze(1)


def _name_of(model: Callable[..., Any]) -> str:
    found: list[nn.Module] = modules_of(model)
    architecture = next(
        (name for one in found if (name := getattr(one, "default_cfg", {}).get("architecture"))),
        None,
    )
    if architecture is not None:
        return str(architecture)
    return type(found[0]).__name__ if found else getattr(model, "__name__", type(model).__name__)
