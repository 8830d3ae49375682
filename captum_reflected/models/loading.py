"""Loads models by name, with pretrained or local weights, preprocessing and class names."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from captum_reflected import demo
from captum_reflected.errors import ModelLoadError
from captum_reflected.models.open_clip import imagenet_class_names
from captum_reflected.models.prompts import DEFAULT_TEMPLATES, Template
from captum_reflected.models.weights import check_weights_file, reason
from captum_reflected.models.zero_shot import ZeroShotClassifier

if TYPE_CHECKING:
    from PIL import Image

DEMO_MODEL = "demo"
_OPEN_CLIP = "open_clip:"


@dataclass(frozen=True)
class LoadedModel:
    """A classifier in eval mode, with its preprocessing and its class names.

    Attributes:
        name: the name given to :func:`load_model`.
        model: a module from images (B, C, H, W) to logits (B, K).
        transform: the model's preprocessing, from a PIL image to a (C, H, W) tensor.
        mean: (C,), the mean that ``transform`` subtracts.
        std: (C,), the standard deviation that ``transform`` divides by.
        num_classes: number of classes, K.
        class_names: K names in the model's order, or ``None`` if not known.
        synsets: K WordNet ids such as ``"n01440764"`` if the classes are ImageNet's, else
            ``None``.
    """

    name: str
    model: nn.Module
    transform: Callable[[Image.Image], Tensor]
    mean: Tensor
    std: Tensor
    num_classes: int
    class_names: tuple[str, ...] | None
    synsets: tuple[str, ...] | None = None

    def class_name(self, index: int) -> str:
        """The name of a class, or ``class N`` if the names are not known."""
        return f"class {index}" if self.class_names is None else self.class_names[index]

    def to_pictures(self, images: Tensor) -> Tensor:
        """Converts model inputs (B, C, H, W) to pictures (B, H, W, C) from 0 to 1, on the CPU."""
        images = images.detach().float().cpu()
        pictures = images * self.std.view(-1, 1, 1) + self.mean.view(-1, 1, 1)
        return pictures.clamp(0, 1).permute(0, 2, 3, 1)


def load_model(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    classes: Sequence[str] | Literal["imagenet"] | None = None,
    templates: Sequence[Template] | None = None,
) -> LoadedModel:
    """Loads a timm model, an open_clip model as a zero-shot classifier, or the demo model.

    Args:
        name: any name that ``timm.create_model`` accepts; ``"open_clip:NAME/TAG"``, such as
            ``"open_clip:ViT-B-32/openai"``; or ``"demo"`` for the small model that is part of
            this package.
        weights: a local ``.safetensors`` file with a state dict for that model; for timm, the
            number of classes may differ. ``None`` downloads the pretrained weights. With a
            file, the tag of an open_clip model is optional; it then selects the activation and
            the preprocessing.
        device: the device of the model.
        classes: the class names for an open_clip model, which has none of its own;
            ``"imagenet"`` for ImageNet's 1000 classes with open_clip's names.
        templates: texts with ``{}`` for the class name; see
            :meth:`~captum_reflected.models.ZeroShotClassifier.from_open_clip`. ``None`` uses
            its default.

    Returns:
        LoadedModel: in eval mode.

    Raises:
        ModelLoadError: the name is unknown; the weights are missing, or have another format or
            belong to another model; or the classes are invalid, missing or not supported.
    """
    if name.startswith(_OPEN_CLIP):
        return _load_open_clip(name, weights, device, classes, templates)
    if classes is not None or templates is not None:
        raise ModelLoadError(
            f"model {name!r} has classes of its own; wanted: no classes and templates, or a "
            f"zero-shot model, {_OPEN_CLIP}NAME/TAG"
        )
    from timm.data import (
        ImageNetInfo,
        create_transform,
        infer_imagenet_subset,
        resolve_model_data_config,
    )

    if name == DEMO_MODEL:
        if weights is not None:
            raise ModelLoadError(
                f"weights is {weights}; wanted: none, since model {name!r} has its own weights"
            )
        model = demo.load_model()
        class_names: tuple[str, ...] | None = demo.CLASS_NAMES
        synsets = None
    else:
        model = _create_timm(name, None if weights is None else Path(weights))
        subset = infer_imagenet_subset(model)
        imagenet = None if subset is None else ImageNetInfo(subset)
        class_names = None if imagenet is None else tuple(imagenet.label_descriptions())
        synsets = None if imagenet is None else tuple(imagenet.label_names())
    config = resolve_model_data_config(model)
    return LoadedModel(
        name=name,
        model=model.eval().to(device),
        transform=create_transform(**config, is_training=False),
        mean=torch.tensor(config["mean"]),
        std=torch.tensor(config["std"]),
        num_classes=model.num_classes,
        class_names=class_names,
        synsets=synsets,
    )


def _load_open_clip(
    name: str,
    weights: str | Path | None,
    device: str | torch.device,
    classes: Sequence[str] | Literal["imagenet"] | None,
    templates: Sequence[Template] | None,
) -> LoadedModel:
    from timm.data import ImageNetInfo

    if classes is None:
        raise ModelLoadError(
            f"model {name!r} needs classes; wanted: the class names, as a list or with --classes"
        )
    architecture, _, tag = name.removeprefix(_OPEN_CLIP).partition("/")
    if not tag and weights is None:
        raise ModelLoadError(
            f"model {name!r} names no pretrained weights; wanted: {name}/TAG, or local weights as "
            "a .safetensors file"
        )
    is_imagenet = classes == "imagenet"
    try:
        model = ZeroShotClassifier.from_open_clip(
            architecture,
            tag or None,
            imagenet_class_names() if is_imagenet else classes,
            DEFAULT_TEMPLATES if templates is None else templates,
            weights=weights,
            device=device,
            allow_duplicates=is_imagenet,  # two of open_clip's ImageNet names occur twice
        )
    except ModelLoadError:
        raise
    except ValueError as error:
        raise ModelLoadError(f"cannot make model {name!r}: {error}") from error
    assert model.preprocessing is not None  # open_clip always provides it
    return LoadedModel(
        name=name,
        model=model,
        transform=model.preprocessing.transform,
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
        num_classes=model.num_classes,
        class_names=model.class_names,
        synsets=tuple(ImageNetInfo().label_names()) if is_imagenet else None,
    )


def _create_timm(name: str, weights: Path | None) -> nn.Module:
    import timm

    if ":" not in name and not timm.is_model(name):
        close = difflib.get_close_matches(name, [DEMO_MODEL, *timm.list_models()], n=3)
        hint = f"; did you mean {' or '.join(close)}?" if close else ""
        raise ModelLoadError(f"unknown model {name!r}; wanted: a name that timm knows{hint}")
    options = {} if weights is None else _local_weights(name, weights)
    try:
        model: nn.Module = timm.create_model(name, pretrained=True, **options)
    except Exception as error:
        # timm and the hub client raise errors of many types.
        given = "its pretrained weights" if weights is None else f"the weights {weights}"
        hint = (
            "; wanted: a connection, or local weights (--weights FILE.safetensors)"
            if weights is None
            else ""
        )
        raise ModelLoadError(
            f"cannot load {given} into model {name!r}: {reason(error)}{hint}"
        ) from error
    return model


def _local_weights(name: str, weights: Path) -> dict[str, Any]:
    """Options for timm's own pretrained loading, pointed at a local safetensors file."""
    import timm
    from safetensors import SafetensorError, safe_open

    check_weights_file(weights)
    # Without custom_load=False, timm before 1.0.31 assumes the file format of the original weights.
    overlay = {"file": str(weights), "custom_load": False}
    options: dict[str, Any] = {"pretrained_cfg_overlay": overlay}
    config = timm.get_pretrained_cfg(name, allow_unregistered=True)
    classifier = getattr(config, "classifier", None)
    try:
        with safe_open(weights, framework="pt") as stored:
            if isinstance(classifier, str) and f"{classifier}.bias" in stored.keys():  # noqa: SIM118
                shape = stored.get_slice(f"{classifier}.bias").get_shape()
                if len(shape) == 1:
                    options["num_classes"] = shape[0]
                    # Otherwise timm drops the head of a fine-tuned model, since its number of
                    # classes is not the original one.
                    overlay["num_classes"] = shape[0]
    except SafetensorError as error:
        raise ModelLoadError(f"weights file {weights} is not a safetensors file: {error}") from None
    return options
