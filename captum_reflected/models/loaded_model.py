"""A classifier with its preprocessing and its class names."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import Tensor, nn

from captum_reflected.errors import ModelLoadError
from captum_reflected.inputs.pictures import PictureScale
from captum_reflected.models.class_names import imagenet_synsets
from captum_reflected.models.prompts import check_names

if TYPE_CHECKING:
    from PIL import Image


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
        return PictureScale(self.mean.view(-1, 1, 1), self.std.view(-1, 1, 1))(images)


def with_class_names(loaded: LoadedModel, class_names: Sequence[str]) -> LoadedModel:
    """The same model with other class names.

    The synsets are those of the new names, if these are ImageNet's: a model with 1000 classes
    need not have been trained on ImageNet.

    Raises:
        ModelLoadError: the names are no texts, or not as many as the classes.
    """
    try:
        names = check_names(class_names, allow_duplicates=True)
    except (TypeError, ValueError) as error:
        raise ModelLoadError(str(error)) from error
    if len(names) != loaded.num_classes:
        raise ModelLoadError(
            f"class_names has {len(names)} name(s), but model {loaded.name!r} has "
            f"{loaded.num_classes} classes; wanted: one name for each class"
        )
    return replace(loaded, class_names=names, synsets=imagenet_synsets(names))
