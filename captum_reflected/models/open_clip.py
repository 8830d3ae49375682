"""Models of open_clip."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from captum_reflected._extras import import_extra
from captum_reflected._suggestions import did_you_mean
from captum_reflected.errors import ModelLoadError
from captum_reflected.models.dual_encoder import DualEncoder, Preprocessing
from captum_reflected.models.hub import hub_file
from captum_reflected.models.weights import check_weights_file, reason


def imagenet_class_names() -> tuple[str, ...]:
    """open_clip's names of ImageNet's 1000 classes, which are suited to text encoders."""
    return tuple(_library().IMAGENET_CLASSNAMES)


def load_open_clip(
    name: str,
    pretrained: str | Path | None,
    *,
    weights: str | Path | None,
    device: str | torch.device,
) -> DualEncoder:
    """Loads a model of open_clip in eval mode.

    The arguments are those of :meth:`~captum_reflected.models.ZeroShotClassifier.from_open_clip`.

    Raises:
        ModelLoadError: open_clip is missing, the name is unknown, or the weights are missing,
            have another format or belong to another model.
    """
    open_clip = _library()
    if name not in open_clip.list_models():
        raise ModelLoadError(
            f"unknown model {name!r}; wanted: one of open_clip.list_models()"
            f"{did_you_mean(name, open_clip.list_models())}"
        )
    config, file = _weights(open_clip, name, pretrained, weights)
    try:
        model, _, transform = open_clip.create_model_and_transforms(
            name,
            None if file is None else str(file),
            force_quick_gelu=config.get("quick_gelu", False),
            image_mean=config.get("mean"),
            image_std=config.get("std"),
            image_interpolation=config.get("interpolation"),
            image_resize_mode=config.get("resize_mode"),
            pretrained_text=False,
            device=device,
        )
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # open_clip, torch and safetensors raise errors of many types
        given = "random weights" if file is None else f"the weights {file}"
        raise ModelLoadError(f"cannot make model {name!r} with {given}: {reason(error)}") from error
    model.eval()
    model.visual.output_tokens = False  # else CoCa's image tower also returns its tokens
    bias = getattr(model, "logit_bias", None)
    return DualEncoder(
        image_tower=model.visual,
        encode_texts=lambda texts: model.encode_text(tokenizer(texts).to(device)),
        logit_scale=model.logit_scale.exp().item(),
        logit_bias=0.0 if bias is None else bias.item(),
        family="clip" if bias is None else "siglip",
        preprocessing=Preprocessing(
            transform,
            torch.tensor(model.visual.preprocess_cfg["mean"]),
            torch.tensor(model.visual.preprocess_cfg["std"]),
        ),
    )


def _library() -> Any:
    return import_extra("open_clip", "open_clip_torch", extra="clip", error=ModelLoadError)


def _weights(
    open_clip: Any, name: str, pretrained: str | Path | None, weights: str | Path | None
) -> tuple[dict[str, Any], Path | None]:
    """open_clip's configuration of a pretrained tag, and the safetensors file to load."""
    config: dict[str, Any] = {}
    if isinstance(pretrained, str):
        config = open_clip.get_pretrained_cfg(name, pretrained)
    if pretrained is not None and not config:
        if weights is not None or Path(pretrained).suffix != ".safetensors":
            tags = open_clip.list_pretrained_tags_by_model(name)
            raise ModelLoadError(
                f"pretrained is {str(pretrained)!r}; wanted: a tag of model {name!r} "
                f"({', '.join(tags) or 'it has none'})"
                f"{'' if weights is not None else ', or a local .safetensors file'}"
                f"{did_you_mean(str(pretrained), tags)}"
            )
        weights = pretrained
    if weights is not None:
        check_weights_file(Path(weights))
        return config, Path(weights)
    return config, _download(config) if config else None


def _download(config: dict[str, Any]) -> Path:
    """Downloads the safetensors file of a tag; open_clip would fall back to a pickle file."""
    repository, _, file = config["hf_hub"].rpartition("/")
    file = Path(file).with_suffix(".safetensors").name if file else "open_clip_model.safetensors"
    return hub_file(repository, file, instead="local weights as a .safetensors file (--weights)")
