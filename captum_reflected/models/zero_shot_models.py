"""Zero-shot classifiers by name, with the classes and templates that the caller gives."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch

from captum_reflected.errors import ModelLoadError
from captum_reflected.models.loaded_model import LoadedModel
from captum_reflected.models.open_clip import imagenet_class_names
from captum_reflected.models.prompts import DEFAULT_TEMPLATES, Template
from captum_reflected.models.zero_shot import ZeroShotClassifier

OPEN_CLIP = "open_clip:"

Classes = Sequence[str] | Literal["imagenet"]


@dataclass(frozen=True)
class Prompts:
    """What a zero-shot classifier is made of besides its model; ``None`` where nothing is given.

    Attributes:
        classes: the class names, or ``"imagenet"``.
        templates: the texts around the class names.
    """

    classes: Classes | None
    templates: Sequence[Template] | None

    def refuse(self, name: str) -> None:
        """Raises ModelLoadError if something is given, for a model with classes of its own."""
        if self.classes is not None or self.templates is not None:
            raise ModelLoadError(
                f"model {name!r} has classes of its own; wanted: no classes and templates, or a "
                f"zero-shot model, such as {OPEN_CLIP}NAME/TAG"
            )

    def given_classes(self, name: str, class_names: Sequence[str] | None) -> Sequence[str]:
        """The class names for a zero-shot model.

        Raises:
            ModelLoadError: they are missing, or given as the names of existing classes.
        """
        if class_names is not None:
            raise ModelLoadError(
                f"model {name!r} has no classes that class_names could name; wanted: the names as "
                "classes (--classes)"
            )
        if self.classes is None:
            raise ModelLoadError(
                f"model {name!r} needs classes; wanted: the class names, as a list or with "
                "--classes"
            )
        return imagenet_class_names() if self.is_imagenet else self.classes

    @property
    def given_templates(self) -> Sequence[Template]:
        """The templates, or the default."""
        return DEFAULT_TEMPLATES if self.templates is None else self.templates

    @property
    def is_imagenet(self) -> bool:
        """Whether the classes are ImageNet's; two of open_clip's names for them occur twice."""
        return self.classes == "imagenet"


def load_open_clip_model(
    name: str,
    prompts: Prompts,
    class_names: Sequence[str] | None,
    weights: str | Path | None,
    device: str | torch.device,
) -> LoadedModel:
    """Loads a model of open_clip by its name, ``open_clip:NAME/TAG``.

    Raises:
        ModelLoadError: see :func:`~captum_reflected.models.load_model`.
    """
    classes = prompts.given_classes(name, class_names)
    architecture, _, tag = name.removeprefix(OPEN_CLIP).partition("/")
    if not tag and weights is None:
        raise ModelLoadError(
            f"model {name!r} names no pretrained weights; wanted: {name}/TAG, or local weights as "
            "a .safetensors file"
        )
    return _describe(
        name,
        prompts,
        lambda: ZeroShotClassifier.from_open_clip(
            architecture,
            tag or None,
            classes,
            prompts.given_templates,
            weights=weights,
            device=device,
            allow_duplicates=prompts.is_imagenet,
        ),
    )


def load_hugging_face_model(
    name: str,
    folder: Path,
    prompts: Prompts,
    class_names: Sequence[str] | None,
    device: str | torch.device,
) -> LoadedModel:
    """Loads a CLIP or SigLIP model of transformers from a folder.

    Raises:
        ModelLoadError: see :func:`~captum_reflected.models.load_model`.
    """
    classes = prompts.given_classes(name, class_names)
    return _describe(
        name,
        prompts,
        lambda: ZeroShotClassifier.from_hugging_face(
            folder,
            classes,
            prompts.given_templates,
            device=device,
            allow_duplicates=prompts.is_imagenet,
        ),
    )


def _describe(name: str, prompts: Prompts, make: Callable[[], ZeroShotClassifier]) -> LoadedModel:
    from timm.data import ImageNetInfo

    try:
        model = make()
    except ModelLoadError:
        raise
    except ValueError as error:
        raise ModelLoadError(f"cannot make model {name!r}: {error}") from error
    if model.preprocessing is None:
        raise ModelLoadError(
            f"model {name!r} has no preprocessor_config.json; wanted: also the files that "
            "AutoImageProcessor.save_pretrained writes"
        )
    return LoadedModel(
        name=name,
        model=model,
        transform=model.preprocessing.transform,
        mean=model.preprocessing.mean,
        std=model.preprocessing.std,
        num_classes=model.num_classes,
        class_names=model.class_names,
        synsets=tuple(ImageNetInfo().label_names()) if prompts.is_imagenet else None,
    )
