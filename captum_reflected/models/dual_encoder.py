"""An image encoder and a text encoder that were trained together, from any library."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image

RECOMMENDED_LAST_LAYERS = {"clip": 1}
"""Number of last attention layers to roll out, by family; all layers if a family is not listed.

This is a convention, not the result of a measurement: the CLIP notebook that Chefer et al.
published starts the roll-out at the last block of ViT-B/32 (``start_layer = -1`` there).
"""

# Dotted names of the attention layers in image towers of open_clip, of timm inside open_clip, and
# of transformers.
_BLOCKS = ("transformer.resblocks", "trunk.blocks", "vision_model.encoder.layers")


@dataclass(frozen=True)
class Preprocessing:
    """The preprocessing that an image tower expects.

    Attributes:
        transform: a function from a PIL image to a (C, H, W) tensor.
        mean: (C,), the mean that ``transform`` subtracts.
        std: (C,), the standard deviation that ``transform`` divides by.
    """

    transform: Callable[[Image.Image], Tensor]
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class DualEncoder:
    """The components of a zero-shot classifier.

    Attributes:
        image_tower: a module from images (B, C, H, W) to features (B, D).
        encode_texts: a function from texts to features (number of texts, D).
        logit_scale: factor of the cosine similarities.
        logit_bias: number that is added to them.
        family: ``"clip"`` or ``"siglip"``.
        preprocessing: the preprocessing of images, if the library provides it.
    """

    image_tower: nn.Module
    encode_texts: Callable[[list[str]], Tensor]
    logit_scale: float
    logit_bias: float
    family: str
    preprocessing: Preprocessing | None = None

    @property
    def recommended_start_layer(self) -> int:
        """The ``start_layer`` by :data:`RECOMMENDED_LAST_LAYERS`; 0 for other families."""
        last_layers = RECOMMENDED_LAST_LAYERS.get(self.family)
        if last_layers is None:
            return 0
        for path in _BLOCKS:
            try:
                blocks = self.image_tower.get_submodule(path)
            except AttributeError:
                continue
            return max(0, len(list(blocks.children())) - last_layers)
        return 0
