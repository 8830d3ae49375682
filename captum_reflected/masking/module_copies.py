"""Copies of a module with some submodules replaced; the user's module is not changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from captum_reflected.masking.onednn import OneDnnLinear, can_run


def exchange(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A copy of a module with some submodules replaced; everything else is shared.

    Args:
        module: the module to copy; it is not changed.
        parts: the new submodules by dotted name, as in :meth:`~torch.nn.Module.get_submodule`.

    Returns:
        nn.Module: of the same class. Only the modules on the path to a new submodule are
        copied, and the copies share all tensors with the originals.
    """
    if "" in parts:
        return parts[""]
    inner: dict[str, dict[str, nn.Module]] = {}
    for name, part in parts.items():
        child, _, rest = name.partition(".")
        inner.setdefault(child, {})[rest] = part
    changed = copy.copy(module)
    changed._modules = {
        name: exchange(child, inner[name]) if child is not None and name in inner else child
        for name, child in module._modules.items()
    }
    return changed


def tuned(module: nn.Module, *, on_cpu: bool, bf16: bool, num_tokens: int) -> nn.Module:
    """A copy of a module for inference that uses the fastest equivalent operations.

    Args:
        module: the module to copy; it is not changed. Tensors are shared unless they are cast.
        on_cpu: whether it runs on a CPU.
        bf16: whether to compute in bfloat16.
        num_tokens: N, the number of tokens per image.

    Returns:
        nn.Module: a copy, with copies of all submodules.
    """
    if not (on_cpu or bf16):
        return module
    changed = copy.copy(module)
    changed._modules = {
        name: None
        if child is None
        else tuned(child, on_cpu=on_cpu, bf16=bf16, num_tokens=num_tokens)
        for name, child in module._modules.items()
    }
    if bf16:
        changed._parameters = {
            name: None if value is None else nn.Parameter(_cast(value), requires_grad=False)
            for name, value in module._parameters.items()
        }
        changed._buffers = {
            name: None if value is None else _cast(value) for name, value in module._buffers.items()
        }
    if not on_cpu:
        return changed
    if type(changed) is nn.Linear and can_run(changed.weight.dtype):
        changed.__class__ = OneDnnLinear
    _fuse_gelu(changed)
    # On a CPU, fused attention gains nothing from bfloat16, but two separate products do.
    if bf16 and num_tokens <= _FEW_TOKENS and getattr(module, "fused_attn", False):
        changed.__dict__["fused_attn"] = False
    return changed


def _fuse_gelu(module: nn.Module) -> None:
    """Fuses a linear layer and the GELU after it, if a (copied) module has such a pair."""
    names = _linear_and_activation().get(type(module).forward)
    if names is None:
        return
    linear, activation = (module._modules.get(name) for name in names)
    if isinstance(linear, OneDnnLinear) and type(activation) is nn.GELU:
        linear.gelu = activation.approximate
        module._modules[names[1]] = nn.Identity()


@cache
def _linear_and_activation() -> dict[Callable[..., Any], tuple[str, str]]:
    """By forward method, the names of a linear layer and of the activation after it."""
    from timm.layers import Mlp  # takes seconds to import

    return {Mlp.forward: ("fc1", "act"), nn.Sequential.forward: ("0", "1")}


def _cast(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


# With more tokens, attention maps take more memory than all other tensors of a block.
_FEW_TOKENS = 512
