"""Checks the arguments of ``attribute`` and converts them to one format.

Every error is raised before the model runs, and says what was given and what is wanted.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import torch
from torch import Tensor

from captum_reflected._captum import format_args
from captum_reflected.inputs.devices import to_device
from captum_reflected.inputs.modules import without_compilation
from captum_reflected.inputs.random_state import random_state_kept
from captum_reflected.inputs.targets import target_index
from captum_reflected.inputs.unfit_images import batch_hint, describe_other, preprocessing_of

Images = TypeVar("Images", Tensor, tuple[Tensor])
"""The type of the inputs of ``attribute``, which is also the type of its result."""


@dataclass(frozen=True)
class Batch:
    """The checked arguments of a call.

    Attributes:
        images: (B, C, H, W), detached.
        args: ``additional_forward_args`` as a tuple.
        target: (B, k) indices into the output's dimensions after the first, or ``None``.
        is_tuple: whether the caller passed a 1-tuple, and has to get one back.
        indices: the values of the target, so that their range can be checked without waiting for
            the device.
    """

    images: Tensor
    args: tuple[Any, ...]
    target: Tensor | None
    is_tuple: bool
    indices: list[list[int]] | None = None

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
        """The dtype of computations: float32 for half types, else the dtype of the images."""
        return torch.promote_types(self.images.dtype, torch.float32)

    def rows(self, images: Tensor) -> tuple[tuple[Any, ...], Tensor | None]:
        """Selects ``args`` and ``target`` for rows that belong to the images of indices (R,)."""
        args = tuple(
            arg[images.to(arg.device)]
            if isinstance(arg, Tensor) and arg.dim() > 0 and arg.shape[0] == self.size
            else arg
            for arg in self.args
        )
        return args, None if self.target is None else self.target[images]

    def select(self, images: Tensor) -> Batch:
        """The call for the images of indices (R,)."""
        args, target = self.rows(images)
        return replace(self, images=self.images[images], args=args, target=target)

    def with_source(self) -> Batch:
        """The same call; its images require a gradient and have a node in the autograd graph."""
        leaf = self.images.detach().requires_grad_()
        return replace(self, images=leaf.view_as(leaf))

    def format(self, attributions: Tensor) -> Any:
        """Converts a (B, H, W) map to the shape, dtype and container of the caller's inputs."""
        full = attributions.to(self.images.dtype).unsqueeze(1).expand_as(self.images)
        # Has to be contiguous, since Captum's sensitivity_max calls .view on the result.
        full = full.contiguous()
        return (full,) if self.is_tuple else full


def make_batch(
    inputs: Any, target: Any, additional_forward_args: Any, *, name: str = "inputs"
) -> Batch:
    """Checks the arguments of ``attribute`` and converts them to one format.

    Args:
        inputs: (B, C, H, W) tensor of floating point numbers, or a 1-tuple of it.
        target: any of Captum's target formats; see
            :func:`captum_reflected.inputs.targets.target_index`.
        additional_forward_args: passed on to ``forward_func``.
        name: what the caller calls its inputs, for errors.

    Returns:
        Batch: the checked call.

    Raises:
        TypeError: inputs or target have an unsupported type.
        ValueError: their shape or their values do not fit.
    """
    is_tuple = isinstance(inputs, tuple)
    if is_tuple:
        if len(inputs) != 1:
            raise ValueError(
                f"{name} is a tuple of {len(inputs)} tensors; wanted: one image tensor "
                "of shape (B, C, H, W), or a 1-tuple of it"
            )
        inputs = inputs[0]
    if not isinstance(inputs, Tensor):
        raise TypeError(describe_other(name, inputs))
    shape = tuple(inputs.shape)
    if inputs.dim() != 4:
        raise ValueError(f"{name} has shape {shape}; wanted: (B, C, H, W){batch_hint(name, shape)}")
    if 0 in shape:
        raise ValueError(f"{name} has shape {shape}; wanted: at least one image, none of it empty")
    if not inputs.is_floating_point():
        raise TypeError(
            f"{name} has dtype {inputs.dtype}; wanted: a floating point image"
            f"{preprocessing_of('to_pil_image(image)')}"
        )
    if not bool(torch.isfinite(inputs).all()):
        raise ValueError(f"{name} holds NaN or infinite values; wanted: finite numbers")
    index = target_index(target, shape[0])
    return Batch(
        images=inputs.detach(),
        args=format_args(additional_forward_args),
        target=None if index is None else to_device(index, inputs.device),
        is_tuple=is_tuple,
        indices=None if index is None else index.tolist(),
    )


@contextmanager
def preserving_state(
    batch: Batch, *, gradients: bool, forward_func: Callable[..., Any] | None = None
) -> Iterator[Batch]:
    """Sets the autograd mode for a block, and restores it and the random state afterwards.

    Gradients are enabled or disabled as requested, even under an outer ``no_grad`` or
    ``inference_mode``. Tensors created in inference mode are cloned, since autograd cannot use
    them. Random numbers that the model draws (dropout in train mode) come from the caller's
    random state, which is restored afterwards. With gradients, compiled models run their original
    code.

    Args:
        batch: the call.
        gradients: whether autograd records the operations of the block.
        forward_func: the function that the block runs; ``None`` if it runs no forward.

    Yields:
        Batch: the same call, with tensors that autograd can use.
    """
    with (
        random_state_kept(forward_func),
        torch.inference_mode(False),
        torch.set_grad_enabled(gradients),
        without_compilation() if gradients else nullcontext(),
    ):
        yield without_inference_mode(batch)


def without_inference_mode(batch: Batch) -> Batch:
    """The same call, with tensors of inference mode cloned; to be called outside of that mode."""

    def usable(value: Any) -> Any:
        return value.clone() if isinstance(value, Tensor) and value.is_inference() else value

    return replace(
        batch,
        images=usable(batch.images),
        args=tuple(map(usable, batch.args)),
        target=usable(batch.target),
    )
