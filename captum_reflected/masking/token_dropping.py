"""Checks if tokens can be left out of a model's sequence.

A test run cannot show this: leaving tokens out changes the output. Every part of the model has to
be of a known class, which computes each token by itself or by attention to all others.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from functools import cache
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from captum_reflected.masking.model_structure import (
    blocks_of,
    may_hand_on,
    model_in,
    runs_as_written,
)
from captum_reflected.masking.precision import Autocast

# Modules of transformers: the attribute that holds the encoder, and the prefix of class names.
_FAMILIES = {
    "transformers.models.vit.modeling_vit": ("vit", "ViT"),
    "transformers.models.deit.modeling_deit": ("deit", "DeiT"),
    "transformers.models.dinov2.modeling_dinov2": ("dinov2", "Dinov2"),
}
_CLASSIFIERS = "ForImageClassification ForImageClassificationWithTeacher"
_PARTS = (
    "Attention DropPath Embeddings Encoder Intermediate Layer LayerScale MLP Model Output "
    "PatchEmbeddings SdpaAttention SdpaSelfAttention SelfAttention SelfOutput SwiGLUFFN"
)
_ACTIVATIONS = (
    "FastGELUActivation GELUActivation GELUTanh NewGELUActivation PytorchGELUTanh "
    "QuickGELUActivation SiLUActivation"
)
# With other implementations of attention, or a mask, nobody has looked at shorter sequences.
_ATTENTION = ("eager", "sdpa")


# timm and torchvision take seconds to import, and other models need neither.
@cache
def _known_parts() -> frozenset[type]:
    """The module classes that do not depend on the number or the positions of the tokens.

    Tokens can be left out of a model if it consists of these classes only.
    """
    import timm.layers
    from timm.models import deit
    from timm.models import vision_transformer as timm_vit
    from torchvision.models import vision_transformer as torchvision_vit

    classes = {
        nn: (
            "Conv2d Dropout GELU Identity LayerNorm Linear MultiheadAttention ReLU RMSNorm "
            "Sequential SiLU Tanh"
        ),
        timm.layers: (
            "AttentionPoolLatent DropPath GELU GELUTanh GluMlp LayerNorm LayerNormFp32 "
            "LayerScale Mlp PatchEmbed QuickGELU RmsNorm RmsNormFp32 SwiGLU"
        ),
        timm_vit: "Attention Block LayerScale VisionTransformer",
        deit: "VisionTransformerDistilled",
        torchvision_vit: "Encoder EncoderBlock MLPBlock VisionTransformer",
    }
    # Some versions of timm lack some of them.
    found = (
        getattr(module, name, None) for module, names in classes.items() for name in names.split()
    )
    return _present(found) | {NonDynamicallyQuantizableLinear}


@cache
def _selection_places() -> dict[type, str]:
    """By model class, the module between position embedding and blocks that selects tokens."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import VisionTransformer as TorchvisionTransformer

    return {
        VisionTransformer: "patch_drop",
        VisionTransformerDistilled: "patch_drop",
        TorchvisionTransformer: "encoder.dropout",
    }


@cache
def _known_parts_of_transformers(family: str) -> frozenset[type]:
    """The same as :func:`_known_parts`, for a module of transformers that has been imported."""
    prefix = _FAMILIES[family][1]
    found = [
        getattr(sys.modules[family], f"{prefix}{name}", None)
        for name in f"{_CLASSIFIERS} {_PARTS}".split()
    ]
    activations = sys.modules.get("transformers.activations")
    found += [getattr(activations, name, None) for name in _ACTIVATIONS.split()]
    return _present(found) | {nn.ModuleList, *(part for part in _known_parts() if _is_torchs(part))}


def _is_torchs(part: type) -> bool:
    return part.__module__.startswith("torch.")


def _present(parts: Iterable[type | None]) -> frozenset[type]:
    return frozenset(part for part in parts if part is not None)


def selection_place(model: nn.Module) -> str | None:
    """The module of a model that can select tokens; None if the class of the model is not known."""
    kind = type(model)
    family, prefix = _FAMILIES.get(kind.__module__, ("", ""))
    if prefix and kind.__name__ in [f"{prefix}{name}" for name in _CLASSIFIERS.split()]:
        return f"{family}.embeddings.dropout"
    return None if prefix else _selection_places().get(kind)


def droppable_model(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The model in a function, if all its module classes are known to work on fewer tokens."""
    model = model_in(forward_func)
    place = None if model is None else selection_place(model)
    if model is None or place is None:
        return None
    family = type(model).__module__
    is_of_transformers = family in _FAMILIES
    parts = _known_parts_of_transformers(family) if is_of_transformers else _known_parts()
    blocks = blocks_of(model)
    is_known = (
        len(set(blocks)) == len(blocks)
        and type(model.get_submodule(place)) in (nn.Identity, nn.Dropout)
        and all(type(module) in parts for module in model.modules())
        and not (is_of_transformers and any(map(_attends_in_another_way, model.modules())))
    )
    return model if is_known else None


def _attends_in_another_way(module: nn.Module) -> bool:
    """Whether a module of transformers is told to attend otherwise than all tokens to all."""
    config = getattr(module, "config", None)
    return (
        getattr(module, "is_causal", False)
        or getattr(config, "is_causal", False)
        or (config is not None and getattr(config, "_attn_implementation", None) not in _ATTENTION)
    )


def can_drop_tokens(forward_func: Callable[..., Any], images: Tensor) -> bool:
    """Whether tokens can be left out of a model's sequences, as far as can be told without a run.

    A function that is not the model itself may still turn out to do more than call it.
    """
    model = droppable_model(forward_func)
    return (
        model is not None
        and may_hand_on(forward_func)
        and runs_as_written(model, images)
        and not (isinstance(forward_func, Autocast) and not runs_as_written(forward_func, images))
    )
