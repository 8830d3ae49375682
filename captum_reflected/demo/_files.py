"""The shipped model and the shipped sample of scenes: writing and reading their files."""

from __future__ import annotations

import json
from importlib.resources import as_file, files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from captum_reflected.demo.scenes import CLASS_NAMES, Scenes

if TYPE_CHECKING:
    from timm.models.vision_transformer import VisionTransformer

MODEL_FILE = "model.safetensors"
SCENES_FOLDER = "scenes"
MEAN = STD = (0.5, 0.5, 0.5)


def preprocess(images: Tensor) -> Tensor:
    """Turns pictures into the model's input: mean and standard deviation 0.5 a channel.

    Args:
        images: Colour pictures, uint8, shape ``(S, 3, H, W)``.

    Returns:
        Values in [-1, 1], float32, shape ``(S, 3, H, W)``.
    """
    return images.to(torch.float32) / 127.5 - 1.0


def build_model(architecture: dict[str, int]) -> VisionTransformer:
    """Builds the model, with fresh weights, and tells timm how its input is prepared.

    Args:
        architecture: The keyword arguments of timm's ``VisionTransformer``.

    Returns:
        The model, in training mode.
    """
    from timm.models.vision_transformer import VisionTransformer

    model = VisionTransformer(**architecture)
    side = architecture["img_size"]
    model.pretrained_cfg = model.default_cfg = {
        "input_size": (3, side, side),
        "mean": MEAN,
        "std": STD,
        "crop_pct": 1.0,
        "interpolation": "bicubic",
        "num_classes": architecture["num_classes"],
        "label_names": CLASS_NAMES,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }
    return model


def save_model(
    model: VisionTransformer, architecture: dict[str, int], facts: dict[str, Any], folder: Path
) -> None:
    """Writes weights, architecture and the facts of the training run into one file.

    Args:
        model: The trained model.
        architecture: What :func:`build_model` built it from.
        facts: Further figures to keep with the weights.
        folder: An existing folder, which receives ``model.safetensors``.
    """
    from safetensors.torch import save_file

    metadata = {"architecture": json.dumps(architecture)}
    metadata |= {name: str(value) for name, value in facts.items()}
    save_file(model.state_dict(), folder / MODEL_FILE, metadata)


def load_model() -> VisionTransformer:
    """Loads the shipped Vision Transformer, which names the texture in a scene.

    Nothing is unpickled and nothing is downloaded.

    Returns:
        The model in evaluation mode, float32 on the CPU. It takes ``(S, 3, 96, 96)`` from
        :func:`preprocess` and gives logits of shape ``(S, 10)``, one per name in
        ``CLASS_NAMES``.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    with as_file(files(__package__) / MODEL_FILE) as path:
        with safe_open(path, framework="pt") as stored:
            architecture = json.loads(stored.metadata()["architecture"])
        model = build_model(architecture)
        model.load_state_dict(load_file(path))
    return model.eval()


def save_scenes(scenes: Scenes, folder: Path) -> None:
    """Writes every scene as a picture and a mask, both lossless PNG.

    Args:
        scenes: ``S`` scenes.
        folder: An existing folder; its subfolder ``scenes`` receives ``NN-<class>.png`` and
            ``NN-<class>.mask.png``.
    """
    target = folder / SCENES_FOLDER
    target.mkdir(exist_ok=True)
    for index, label in enumerate(scenes.labels.tolist()):
        stem = f"{index:02d}-{_dashed(CLASS_NAMES[label])}"
        picture = scenes.images[index].permute(1, 2, 0).numpy()
        Image.fromarray(picture).save(target / f"{stem}.png", optimize=True)
        Image.fromarray(scenes.masks[index].numpy()).save(
            target / f"{stem}.mask.png", optimize=True
        )


def load_scenes() -> Scenes:
    """Loads the shipped scenes, two a class, on which the model was never trained.

    Returns:
        Twenty scenes of 96 x 96 pixels, in the order of their file names.
    """
    labels_by_name = {_dashed(name): label for label, name in enumerate(CLASS_NAMES)}
    images, masks, labels = [], [], []
    with as_file(files(__package__) / SCENES_FOLDER) as folder:
        for mask_path in sorted(folder.glob("*.mask.png")):
            stem = mask_path.name.removesuffix(".mask.png")
            with Image.open(folder / f"{stem}.png") as picture, Image.open(mask_path) as mask:
                images.append(np.asarray(picture.convert("RGB")).transpose(2, 0, 1))
                masks.append(np.asarray(mask.convert("1")))
            labels.append(labels_by_name[stem.partition("-")[2]])
    return Scenes(
        torch.from_numpy(np.stack(images)),
        torch.from_numpy(np.stack(masks)),
        torch.tensor(labels),
    )


def _dashed(name: str) -> str:
    return name.replace(" ", "-")
