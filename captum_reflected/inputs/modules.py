"""Finds the modules inside a forward function, and the tensors inside nested arguments."""

from __future__ import annotations

import dataclasses
import functools
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn


def modules_of(forward_func: Callable[..., Any]) -> list[nn.Module]:
    """All modules inside a forward function, outermost first.

    Args:
        forward_func: a module; a method of a module; a ``functools.partial`` or a function that
            has modules in its arguments, its closure or the globals that it uses.

    Returns:
        list[nn.Module]: each module once; empty if none can be found.
    """
    found: dict[nn.Module, None] = {}
    # As by root.modules(), which takes five times as long, since it also builds their names.
    pending = list(_roots(forward_func))[::-1]
    while pending:
        module = pending.pop()
        if module not in found:
            found[module] = None
            children = list(module._modules.values())
            pending += [child for child in reversed(children) if child is not None]
    return list(found)


def _roots(function: Any) -> Iterator[nn.Module]:
    values: list[Any] = []
    if isinstance(function, functools.partial):
        values = [function.func, *function.args, *function.keywords.values()]
    elif hasattr(function, "__code__"):
        cells = getattr(function, "__closure__", None) or ()
        global_values = function.__globals__
        values = [
            getattr(function, "__self__", None),
            *(cell.cell_contents for cell in cells if _is_filled(cell)),
            *(global_values.get(name) for name in function.__code__.co_names),
        ]
    else:
        values = [function]
    for value in values:
        if isinstance(value, nn.Module):
            yield value
        elif isinstance(value, functools.partial):
            yield from _roots(value)
        elif isinstance(owner := getattr(value, "__self__", None), nn.Module):
            yield owner


def _is_filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:  # the closure variable has not been assigned yet
        return False


def running_modules() -> list[nn.Module]:
    """The modules whose forwards are running, the innermost first."""
    running: list[nn.Module] = []
    frame: FrameType | None = sys._getframe()
    while frame is not None:
        if isinstance(owner := frame.f_locals.get("self"), nn.Module):
            running.append(owner)
        frame = frame.f_back
    return running


def running_module() -> str:
    """The innermost module whose forward is running, by its name in the outermost module."""
    return innermost_name(running_modules())


def innermost_name(running: Sequence[nn.Module]) -> str:
    """The name of the first of :func:`running_modules` in the last of them."""
    if not running:
        return "forward_func"
    kind = type(running[0]).__name__
    names = [name for name, module in running[-1].named_modules() if module is running[0]]
    return f"{names[0]} ({kind})" if any(names) else kind


class without_compilation:  # noqa: N801 - used like a function
    """A context in which models of ``torch.compile`` run their original code.

    Compiled code hides the single operations, and compiling it for every observer takes minutes.
    The setting belongs to the process: of several threads in such contexts, the first changes it
    and the last restores it.
    """

    _lock = threading.Lock()
    _num_inside = 0
    _stance: AbstractContextManager[Any] | None = None

    def __enter__(self) -> None:
        cls = type(self)
        with cls._lock:
            # Without torch._dynamo nothing was compiled, and importing it takes seconds.
            if cls._stance is None and "torch._dynamo" in sys.modules:
                cls._stance = torch.compiler.set_stance("force_eager")
                cls._stance.__enter__()
            cls._num_inside += 1

    def __exit__(self, *exception: object) -> None:
        cls = type(self)
        with cls._lock:
            cls._num_inside -= 1
            if cls._num_inside == 0 and cls._stance is not None:
                cls._stance.__exit__(None, None, None)
                cls._stance = None


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists, dictionaries and dataclasses."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from tensors_in(item)
    elif isinstance(value, dict):
        yield from tensors_in(tuple(value.values()))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from tensors_in([getattr(value, field.name) for field in dataclasses.fields(value)])
