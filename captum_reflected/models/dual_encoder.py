"""An image encoder and a text encoder that were trained together, whatever library has them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from PIL import Image

RECOMMENDED_LAST_LAYERS = {"clip": 1}
"""Last attention layers to roll out, by family; all of them where a family is not listed.

A convention, not a measurement of ours: the CLIP notebook that Chefer et al. published
starts the roll-out at the last block of ViT-B/32 (there ``start_layer = -1``).
"""

# Where image towers keep their attention layers: open_clip's own, timm's inside open_clip,
# and those of transformers.
_BLOCKS = ("transformer.resblocks", "trunk.blocks", "vision_model.encoder.layers")


@dataclass(frozen=True)
class Preprocessing:
    """How an image tower wants its images.

    Attributes:
        transform: a PIL image to a (C, H, W) tensor.
        mean: (C,), subtracted by ``transform``.
        std: (C,), divided by in ``transform``.
    """

    transform: Callable[[Image.Image], Tensor]
    mean: Tensor
    std: Tensor


@dataclass(frozen=True)
class DualEncoder:
    """What a zero-shot classifier is made of.

    Attributes:
        image_tower: images (B, C, H, W) to features (B, D).
        encode_texts: texts to features (number of texts, D).
        logit_scale: what cosine similarities are multiplied by.
        logit_bias: what is added to them.
        family: ``"clip"`` or ``"siglip"``.
        preprocessing: how images become inputs, where the library says so.
    """

    image_tower: nn.Module
    encode_texts: Callable[[list[str]], Tensor]
    logit_scale: float
    logit_bias: float
    family: str
    preprocessing: Preprocessing | None = None

    @property
    def recommended_start_layer(self) -> int:
        """The ``start_layer`` that :data:`RECOMMENDED_LAST_LAYERS` gives; 0 where it has none."""
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
