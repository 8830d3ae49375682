"""Models of timm."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from captum_reflected._suggestions import did_you_mean
from captum_reflected.errors import ModelLoadError
from captum_reflected.models.hub import cached_file, hub_problem, unreachable
from captum_reflected.models.loaded_model import LoadedModel
from captum_reflected.models.weights import check_weights_file, reason

_INSTEAD = "local weights (--weights FILE.safetensors)"
# Before the names of the weights that transformers' wrapper of timm writes.
_WRAPPER = "timm_model."
_SYNSET = re.compile(r"n\d{8}")


def load_timm(name: str, weights: Path | None) -> LoadedModel:
    """Loads a model of timm, on the CPU.

    Args:
        name: of the model, with or without its pretrained tag.
        weights: a local file; ``None`` for the pretrained weights.

    Raises:
        ModelLoadError: the name is unknown, or the weights are missing, have another format or
            belong to another model.
    """
    import timm

    _check_name(name)
    if weights is None:
        options, given = _pretrained(name), "its pretrained weights"
    else:
        options, given = _local_weights(name, weights), f"the weights {weights}"
    hint = f"; wanted: {_INSTEAD}" if weights is None else ""
    model = _create(lambda: timm.create_model(name, pretrained=True, **options), name, given, hint)
    return describe(name, model, *_imagenet(model))


def load_timm_folder(folder: Path, name: str) -> LoadedModel:
    """Loads a model of timm from a folder, on the CPU.

    Args:
        folder: as ``save_for_hf`` of timm or transformers' wrapper of timm writes it, with the
            configuration and ``model.safetensors``.
        name: of the model, for errors and for the result.

    Raises:
        ModelLoadError: the folder holds no such model.
    """

    def make() -> nn.Module:
        import timm
        from safetensors import safe_open

        with safe_open(folder / "model.safetensors", framework="pt") as stored:
            keys = list(stored.keys())
            prefix = _WRAPPER if all(key.startswith(_WRAPPER) for key in keys) else ""
            # timm itself reads the file of a folder as a pickle in some versions.
            model: nn.Module = timm.create_model(f"local-dir:{folder}", pretrained=False)
            model.load_state_dict(
                {key.removeprefix(prefix): stored.get_tensor(key) for key in keys}
            )
        return model

    model = _create(make, name, f"the weights in {folder}")
    return describe(name, model, *(_own_names(model) or _imagenet(model)))


def describe(
    name: str,
    model: nn.Module,
    class_names: tuple[str, ...] | None,
    synsets: tuple[str, ...] | None,
) -> LoadedModel:
    """A model with timm's configuration of the preprocessing, in eval mode."""
    from timm.data import create_transform, resolve_model_data_config

    config = resolve_model_data_config(model)
    num_classes: Any = model.num_classes
    return LoadedModel(
        name=name,
        model=model.eval(),
        transform=create_transform(**config, is_training=False),
        mean=torch.tensor(config["mean"]),
        std=torch.tensor(config["std"]),
        num_classes=num_classes,
        class_names=class_names,
        synsets=synsets,
    )


def _create(make: Callable[[], nn.Module], name: str, given: str, hint: str = "") -> nn.Module:
    try:
        return make()
    except Exception as error:  # timm and the hub client raise errors of many types
        raise ModelLoadError(
            f"cannot load {given} into model {name!r}: {reason(error)}{hint}"
        ) from error


def _check_name(name: str) -> None:
    import timm

    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        raise ModelLoadError(
            f"unknown model {name!r}; wanted: a name that timm knows, open_clip:NAME/TAG, hf:NAME "
            "or a folder with a model of transformers or timm"
            f"{did_you_mean(architecture, ['demo', *timm.list_models()])}"
        )
    try:
        timm.get_pretrained_cfg(name)
    except RuntimeError:  # the tag is unknown
        known = timm.list_pretrained(f"{architecture}.*")
        raise ModelLoadError(
            f"unknown model {name!r}; wanted: {architecture} with one of its pretrained tags "
            f"({', '.join(one.partition('.')[2] for one in known) or 'it has none'})"
            f"{did_you_mean(name, known)}"
        ) from None


def _pretrained(name: str) -> dict[str, Any]:
    """Options for timm's own pretrained loading: none, if it can download the weights.

    timm would ask an unreachable hub for minutes before it looks into the cache. The few weights
    that are not on the hub are left to timm.
    """
    import timm

    config = timm.get_pretrained_cfg(name)
    repository = getattr(config, "hf_hub_id", None)
    if config is None or repository is None:
        return {}
    problem = hub_problem()
    if problem is None:
        return {}
    file = config.hf_hub_filename or "pytorch_model.bin"
    safe = "model.safetensors" if file == "pytorch_model.bin" else f"{Path(file).stem}.safetensors"
    for candidate in (safe, file):
        path = cached_file(repository, candidate)
        if path is not None:
            return {"pretrained_cfg_overlay": {"file": str(path), "custom_load": False}}
    raise unreachable(f"the weights of model {name!r}, {safe} of {repository}", problem, _INSTEAD)


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


def _imagenet(model: nn.Module) -> tuple[tuple[str, ...] | None, tuple[str, ...] | None]:
    """Names and synsets of ImageNet's classes, if the model has as many as a version of it."""
    from timm.data import ImageNetInfo, infer_imagenet_subset

    subset = infer_imagenet_subset(model)
    if subset is None:
        return None, None
    imagenet = ImageNetInfo(subset)
    return tuple(imagenet.label_descriptions()), tuple(imagenet.label_names())


def _own_names(model: nn.Module) -> tuple[tuple[str, ...], tuple[str, ...] | None] | None:
    """Names of the classes in the model's configuration, and their synsets if they have some."""
    config: Any = model.pretrained_cfg
    labels = config.get("label_names")
    if not isinstance(labels, Sequence) or len(labels) != model.num_classes:
        return None
    described = config.get("label_descriptions")
    if isinstance(described, dict):
        names = tuple(str(described.get(label, label)) for label in labels)
    elif isinstance(described, Sequence) and len(described) == len(labels):
        names = tuple(map(str, described))
    else:
        names = tuple(map(str, labels))
    are_synsets = all(_SYNSET.fullmatch(str(label)) for label in labels)
    return names, tuple(map(str, labels)) if are_synsets else None
