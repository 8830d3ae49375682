"""Restores the caller's random state after a forward that draws random numbers."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_reflected.inputs.modules import modules_of, without_compilation

# Functions that drew no random numbers, with the train or eval modes of their modules at the time.
_deterministic: weakref.WeakKeyDictionary[Any, tuple[bool, ...]] = weakref.WeakKeyDictionary()


class DrawWatch(TorchDispatchMode):
    """Stores the states of the random generators just before this thread's first draw.

    All threads share torch's generators. Restoring a state without a draw in this thread would
    make other threads draw the same numbers twice.

    Attributes:
        drew: whether a random number was drawn under the mode.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._cpu: torch.Tensor | None = None
        self._cuda: dict[int, torch.Tensor] = {}

    @property
    def drew(self) -> bool:
        """Whether a random number was drawn."""
        return self._cpu is not None

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation unchanged; stores the states before the first random one."""
        kwargs = kwargs or {}
        draws = torch.Tag.nondeterministic_seeded in func.tags and not any(
            isinstance(value, torch.Generator) for value in (*args, *kwargs.values())
        )
        if draws and self._cpu is None:
            self._cpu = torch.get_rng_state()
            if torch.cuda.is_initialized():
                devices = range(torch.cuda.device_count())
                self._cuda = {device: torch.cuda.get_rng_state(device) for device in devices}
        return func(*args, **kwargs)

    def restore(self) -> None:
        """Restores the states if a random number was drawn."""
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
            for device, state in self._cuda.items():
                torch.cuda.set_rng_state(state, device)


@contextmanager
def random_state_kept(forward_func: Callable[..., Any] | None) -> Iterator[None]:
    """Restores the random state if the block draws random numbers, for example for dropout.

    Args:
        forward_func: the function that the block runs. A module in eval mode is assumed to draw
            no random numbers, and so is a function that was watched before and drew none;
            ``None`` if the block runs no forward.
    """
    if forward_func is None or is_quiet(forward_func):
        yield
        return
    watch = DrawWatch()
    try:
        # Compiled code shows the mode no operations; and torch 2.7 never compiles a model again
        # that was first called under one.
        with without_compilation(), watch:
            yield
    finally:
        watch.restore()
    if not watch.drew:
        with suppress(TypeError):  # the object does not support weak references
            _deterministic[forward_func] = _modes(forward_func)


def is_quiet(forward_func: Callable[..., Any]) -> bool:
    """Whether a forward is assumed to draw no random numbers."""
    modes = _modes(forward_func)
    owner = getattr(forward_func, "__self__", forward_func)
    if isinstance(owner, nn.Module) and not any(modes):
        return True
    with suppress(TypeError):
        return _deterministic.get(forward_func) == modes
    return False


def _modes(forward_func: Callable[..., Any]) -> tuple[bool, ...]:
    return tuple(module.training for module in modules_of(forward_func))
