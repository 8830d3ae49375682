"""The one module that touches Captum's private helpers, with types.

Captum ships no ``py.typed``; wrapping what we use here, once, keeps the rest of the
package checked and makes a future Captum release a change to a single file.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from contextvars import ContextVar
from typing import Any, TypeVar

from captum._utils.common import (
    _format_additional_forward_args,
    _run_forward,
)
from captum._utils.progress import progress as _progress
from captum.log import log_usage as _log_usage
from torch import Tensor

F = TypeVar("F", bound=Callable[..., Any])
T = TypeVar("T")


def log_usage(func: F) -> F:
    """Captum's usage logger; the outermost decorator of every ``attribute``.

    ``NoiseTunnel`` calls ``attribute.__wrapped__``, which this decorator provides.
    """
    decorated: F = _log_usage()(func)
    return decorated


def format_args(additional_forward_args: Any) -> tuple[Any, ...]:
    """``additional_forward_args`` as a tuple, empty for ``None``."""
    formatted: tuple[Any, ...] | None = _format_additional_forward_args(additional_forward_args)
    return () if formatted is None else formatted


def run_forward(forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...]) -> Any:
    """The unselected output of ``forward_func(inputs, *args)``, called as Captum calls it."""
    return _run_forward(forward_func, inputs, None, args or None)


def progress(iterable: Iterable[T], *, description: str, total: int, show: bool) -> Iterable[T]:
    """``iterable``, under Captum's progress bar if ``show``."""
    return _progress(iterable, desc=description, total=total) if show else iterable


_joint_bar: ContextVar[Any] = ContextVar("joint_bar", default=None)


def progress_bar(*, description: str, total: int, show: bool) -> AbstractContextManager[Any]:
    """Captum's progress bar, moved by its ``update(n)``; silent unless ``show``.

    Inside :func:`joint_progress_bar`, a bar that would be shown moves that one instead.
    """
    joint = _joint_bar.get()
    if show and joint is not None:
        return nullcontext(joint)
    bar: AbstractContextManager[Any] = _progress(desc=description, total=total, disable=not show)
    return bar


@contextmanager
def joint_progress_bar(*, description: str, total: int, show: bool) -> Iterator[None]:
    """One bar, with the time left, for all work inside that would show bars of its own."""
    with progress_bar(description=description, total=total, show=show) as bar:
        token = _joint_bar.set(bar)
        try:
            yield
        finally:
            _joint_bar.reset(token)
