"""Locates the patch projection and the blocks of a model; checks if tokens can be left out."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cache
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from captum_reflected.masking.precision import Autocast

# Dotted names of the patch projection and of the blocks, in timm and in torchvision.
_PLACES = (("patch_embed.proj", "blocks"), ("conv_proj", "encoder.layers"))


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
    return frozenset(part for part in found if part is not None) | {NonDynamicallyQuantizableLinear}


@cache
def token_selection_places() -> dict[type, str]:
    """By model class, the module between position embedding and blocks that selects tokens."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import VisionTransformer as TorchvisionTransformer

    return {
        VisionTransformer: "patch_drop",
        VisionTransformerDistilled: "patch_drop",
        TorchvisionTransformer: "encoder.dropout",
    }


def is_in_bf16(model: nn.Module) -> TypeGuard[Autocast]:
    """Whether a model is this package's wrapper that runs another model in bfloat16."""
    return type(model) is Autocast and model.dtype == torch.bfloat16


def runs_as_written(model: nn.Module, images: Tensor) -> bool:
    """Whether the model runs without hooks, modes, autocast or replaced methods.

    The code of its classes then fully determines what it computes.
    """
    try:
        return not (
            torch._C._len_torch_function_stack()
            or torch.is_autocast_enabled(images.device.type)
            or global_hooks._global_forward_hooks
            or global_hooks._global_forward_pre_hooks
            or global_hooks._global_backward_hooks
            or global_hooks._global_backward_pre_hooks
            or any(_is_modified(module) for module in model.modules())
        )
    except AttributeError:  # a version of torch that stores one of these elsewhere
        return False


def _is_modified(module: nn.Module) -> bool:
    return bool(
        module.training
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or isinstance(module, torch.jit.ScriptModule)
        or any(
            callable(value) and hasattr(type(module), name) for name, value in vars(module).items()
        )
    )


def patch_and_block_places(model: nn.Module) -> tuple[str, str] | None:
    """Dotted names of a model's patch projection and of its blocks; None if not found."""
    for projection, blocks in _PLACES:
        with suppress(AttributeError):
            model.get_submodule(blocks)
            project = model.get_submodule(projection)
            if isinstance(project, nn.Conv2d) and project.kernel_size == project.stride:
                return projection, blocks
    return None


def named_children_of(model: nn.Module, path: str) -> dict[str, nn.Module]:
    """The children of a submodule by name, including a module that occurs twice."""
    children = model.get_submodule(path)._modules.items()
    return {name: child for name, child in children if child is not None}


def tokens_read(model: nn.Module, blocks: str) -> int | None:
    """The number of first tokens that the output is read from; ``None``: possibly all tokens."""
    if getattr(model, "global_pool", None) != "token":
        return None
    from timm.models.vision_transformer import Block

    last = next(reversed(named_children_of(model, blocks).values()), None)
    return getattr(model, "num_prefix_tokens", None) if type(last) is Block else None


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks of a model in forward order; empty if they are not found."""
    places = patch_and_block_places(model) if isinstance(model, nn.Module) else None
    return [] if places is None else list(named_children_of(model, places[1]).values())


def can_drop_tokens(forward_func: Callable[..., Any], images: Tensor) -> bool:
    """Whether tokens can be left out of a model's sequences: all its module classes are known."""
    if not (isinstance(forward_func, nn.Module) and runs_as_written(forward_func, images)):
        return False
    model = forward_func.model if is_in_bf16(forward_func) else forward_func
    if type(model) not in token_selection_places():
        return False
    blocks = blocks_of(model)
    return (
        len(set(blocks)) == len(blocks)
        and type(model.get_submodule(token_selection_places()[type(model)]))
        in (nn.Identity, nn.Dropout)
        and all(type(module) in _known_parts() for module in model.modules())
    )
