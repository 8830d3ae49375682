"""A device in software that behaves like a GPU towards Python code; its numbers are the CPU's.

It shows without a GPU what only a GPU shows otherwise: operations that make the program wait for
the device, and tensors of the device in one operation with tensors of the CPU. Tensors on it are
wrappers around tensors of the CPU. The device stays registered until the process ends.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils import backend_registration
from torch.utils._python_dispatch import return_and_correct_aliasing
from torch.utils._pytree import tree_leaves, tree_map

from captum_reflected.inputs.devices import READING_FIRST

NAME = "simulated"
_PACKAGE = Path(__file__).parents[2] / "captum_reflected"

# Operations whose result the host has to know: numbers, and shapes that depend on values.
_WAITING = frozenset(
    """
    _local_scalar_dense item is_nonzero equal allclose nonzero nonzero_numpy argwhere masked_select
    unique_dim unique_consecutive unique_dim_consecutive _unique _unique2 bincount _linalg_eigh
    _linalg_svd linalg_cholesky linalg_inv linalg_solve _linalg_solve_ex _linalg_check_errors
    linalg_lstsq linalg_qr linalg_eig linalg_eigvals
    """.split()  # noqa: SIM905
)
# In torch, these make a tensor of no size and then resize it.
_FACTORIES = ("arange", "linspace", "logspace", "eye", "randperm", "tril_indices", "triu_indices")
_COPIES = ("copy_", "_to_copy", "_copy_from", "set_data")
_INDEXING = ("index", "index_put", "index_put_", "_unsafe_index", "_index_put_impl_")


class Wait(NamedTuple):
    """An operation that makes the program wait for the device.

    Attributes:
        operation: its name.
        place: file, line and function of the package that called it.
    """

    operation: str
    place: str


_lock = threading.Lock()
_logs: list[list[Wait]] = []


@contextmanager
def waits() -> Iterator[list[Wait]]:
    """Records the waits of all threads in the block."""
    log: list[Wait] = []
    with _lock:
        _logs.append(log)
    try:
        yield log
    finally:
        with _lock:
            _logs[:] = [other for other in _logs if other is not log]


def place() -> str:
    """File, line and function of the package that is running, the innermost one."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        path = Path(frame.f_code.co_filename)
        is_mode = frame.f_code.co_name in ("__torch_function__", "__torch_dispatch__")
        if path.is_relative_to(_PACKAGE) and not is_mode:
            return f"{path.relative_to(_PACKAGE)}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return "outside of the package"


class _OnDevice(Tensor):
    """A tensor on the simulated device."""

    on_cpu: Tensor

    @staticmethod
    def __new__(cls, on_cpu: Tensor) -> _OnDevice:
        made: _OnDevice = torch.Tensor._make_wrapper_subclass(
            cls,
            on_cpu.shape,
            strides=on_cpu.stride(),
            storage_offset=on_cpu.storage_offset(),
            dtype=on_cpu.dtype,
            device=torch.device(NAME, 0),
        )
        made.on_cpu = on_cpu
        return made

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.on_cpu!r} on the {NAME} device"

    def tolist(self) -> Any:
        """The values, for which the program waits."""
        return self.detach().cpu().tolist()

    def numpy(self, *, force: bool = False) -> Any:
        """Refused, as for every tensor that is not on the CPU, unless forced."""
        if not force:
            raise TypeError(f"can't convert a tensor of the {NAME} device to numpy")
        return self.detach().cpu().numpy()

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        return _run(func, *args, **(kwargs or {}))


