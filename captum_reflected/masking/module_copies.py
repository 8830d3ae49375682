"""Copies of a module with some of its parts exchanged, the user's own left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def exchange(module: nn.Module, parts: Mapping[str, nn.Module]) -> nn.Module:
    """A module that shares everything with another but some of its parts.

    Args:
        module: left as it is.
        parts: what stands at these dotted names, as of :meth:`~torch.nn.Module.get_submodule`.

    Returns:
        nn.Module: of the same class; only the modules on the way to a part are new, and
        these share all tensors with the old ones.
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
    """A module for inference, as fast as its device computes the same.

    Args:
        module: left as it is, its tensors shared where they need not be cast.
        on_cpu: whether it runs there.
        bf16: whether to compute in bfloat16.
        num_tokens: N, that it sees of each image.

    Returns:
        nn.Module: of copies of the modules inside.
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
    if type(changed) is nn.Linear and _one_dnn_has(changed.weight.dtype):
        changed.__class__ = OneDnnLinear
    _fuse_gelu(changed)
    # The CPU's fused attention is no faster in bfloat16; two products are.
    if bf16 and num_tokens <= _FEW_TOKENS and getattr(module, "fused_attn", False):
        changed.__dict__["fused_attn"] = False
    return changed


def _fuse_gelu(module: nn.Module) -> None:
    """Where a module, a copy, applies a GELU to a linear layer, the layer does both."""
    places = _gelu_places().get(type(module).forward)
    if places is None:
        return
    linear, activation = (module._modules.get(name) for name in places)
    if isinstance(linear, OneDnnLinear) and type(activation) is nn.GELU:
        linear.gelu = activation.approximate
        module._modules[places[1]] = nn.Identity()


@cache
def _gelu_places() -> dict[Callable[..., Any], tuple[str, str]]:
    """By a class's forward, the names of a linear layer and of what is applied to its output."""
    from timm.layers import Mlp  # takes seconds to import

    return {Mlp.forward: ("fc1", "act"), nn.Sequential.forward: ("0", "1")}


def _one_dnn_has(dtype: torch.dtype) -> bool:
    """Not bfloat16 on every CPU."""
    return dtype == torch.float32 or (
        dtype == torch.bfloat16
        and torch.backends.mkldnn.is_available()
        and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    )


def _cast(tensor: Tensor) -> Tensor:
    tensor = tensor.detach()
    return tensor.to(torch.bfloat16) if tensor.is_floating_point() else tensor


_FEW_TOKENS = 512  # beyond, maps of attention are larger than all else that a block holds


class OneDnnLinear(nn.Linear):
    """Linear by oneDNN, as torch.compile has it; ``nn.Linear`` takes BLAS for float32.

    Attributes:
        gelu: ``approximate`` of the GELU that follows, in the same pass over memory; None
            where none does.
    """

    gelu: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        """As of ``nn.Linear``, and of ``nn.GELU`` after it."""
        if not (torch.backends.mkldnn.is_available() and torch.backends.mkldnn.enabled):
            plain = super().forward(input)
            return plain if self.gelu is None else F.gelu(plain, approximate=self.gelu)
        name, approximate = ("none", "") if self.gelu is None else ("gelu", self.gelu)
        output: Tensor = torch.ops.mkldnn._linear_pointwise(
            input, self.weight, self.bias, name, [], approximate
        )
        return output
