"""CLIP and SigLIP models of transformers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_reflected._extras import import_extra
from captum_reflected.errors import ModelLoadError
from captum_reflected.models.dual_encoder import DualEncoder, Preprocessing
from captum_reflected.models.hub import hub_folder
from captum_reflected.models.image_processor import preprocessing_of, read_preprocessing
from captum_reflected.models.weights import reason


@dataclass(frozen=True)
class _Family:
    """The differences between the dual encoders of transformers.

    Attributes:
        image_projection: name of the layer between image tower and features, if there is one.
        text_projection: name of the layer between text tower and features, if there is one.
        padding: the tokenizer's ``padding`` that was used in training.
    """

    image_projection: str | None
    text_projection: str | None
    padding: str


FAMILIES = {
    "clip": _Family("visual_projection", "text_projection", "longest"),
    "siglip": _Family(None, None, "max_length"),
}


def load_hugging_face(
    name_or_model: str | Path | nn.Module, tokenizer: Any, device: str | torch.device
) -> DualEncoder:
    """Loads a model of transformers.

    The arguments are those of
    :meth:`~captum_reflected.models.ZeroShotClassifier.from_hugging_face`.

    Raises:
        TypeError: a model is given without its tokenizer.
        ModelLoadError: transformers is missing, the name is unknown, or the model has an
            unsupported type.
    """
    preprocessing: Preprocessing | None = None
    if isinstance(name_or_model, (str, Path)):
        transformers = _library()
        folder = _folder(name_or_model)
        model, tokenizer = _load(transformers, folder, str(name_or_model), tokenizer)
        model.to(device)
        preprocessing = read_preprocessing(folder)
    else:
        model = name_or_model
        if tokenizer is None:
            raise TypeError(
                "tokenizer is None; wanted: the tokenizer or the processor of the "
                f"{type(model).__name__} that was given"
            )
    kind = getattr(getattr(model, "config", None), "model_type", None)
    family = _family(kind, f"a {type(model).__name__}")
    image_processor = getattr(tokenizer, "image_processor", None)
    if image_processor is not None:
        preprocessing = preprocessing_of(image_processor)
    tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
    project = _layer(model, family.text_projection)

    def encode_texts(texts: list[str]) -> Tensor:
        tokens = tokenizer(
            texts,
            padding=family.padding,
            truncation=True,
            max_length=model.config.text_config.max_position_embeddings,
            return_token_type_ids=False,
            return_tensors="pt",
        ).to(model.logit_scale.device)
        with _eval_mode(model):
            features: Tensor = project(model.text_model(**tokens).pooler_output)
        return features

    bias = getattr(model, "logit_bias", None)
    return DualEncoder(
        image_tower=_ImageTower(model.vision_model, _layer(model, family.image_projection)),
        encode_texts=encode_texts,
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=0.0 if bias is None else bias.item(),
        family=model.config.model_type,
        preprocessing=preprocessing,
    )


class _ImageTower(nn.Module):
    """The image encoder of a transformers model, from images (B, C, H, W) to features (B, D)."""

    def __init__(self, vision_model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.projection = projection
        self.training = vision_model.training

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.projection(self.vision_model(pixel_values=images).pooler_output)
        return features


def _library() -> Any:
    return import_extra("transformers", "transformers", extra="clip", error=ModelLoadError)


def _folder(name: str | Path) -> Path:
    return Path(name) if isinstance(name, Path) or Path(name).is_dir() else hub_folder(name)


def _load(transformers: Any, folder: Path, name: str, tokenizer: Any) -> tuple[Any, Any]:
    path = str(folder)
    try:
        config = transformers.AutoConfig.from_pretrained(path, trust_remote_code=False)
        _family(config.model_type, repr(name))
        model = transformers.AutoModel.from_pretrained(
            path, use_safetensors=True, trust_remote_code=False
        ).float()  # transformers keeps the type of the stored weights, and images are float32
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except ModelLoadError:
        raise
    except Exception as error:  # transformers raises errors of many types
        raise ModelLoadError(
            f"cannot load {name!r}; wanted: a CLIP or SigLIP model of the hub, or a local folder "
            f"of one, with safetensors weights: {reason(error)}"
        ) from error
    return model, tokenizer


def _family(kind: str | None, given: str) -> _Family:
    if kind not in FAMILIES:
        raise ModelLoadError(
            f"{given} is a model of type {kind!r}; wanted: one of transformers' "
            f"{', '.join(FAMILIES)}"
        )
    return FAMILIES[kind]


def _layer(model: nn.Module, name: str | None) -> nn.Module:
    return nn.Identity() if name is None else model.get_submodule(name)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Sets eval mode for a block, then restores the mode of each module."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
