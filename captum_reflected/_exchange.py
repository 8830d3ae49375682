"""A module with some of its parts exchanged, the user's own left as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping

import torch
from torch import nn


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


def rebuild(module: nn.Module, change: Callable[[nn.Module], None]) -> nn.Module:
    """A copy of a module and all inside it, sharing their tensors, each copy changed.

    Args:
        module: left as it is.
        change: called with each copy, which has attributes and dictionary of parameters of
            its own.
    """
    changed = copy.copy(module)
    changed._parameters = dict(module._parameters)
    changed._modules = {
        name: None if child is None else rebuild(child, change)
        for name, child in module._modules.items()
    }
    change(changed)
    return changed


def in_bf16(module: nn.Module) -> nn.Module:
    """The module computing in bfloat16: a copy with its floating point parameters cast."""

    def cast(part: nn.Module) -> None:
        for name, parameter in part._parameters.items():
            if parameter is not None and parameter.is_floating_point():
                part._parameters[name] = nn.Parameter(
                    parameter.detach().to(torch.bfloat16), requires_grad=False
                )

    return rebuild(module, cast)
