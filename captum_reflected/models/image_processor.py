"""The image processors of transformers as functions from a picture to a model's input."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from captum_reflected._extras import import_extra
from captum_reflected.errors import ModelLoadError
from captum_reflected.models.dual_encoder import Preprocessing
from captum_reflected.models.weights import reason

if TYPE_CHECKING:
    from PIL import Image

# transformers looks for the image processor of a model in these files.
_FILES = ("preprocessor_config.json", "processor_config.json")
# Differs in all channels, to detect a processor that exchanges or mixes them.
_BLUE = (51, 102, 204)
_BLACK, _WHITE = (0, 0, 0), (255, 255, 255)


@dataclass(frozen=True)
class ProcessorTransform:
    """An image processor of transformers, called with one picture.

    Attributes:
        processor: the image processor.
    """

    processor: Any

    def __call__(self, picture: Image.Image) -> Tensor:
        """The model's input (C, H, W) for a picture, which is converted to RGB."""
        images = self.processor(images=picture.convert("RGB"), return_tensors="pt")
        image: Tensor = images["pixel_values"][0]
        return image


def read_preprocessing(folder: Path) -> Preprocessing | None:
    """The preprocessing in a model's folder, or ``None`` if it has none.

    Raises:
        ModelLoadError: transformers is missing, or cannot read it.
    """
    if not any((folder / file).is_file() for file in _FILES):
        return None
    transformers = import_extra("transformers", "transformers", extra="clip", error=ModelLoadError)
    try:
        processor = transformers.AutoImageProcessor.from_pretrained(
            str(folder), trust_remote_code=False
        )
    except Exception as error:  # transformers raises errors of many types
        raise ModelLoadError(
            f"cannot read the image processor in {folder}: {reason(error)}"
        ) from error
    return preprocessing_of(processor)


def preprocessing_of(processor: Any) -> Preprocessing:
    """The preprocessing that an image processor of transformers does.

    Mean and standard deviation are measured on a black, a blue and a white picture, since
    processors name and combine their steps in different ways.

    Raises:
        ModelLoadError: its output is no RGB image, or not a linear function of each colour.
    """
    transform = ProcessorTransform(processor)
    black, blue, white = (_colour_after(transform, rgb) for rgb in (_BLACK, _BLUE, _WHITE))
    scale = white - black
    expected = black + scale * torch.tensor(_BLUE) / 255
    if not torch.allclose(blue, expected, atol=1e-3) or bool((scale <= 0).any()):
        raise ModelLoadError(
            f"the image processor {type(processor).__name__} turns black, the colour {_BLUE} and "
            f"white into {black.tolist()}, {blue.tolist()} and {white.tolist()}; wanted: red, "
            "green and blue in this order, each a linear function of itself"
        )
    return Preprocessing(transform, mean=-black / scale, std=1 / scale)


def _colour_after(transform: ProcessorTransform, rgb: tuple[int, int, int]) -> Tensor:
    """What remains in the centre of a picture of one colour, (C,)."""
    from PIL import Image

    image = transform(Image.new("RGB", (320, 320), rgb))
    if not isinstance(image, Tensor) or image.dim() != 3 or image.shape[0] != 3:
        found = tuple(image.shape) if isinstance(image, Tensor) else type(image).__name__
        raise ModelLoadError(
            f"the image processor {type(transform.processor).__name__} turns a picture into "
            f"{found}; wanted: a tensor (3, H, W)"
        )
    return image[:, image.shape[1] // 2, image.shape[2] // 2].float()
