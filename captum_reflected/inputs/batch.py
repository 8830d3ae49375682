"""What a caller hands to ``attribute``, checked and brought to one form.

Every error is raised before the model runs, and says what was given and what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_reflected._captum import format_args
from captum_reflected.inputs.random_state import random_state_kept
from captum_reflected.inputs.targets import target_index

Images = TypeVar("Images", Tensor, tuple[Tensor])
"""What ``attribute`` takes, and gives back in the same form."""


@dataclass(frozen=True)
class Batch:
    """A checked call: what to explain, and how to run it.

    Attributes:
        images: (B, C, H, W), detached.
        args: ``additional_forward_args`` as a tuple.
        target: (B, k) indices into the output's dimensions after the first, or ``None``.
        is_tuple: whether the caller gave a 1-tuple, and gets one back.
    """

    images: Tensor
    args: tuple[Any, ...]
    target: Tensor | None
    is_tuple: bool

    @property
    def size(self) -> int:
        """Number of images B."""
        return self.images.shape[0]

    @property
    def image_size(self) -> tuple[int, int]:
        """(H, W) of the images."""
        height, width = self.images.shape[-2:]
        return height, width

    @property
    def compute_dtype(self) -> torch.dtype:
        """Half types are accumulated in float32; float64 stays."""
        return torch.promote_types(self.images.dtype, torch.float32)

    def rows(self, images: Tensor) -> tuple[tuple[Any, ...], Tensor | None]:
        """``args`` and ``target`` that go with rows made of the images of these indices (R,)."""
        args = tuple(
            arg[images.to(arg.device)]
            if isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == self.size
            else arg
            for arg in self.args
        )
        return args, None if self.target is None else self.target[images]

    def format(self, attributions: Tensor) -> Any:
        """A (B, H, W) map in the shape, dtype and container of the caller's inputs."""
        full = attributions.to(self.images.dtype).unsqueeze(1).expand_as(self.images)
        # contiguous: Captum's sensitivity_max calls .view on the result.
        full = full.contiguous()
        return (full,) if self.is_tuple else full


def make_batch(inputs: Any, target: Any, additional_forward_args: Any) -> Batch:
    """Checks the arguments of ``attribute`` and brings them to one form.

    Args:
        inputs: (B, C, H, W) tensor of floating point numbers, or a 1-tuple of it.
        target: any of Captum's forms; see
            :func:`captum_reflected.inputs.targets.target_index`.
        additional_forward_args: passed on to ``forward_func``.

    Returns:
        Batch: the checked call.

    Raises:
        TypeError: inputs or target are of a type that no attributor takes.
        ValueError: their shape or their values do not fit.
    """
    is_tuple = isinstance(inputs, tuple)
    if is_tuple:
        if len(inputs) != 1:
            raise ValueError(
                f"inputs is a tuple of {len(inputs)} tensors; wanted: one image tensor "
                "of shape (B, C, H, W), or a 1-tuple of it"
            )
        inputs = inputs[0]
    if not isinstance(inputs, Tensor):
        raise TypeError(
            f"inputs is a {type(inputs).__name__}; wanted: a torch.Tensor of shape "
            "(B, C, H, W), or a 1-tuple of it"
        )
    shape = tuple(inputs.shape)
    if inputs.dim() != 4:
        hint = "; add the batch dimension with inputs[None]" if inputs.dim() == 3 else ""
        raise ValueError(f"inputs has shape {shape}; wanted: (B, C, H, W){hint}")
    if 0 in shape:
        raise ValueError(f"inputs has shape {shape}; wanted: at least one image, none of it empty")
    if not inputs.is_floating_point():
        raise TypeError(
            f"inputs has dtype {inputs.dtype}; wanted: a floating point image, "
            "preprocessed as the model wants it"
        )
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError("inputs holds NaN or infinite values; wanted: finite numbers")
    index = target_index(target, shape[0])
    return Batch(
        images=inputs.detach(),
        args=format_args(additional_forward_args),
        target=None if index is None else index.to(inputs.device),
        is_tuple=is_tuple,
    )


@contextmanager
def preserving_state(
    batch: Batch, *, gradients: bool, forward_func: Callable[..., Any] | None = None
) -> Iterator[Batch]:
    """Runs a block whatever autograd mode the caller is in, and leaves no trace.

    Gradients are on or off as asked, also under an outer ``no_grad`` or
    ``inference_mode``; tensors made in inference mode are cloned, since autograd cannot
    use them; random numbers that the model draws (dropout in train mode) are drawn from
    the caller's state, which is put back.

    Args:
        batch: the call.
        gradients: whether autograd records.
        forward_func: what the block runs; ``None`` if it runs no forward.

    Yields:
        Batch: the same, with tensors that autograd can use.
    """
    with (
        random_state_kept(forward_func),
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
    ):
        yield Batch(
            images=_normal(batch.images),
            args=tuple(_normal(arg) if isinstance(arg, Tensor) else arg for arg in batch.args),
            target=None if batch.target is None else _normal(batch.target),
            is_tuple=batch.is_tuple,
        )


def _normal(tensor: Tensor) -> Tensor:
    return tensor.clone() if tensor.is_inference() else tensor
