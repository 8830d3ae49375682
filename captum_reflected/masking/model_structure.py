"""Locates the patch projection and the blocks of a model, and the model in a function."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from typing import Any, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from captum_reflected.inputs.modules import modules_of
from captum_reflected.masking.precision import Autocast

# Dotted names of the patch projection and of the blocks: in timm, in torchvision, and in the
# classifiers of transformers, whose names have changed between versions.
_PLACES = (
    ("patch_embed.proj", "blocks"),
    ("conv_proj", "encoder.layers"),
    *(
        (f"{family}.embeddings.patch_embeddings.projection", f"{family}.{blocks}")
        for family in ("vit", "deit", "dinov2", "dinov2_with_registers", "beit")
        for blocks in ("layers", "encoder.layer")
    ),
    ("vision_model.embeddings.patch_embedding", "vision_model.encoder.layers"),
)

# Functions that were seen to do more than hand their images on to a model.
_others: WeakSet[Any] = WeakSet()


def is_in_bf16(model: Callable[..., Any]) -> TypeGuard[Autocast]:
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
        # Looked up without getattr: a compiled model hands on all names, but is not the model.
        if projection.partition(".")[0] not in model._modules:
            continue
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


def model_in(forward_func: Callable[..., Any]) -> nn.Module | None:
    """The model itself, or the first module inside a function, whose structure is known."""
    inside = _without_bf16(forward_func)
    return next((m for m in modules_of(inside) if patch_and_block_places(m) is not None), None)


def may_hand_on(forward_func: Callable[..., Any]) -> bool:
    """Whether a function may do nothing but hand its images on; false if it was seen to do more."""
    with suppress(TypeError):  # not hashable
        return _without_bf16(forward_func) not in _others
    return True


def does_more(forward_func: Callable[..., Any]) -> None:
    """Notes that a function does more than hand its images on, so that it is not tried again."""
    with suppress(TypeError):  # not hashable, or without weak references
        _others.add(_without_bf16(forward_func))


def _without_bf16(forward_func: Callable[..., Any]) -> Callable[..., Any]:
    return forward_func.model if is_in_bf16(forward_func) else forward_func
