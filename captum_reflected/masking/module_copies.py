"""Copies of a module with some submodules replaced; the user's module is not changed."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


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
    if type(changed) is nn.Linear and _one_dnn_supports(changed.weight.dtype):
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


def _one_dnn_supports(dtype: torch.dtype) -> bool:
    """Whether oneDNN's linear layer takes the dtype; not every CPU supports bfloat16."""
    return dtype == torch.float32 or (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _cast(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


# With more tokens, attention maps take more memory than all other tensors of a block.
_FEW_TOKENS = 512


class OneDnnLinear(nn.Linear):
    """A linear layer that uses oneDNN, like torch.compile; ``nn.Linear`` uses BLAS for float32.

    Attributes:
        gelu: ``approximate`` of a GELU that is applied in the same pass over memory; None for no
            GELU.
    """

    gelu: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The output of ``nn.Linear``, with ``nn.GELU`` applied to it if ``gelu`` is set."""
        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            plain = super().forward(input)
            return plain if self.gelu is None else F.gelu(plain, approximate=self.gelu)
        name, approximate = ("none", "") if self.gelu is None else ("gelu", self.gelu)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.weight, self.bias, name, [], approximate
        )
        return output