def _is_ours(device: torch.device) -> bool:
    return device.type == NAME


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Runs an operation on the CPU; what it returns is on the device if its inputs are."""
    leaves = tree_leaves((args, kwargs))
    name = func._schema.name.partition("::")[2]
    outside = [
        leaf for leaf in leaves if isinstance(leaf, Tensor) and not isinstance(leaf, _OnDevice)
    ]
    devices = [leaf for leaf in leaves if isinstance(leaf, torch.device)]
    is_on_device = all(map(_is_ours, devices))
    _check_devices(name, leaves, outside)
    if _waits(name, args, kwargs, is_on_device=is_on_device, has_outside=bool(outside)):
        wait = Wait(name, place())
        with _lock:
            for log in _logs:
                log.append(wait)

    def inside(leaf: Any) -> Any:
        if isinstance(leaf, _OnDevice):
            return leaf.on_cpu
        return torch.device("cpu") if isinstance(leaf, torch.device) else leaf

    wrappers = {id(leaf.on_cpu): leaf for leaf in leaves if isinstance(leaf, _OnDevice)}

    def outwards(value: Any) -> Any:
        if not isinstance(value, Tensor) or not is_on_device:
            return value
        known = wrappers.get(id(value))
        if known is not None and known.shape != value.shape:
            raise NotImplementedError(f"{name} changes a shape in place")
        return known if known is not None else _OnDevice(value)

    output = tree_map(outwards, func(*tree_map(inside, args), **tree_map(inside, kwargs)))
    if not wrappers or not is_on_device:
        return output
    return return_and_correct_aliasing(func, args, kwargs, output)


def _check_devices(name: str, leaves: list[Any], outside: list[Tensor]) -> None:
    """Raises where a GPU would; it takes single numbers and indices from the CPU."""
    if name in _COPIES or name in _INDEXING:
        return
    if any(isinstance(leaf, _OnDevice) for leaf in leaves):
        for tensor in outside:
            if tensor.dim() > 0:
                raise RuntimeError(
                    f"Expected all tensors to be on the same device: {name} got some on {NAME}:0 "
                    f"and one of shape {tuple(tensor.shape)} on {tensor.device}"
                )


def _waits(
    name: str,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    *,
    is_on_device: bool,
    has_outside: bool,
) -> bool:
    """Whether an operation makes the program wait for the device."""
    if name in _WAITING:
        return True
    if name == "repeat_interleave":
        return isinstance(args[-1], Tensor) and kwargs.get("output_size") is None
    if name in _INDEXING:
        indices = [index for index in args[1] if index is not None]
        by_mask = any(index.dtype in (torch.bool, torch.uint8) for index in indices)
        fills = name != "index" and len(indices) == 1 and args[2].numel() == 1
        return (by_mask and not fills) or any(not isinstance(index, _OnDevice) for index in indices)
    if name in _COPIES:
        is_asynchronous = kwargs.get("non_blocking") or (name == "copy_" and len(args) > 2)
        return (has_outside or not is_on_device) and not is_asynchronous
    return False


class _Module(backend_registration._DummyBackendModule):
    """What torch asks of a device's module."""

    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        """The dtypes of autocast, which does nothing on this device."""
        return [torch.bfloat16, torch.float16]

    def get_rng_state(self, device: Any = None) -> Tensor:
        """The device draws with the CPU's generator."""
        return torch.get_rng_state()

    def set_rng_state(self, state: Tensor, device: Any = None) -> None:
        """The device draws with the CPU's generator."""
        torch.set_rng_state(state)

    def synchronize(self, device: Any = None) -> None:
        """Nothing to wait for: operations have run when they return."""


def device() -> torch.device:
    """The simulated device, registered at the first call.

    Raises:
        RuntimeError: this version of torch does not allow devices in Python.
    """
    if not _libraries:
        register = getattr(backend_registration, "_setup_privateuseone_for_python_backend", None)
        if register is None:
            raise RuntimeError(
                f"torch {torch.__version__} does not allow devices in Python; wanted: a newer one"
            )
        register(NAME, backend_module=_Module())
        every, factories = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
        _libraries.extend((every, factories))
        every.fallback(_run, "PrivateUse1")
        every.fallback(torch.library.fallthrough_kernel, "AutocastPrivateUse1")
        # A wrapper cannot take the data of another.
        torch.__future__.set_overwrite_module_params_on_conversion(True)
        READING_FIRST.add(NAME)
        # torch.tensor then moves numbers to the device by an operation that is seen.
        torch._C._set_only_lift_cpu_tensors(True)
        for name in _FACTORIES:
            operation = getattr(torch.ops.aten, name)
            for overload in operation.overloads():
                if "out" not in overload:
                    title = name if overload == "default" else f"{name}.{overload}"
                    run = partial(_run, getattr(operation, overload))
                    factories.impl(title, run, "PrivateUse1")
    return torch.device(NAME, 0)


_libraries: list[torch.library.Library] = []
