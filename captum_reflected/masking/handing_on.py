"""Proves that a function does nothing but hand its images on to a model.

The function runs once under a :class:`torch.overrides.TorchFunctionMode`, which sees every use of a
tensor in Python, down to a look at its shape, and under a
:class:`~torch.utils._python_dispatch.TorchDispatchMode`, which sees every operation of compiled
code, such as that of ``torch.jit``. If all of them happen inside one call of the model, if this
call was given the very tensor of images and nothing else, and if the last of them returned what the
function returns, the function only calls the model. This holds for all images, since code that does
not use a tensor cannot depend on its values. (Neither mode sees what other threads do.)
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from inspect import signature
from types import FrameType
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from captum_reflected.inputs.modules import tensors_in, without_compilation
from captum_reflected.inputs.outputs import logits_of
from captum_reflected.masking.model_structure import runs_as_written

# The code of every module's call; its frame holds the module and the arguments.
_CALL = nn.Module.__call__.__code__


class DoesMoreError(Exception):
    """A function does more than hand its images on."""


class WatchedForward:
    """Runs a function of images and watches what it does.

    Args:
        forward_func: a function of the images.
        model: a module that it may hand them on to.

    """

    def __init__(self, forward_func: Callable[..., Any], model: nn.Module) -> None:
        self._forward_func = forward_func
        self._model = model

    def __call__(self, images: Tensor) -> Any:
        """The output of the function, or its logits.

        Raises:
            DoesMoreError: the function did more than call the model.
        """
        with without_compilation(), _Watch(self._model, images) as watch:
            output = self._forward_func(images)
        output = logits_of(output)
        if not (watch.is_only_the_model and output is watch.last_output):
            raise DoesMoreError
        return output


class _Watch(TorchFunctionMode):
    """Looks for the model's call among the callers of every use of a tensor."""

    def __init__(self, model: nn.Module, images: Tensor) -> None:
        super().__init__()
        self._model, self._images = model, images
        self._call: FrameType | None = None
        self._outside: FrameType | None = sys._getframe(1)
        self._operations = _Operations(self._see)
        self.is_only_the_model = True
        self.last_output: Any = None

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation unchanged."""
        is_use = self._see(args, kwargs)
        output = func(*args, **(kwargs or {}))
        if is_use:
            self.last_output = output
        return output

    def __enter__(self) -> Any:
        self._operations.__enter__()  # type: ignore[no-untyped-call]
        return super().__enter__()  # type: ignore[no-untyped-call]

    def __exit__(self, *exception: Any) -> None:
        super().__exit__(*exception)  # type: ignore[no-untyped-call]
        self._operations.__exit__(*exception)  # type: ignore[no-untyped-call]
        # Frames hold all tensors of their functions.
        self._call = self._outside = None

    def _see(self, args: Any, kwargs: Any) -> bool:
        """Notes whether an operation happens in the model's call; false if it uses no tensor."""
        call = self._call_of_the_model()
        if call is None and next(tensors_in((args, kwargs)), None) is None:
            return False  # as switching gradients off
        if self._call is None and call is not None:
            self._call = call
            self.is_only_the_model &= self._is_as_alone(call)
        self.is_only_the_model &= call is not None and call is self._call
        return True

    def _call_of_the_model(self) -> FrameType | None:
        frame: FrameType | None = sys._getframe(3)
        while frame is not None and frame is not self._outside:
            if frame.f_code is _CALL and frame.f_locals.get("self") is self._model:
                return frame
            frame = frame.f_back
        return None

    def _is_as_alone(self, call: FrameType) -> bool:
        """Whether a call gives the model the images alone, without hooks, autocast or training."""
        args, kwargs = call.f_locals["args"], call.f_locals["kwargs"]
        name = next(iter(signature(self._model.forward).parameters), None)
        values = [*args, *(kwargs.get(key) if key == name else None for key in kwargs)]
        return (
            len(values) == 1
            and values[0] is self._images
            and runs_as_written(self._model, self._images)
        )


class _Operations(TorchDispatchMode):
    """Shows the arguments of every operation to a function, also of operations of compiled code."""

    def __init__(self, see: Callable[[Any, Any], object]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._see = see

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation unchanged."""
        self._see(args, kwargs)
        return func(*args, **(kwargs or {}))
