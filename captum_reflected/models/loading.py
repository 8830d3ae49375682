"""Loads models by name, with pretrained or local weights, preprocessing and class names."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from captum_reflected import demo
from captum_reflected._suggestions import did_you_mean
from captum_reflected.errors import ModelLoadError
from captum_reflected.models.hub import hub_folder
from captum_reflected.models.hugging_face import FAMILIES
from captum_reflected.models.hugging_face_classifier import load_classifier
from captum_reflected.models.loaded_model import LoadedModel, with_class_names
from captum_reflected.models.prompts import Template
from captum_reflected.models.timm_models import describe, load_timm, load_timm_folder
from captum_reflected.models.zero_shot_models import (
    OPEN_CLIP,
    Classes,
    Prompts,
    load_hugging_face_model,
    load_open_clip_model,
)

DEMO_MODEL = "demo"
_HUB_NAME = re.compile(r"[\w-][\w.-]*/[\w.-]+")  # OWNER/NAME
_HUB = ("hf:", "hf-hub:", "hf_hub:")  # the last two are timm's
_FOLDER = "local-dir:"  # timm's
_WEIGHTS = "model.safetensors"
_PARTS = "model.safetensors.index.json"  # of transformers, for weights in several files


def load_model(
    name: str,
    *,
    weights: str | Path | None = None,
    device: str | torch.device = "cpu",
    classes: Classes | None = None,
    templates: Sequence[Template] | None = None,
    class_names: Sequence[str] | None = None,
) -> LoadedModel:
    """Loads a classifier: of timm, open_clip, the Hugging Face hub or a folder, or the demo model.

    Only safetensors weights are read from the hub and from folders, and no code from them is run.
    Without a connection, models in the local cache still load; others raise an error in seconds.

    Args:
        name: one of

            - the name of a model of timm, such as ``"vit_base_patch16_224"``;
            - ``"hf:NAME"`` or ``"hf:NAME@REVISION"``, a model of the Hugging Face hub, such as
              ``"hf:google/vit-base-patch16-224"``;
            - a folder, as ``save_pretrained`` of transformers or ``save_for_hf`` of timm writes
              it. ``"./NAME"`` is a folder even if timm has a model of that name;
            - ``"open_clip:NAME/TAG"``, such as ``"open_clip:ViT-B-32/openai"``;
            - ``"demo"``, the small model that is part of this package.

            A model of transformers is an image classifier, or CLIP or SigLIP as a zero-shot
            classifier.
        weights: a local ``.safetensors`` file with a state dict for a model of timm or
            open_clip; for timm, the number of classes may differ. ``None`` downloads the
            pretrained weights. With a file, the tag of an open_clip model is optional; it then
            selects the activation and the preprocessing.
        device: the device of the model.
        classes: the class names for a zero-shot classifier, which has none of its own;
            ``"imagenet"`` for ImageNet's 1000 classes with open_clip's names.
        templates: texts with ``{}`` for the class name; see
            :meth:`~captum_reflected.models.ZeroShotClassifier.from_open_clip`. ``None`` uses
            its default.
        class_names: the names of the classes, in the model's order, if the model does not know
            them or has wrong ones, such as ImageNet's for 1000 other classes. See
            :func:`read_class_names`.

    Returns:
        LoadedModel: in eval mode.

    Raises:
        ModelLoadError: the name is unknown; the weights are missing, or have another format or
            belong to another model; or the classes are invalid, missing or not supported.
    """
    prompts = Prompts(classes, templates)
    if name.startswith(OPEN_CLIP):
        return load_open_clip_model(name, prompts, class_names, weights, device)
    folder = _folder(name, weights)
    if folder is not None:
        config = _read_config(folder, name)
        if _is_zero_shot(config):
            return load_hugging_face_model(name, folder, prompts, class_names, device)
        prompts.refuse(name)
        load = load_timm_folder if _is_of_timm(config) else load_classifier
        loaded = load(folder, name)
    else:
        prompts.refuse(name)
        loaded = (
            _load_demo(weights)
            if name == DEMO_MODEL
            else load_timm(name, None if weights is None else Path(weights))
        )
    if class_names is not None:
        loaded = with_class_names(loaded, class_names)
    return replace(loaded, model=loaded.model.to(device))


def _folder(name: str, weights: str | Path | None) -> Path | None:
    """The folder that a name stands for, after a download if necessary; else ``None``."""
    import timm

    hub = next((prefix for prefix in _HUB if name.startswith(prefix)), None)
    path = Path(name.removeprefix(_FOLDER)).expanduser()
    is_path = name.startswith(_FOLDER) or "/" in name or os.sep in name or path.exists()
    if hub is None and (not is_path or name == DEMO_MODEL or timm.is_model(name)):
        return None
    if weights is not None:
        raise ModelLoadError(
            f"weights is {weights}; wanted: none, since model {name!r} has its own weights"
        )
    if hub is not None:
        return hub_folder(name.removeprefix(hub))
    if path.is_dir():
        return path
    if path.exists():
        raise ModelLoadError(
            f"model {name!r} is a file; wanted: a folder with its config.json, or the name of a "
            "model, and the file as its weights (--weights)"
        )
    beside = (
        [one.name for one in path.parent.iterdir() if one.is_dir()] if path.parent.is_dir() else []
    )
    on_hub = f", or hf:{name} for a model of the hub" if _HUB_NAME.fullmatch(name) else ""
    raise ModelLoadError(
        f"there is no folder {name!r}; wanted: a folder with a model of transformers or timm"
        f"{on_hub}{did_you_mean(path.name, beside)}"
    )


def _read_config(folder: Path, name: str) -> dict[str, Any]:
    """The configuration of the model in a folder that also holds its safetensors weights."""
    file = folder / "config.json"
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelLoadError(
            f"cannot read {file} of model {name!r} ({error}); wanted: a folder as save_pretrained "
            "of transformers or save_for_hf of timm writes it"
        ) from error
    if not isinstance(config, dict):
        raise ModelLoadError(f"{file} of model {name!r} is no JSON object")
    files = [_WEIGHTS] if _is_of_timm(config) else [_WEIGHTS, _PARTS]
    if not any((folder / one).is_file() for one in files):
        raise ModelLoadError(
            f"model {name!r} has no {_WEIGHTS} in {folder}; wanted: safetensors weights, since "
            "other formats are pickles, which can run code"
        )
    return config


def _is_of_timm(config: dict[str, Any]) -> bool:
    """Whether this is timm's own configuration, or that of transformers' wrapper of timm."""
    return "architecture" in config


def _is_zero_shot(config: dict[str, Any]) -> bool:
    """Whether this is the configuration of an image-text model without a trained classifier."""
    trained_as = str((config.get("architectures") or [""])[0])
    return config.get("model_type") in FAMILIES and "ForImageClassification" not in trained_as


def _load_demo(weights: str | Path | None) -> LoadedModel:
    if weights is not None:
        raise ModelLoadError(
            f"weights is {weights}; wanted: none, since model {DEMO_MODEL!r} has its own weights"
        )
    return describe(DEMO_MODEL, demo.load_model(), demo.CLASS_NAMES, None)
