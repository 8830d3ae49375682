"""Checks and brings to one form what a caller hands to ``attribute``.

Every error is raised before the model runs, except those that need its output (the
number of classes), and says what was given and what is wanted.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor

from captum_reflected._captum import format_args
from captum_reflected.inputs.random_state import random_state_kept

Score = Literal["logit", "probability"]
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
        target: any of Captum's forms; see :func:`target_index`.
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


def target_index(target: Any, batch_size: int) -> Tensor | None:
    """Brings each of Captum's target forms to one (B, k) tensor of indices.

    Args:
        target: ``None``; an int, a tuple of ints, a 0-d or 1-element integer tensor (one
            for all images); a (B,) integer tensor, a list of B ints, a list of B tuples
            of ints (one per image).
        batch_size: B.

    Returns:
        Tensor or None: (B, k) int64; k is the number of output dimensions it selects.

    Raises:
        TypeError: not a whole number, or not a form listed above.
        ValueError: not one target per image.
    """
    if target is None:
        return None
    if isinstance(target, Tensor):
        if target.is_floating_point() or target.is_complex() or target.dtype == torch.bool:
            raise TypeError(f"target has dtype {target.dtype}; wanted: an integer tensor")
        index = target.detach().to(torch.int64)
        if index.numel() == 1:
            return index.reshape(1, 1).expand(batch_size, 1)
        if index.dim() == 1 and index.shape[0] == batch_size:
            return index.unsqueeze(1)
        raise ValueError(
            f"target has shape {tuple(target.shape)}; wanted: one index, or one for each "
            f"of the {batch_size} images, shape ({batch_size},)"
        )
    if isinstance(target, list):
        if len(target) != batch_size:
            raise ValueError(
                f"target is a list of {len(target)}; wanted: one entry for each of the "
                f"{batch_size} images"
            )
        rows = [_as_indices(entry) for entry in target]
        if len({len(row) for row in rows}) != 1:
            raise ValueError(f"target mixes tuples of different lengths: {target!r}")
        return torch.tensor(rows, dtype=torch.int64)
    return torch.tensor([_as_indices(target)], dtype=torch.int64).expand(batch_size, -1)


def _as_indices(entry: Any) -> list[int]:
    parts = entry if isinstance(entry, tuple) else (entry,)
    try:
        if not parts or any(isinstance(part, bool) for part in parts):
            raise TypeError
        return [operator.index(part) for part in parts]
    except TypeError:
        raise TypeError(
            f"target {entry!r} is a {type(entry).__name__}; wanted: an int or a tuple of "
            "ints, an integer tensor, or a list with one of them per image"
        ) from None


def select_target(
    output: Any, target: Tensor | None, batch_size: int, *, in_range: bool = False
) -> Tensor:
    """The number of each image that is explained.

    Args:
        output: what ``forward_func`` returned, (B, C) (or (B,) with no target; or more
            dimensions, with tuples as targets).
        target: (B, k) indices or ``None``.
        batch_size: B.
        in_range: whether the target is known to be in range; if not, it is looked at, for
            which the host waits for the device.

    Returns:
        Tensor: (B,).

    Raises:
        TypeError: the output is not a tensor.
        ValueError: its shape is not one number per image and class, or a target is out of range.
    """
    if not isinstance(output, Tensor):
        raise TypeError(
            f"forward_func returned a {type(output).__name__}; wanted: a tensor of logits of "
            "shape (B, C). Wrap it, for instance: lambda x: model(x).logits"
        )
    shape = tuple(output.shape)
    if output.dim() == 0 or shape[0] != batch_size:
        raise ValueError(
            f"forward_func returned shape {shape} for {batch_size} images; wanted: logits of "
            f"shape ({batch_size}, C)"
        )
    if target is None:
        if output[0].numel() != 1:
            raise ValueError(
                f"target is None and forward_func returned shape {shape}; wanted: a target "
                "that says which output of each image to explain"
            )
        return output.reshape(batch_size)
    if target.shape[1] != output.dim() - 1:
        raise ValueError(
            f"forward_func returned shape {shape}, and a target of {target.shape[1]} "
            f"index(es) does not select one number per image; wanted: logits of shape (B, C)"
        )
    target = target.to(output.device)
    if not in_range and bool(((target < 0) | (target >= target.new_tensor(shape[1:]))).any()):
        raise ValueError(
            f"target {target.squeeze(1).tolist()} is out of range for the output of shape "
            f"{shape}; wanted: indices from 0 up to, not including, {list(shape[1:])}"
        )
    rows = torch.arange(batch_size, device=output.device)
    return output[(rows, *target.unbind(dim=1))]


def target_score(
    output: Any,
    target: Tensor | None,
    batch_size: int,
    score: Score,
    dtype: torch.dtype,
    *,
    in_range: bool = False,
) -> Tensor:
    """What a forward says of the target: its logit, or its probability among the classes.

    Args:
        output: as in :func:`select_target`.
        target: as in :func:`select_target`.
        batch_size: as in :func:`select_target`.
        score: ``"logit"`` or ``"probability"``, the softmax over the last dimension.
        dtype: of the result, and of the softmax.
        in_range: as in :func:`select_target`.

    Returns:
        Tensor: (B,).

    Raises:
        ValueError: a probability is asked of a model with a single output.
    """
    if score == "probability" and isinstance(output, Tensor):
        if output.dim() < 2 or output.shape[-1] < 2:
            raise ValueError(
                f'score is "probability" and forward_func returned shape {tuple(output.shape)}, '
                'one number per image; wanted: logits of two classes or more, or score="logit"'
            )
        output = output.to(dtype).softmax(dim=-1)
    return select_target(output, target, batch_size, in_range=in_range).to(dtype)


def check_option(name: str, value: Any, options: tuple[str, ...]) -> None:
    """Raises ValueError, naming the options, where ``value`` is none of them."""
    if value not in options:
        raise ValueError(f"{name} is {value!r}; wanted: one of {', '.join(options)}")


def check_positive(name: str, number: Any) -> int:
    """``number`` if it is a whole number of 1 or more; an error that names it if not."""
    if not isinstance(number, int) or isinstance(number, bool):
        raise TypeError(f"{name} is {number!r}; wanted: an int")
    if number < 1:
        raise ValueError(f"{name} is {number}; wanted: 1 or more")
    return number


def check_not_negative(name: str, number: Any) -> None:
    """Raises TypeError or ValueError, with its name, unless it is a finite number of 0 or more."""
    if isinstance(number, bool) or not isinstance(number, (int, float)):
        raise TypeError(f"{name} is {number!r}; wanted: a number")
    if not 0 <= number < float("inf"):
        raise ValueError(f"{name} is {number}; wanted: a number, 0 or more")


def check_finite(tensors: Sequence[Tensor], what: str) -> None:
    """Checks, waiting for the device once, that tensors (B, ...) hold finite numbers.

    Args:
        tensors: whose first dimension is the images'.
        what: they are, for the message.

    Raises:
        ValueError: NaN or infinite; names the images.
    """
    finite = torch.stack([values.isfinite().flatten(1).all(dim=1) for values in tensors]).all(dim=0)
    if not bool(finite.all()):
        images = (~finite).nonzero().flatten().tolist()
        raise ValueError(
            f"{what} is not finite for image(s) {images} of the batch; wanted: finite numbers. "
            "A division by zero or a number beyond the range of the model's type in its forward "
            "or backward is the cause"
        )


def default_rows_per_forward(device: torch.device) -> int:
    """How many images one forward should see: few fit a CPU's cache, many fill a GPU."""
    return 16 if device.type == "cpu" else 128


def rows_per_forward(max_examples_per_batch: Any, device: torch.device) -> int:
    """The caller's ``max_examples_per_batch``, checked; what suits the device where it is None."""
    if max_examples_per_batch is None:
        return default_rows_per_forward(device)
    return check_positive("max_examples_per_batch", max_examples_per_batch)


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
