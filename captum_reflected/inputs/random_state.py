"""The caller's random state, put back where a forward draws from it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_reflected.inputs.modules import modules_of

# Functions that drew nothing, with the modes of their modules then.
_quiet: weakref.WeakKeyDictionary[Any, tuple[bool, ...]] = weakref.WeakKeyDictionary()


class DrawWatch(TorchDispatchMode):
    """Remembers the generators' states of just before this thread's first random number.

    The state of torch's generators is shared by all threads. One that is put back although
    nothing was drawn here would make other threads draw the same numbers again.

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
        """Runs everything as it is; looks at what draws."""
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
        """Puts the states back, if anything was drawn."""
        if self._cpu is not None:
            torch.set_rng_state(self._cpu)
            for device, state in self._cuda.items():
                torch.cuda.set_rng_state(state, device)


@contextmanager
def random_state_kept(forward_func: Callable[..., Any] | None) -> Iterator[None]:
    """Puts the random state back if the block draws, as a model does that drops out.

    Args:
        forward_func: what the block runs. A module in eval mode is taken not to draw, and so is
            a function that was watched before and did not; ``None`` draws nothing.
    """
    if forward_func is None or is_quiet(forward_func):
        yield
        return
    watch = DrawWatch()
    try:
        with watch:
            yield
    finally:
        watch.restore()
    if not watch.drew:
        with suppress(TypeError):  # has no weak reference
            _quiet[forward_func] = _modes(forward_func)


def is_quiet(forward_func: Callable[..., Any]) -> bool:
    """Whether a forward is taken to draw no random numbers."""
    modes = _modes(forward_func)
    owner = getattr(forward_func, "__self__", forward_func)
    if isinstance(owner, nn.Module) and not any(modes):
        return True
    with suppress(TypeError):
        return _quiet.get(forward_func) == modes
    return False


def _modes(forward_func: Callable[..., Any]) -> tuple[bool, ...]:
    return tuple(module.training for module in modules_of(forward_func))
