"""Converts Captum's target formats, and selects the target from a model's output."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from captum_reflected.inputs.outputs import not_logits

Score = Literal["logit", "probability"]


def target_index(target: Any, batch_size: int) -> Tensor | None:
    """Converts any of Captum's target formats to one (B, k) tensor of indices.

    Args:
        target: ``None``; an int, a tuple of ints, a 0-d or 1-element integer tensor (one
            for all images); a (B,) integer tensor, a list of B ints, a list of B tuples
            of ints (one per image).
        batch_size: B.

    Returns:
        Tensor or None: (B, k) int64; k is the number of output dimensions that it indexes.

    Raises:
        TypeError: an index is not a whole number, or the format is not listed above.
        ValueError: there is not one target per image.
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
            raise ValueError(
                f"target is {target!r}, which mixes tuples of different lengths; wanted: one length"
            )
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
            "ints, an integer tensor, or a list with one int or tuple per image"
        ) from None


def select_target(
    output: Any,
    target: Tensor | None,
    batch_size: int,
    *,
    indices: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """Selects the explained output of each image.

    Args:
        output: the output of ``forward_func``, (B, C) (or (B,) without a target; or more
            dimensions, with tuples as targets).
        target: (B, k) indices or ``None``.
        batch_size: B.
        indices: the rows of the target, or more, whose range is checked; if None, they are read
            from the target, which synchronises with its device.

    Returns:
        Tensor: (B,).

    Raises:
        TypeError: the output is not a tensor.
        ValueError: the output does not have one number per image and class, or a target is out
            of range.
    """
    if not isinstance(output, Tensor):
        raise TypeError(not_logits(output))
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
    indices = target.tolist() if indices is None else indices
    if any(
        not 0 <= index < size for row in indices for index, size in zip(row, shape[1:], strict=True)
    ):
        shown = [row[0] if len(row) == 1 else row for row in indices]
        raise ValueError(
            f"target {shown} is out of range for the output of shape {shape}; wanted: indices from "
            f"0 up to, not including, {list(shape[1:])}"
        )
    target = target.to(output.device)
    rows = torch.arange(batch_size, device=output.device)
    return output[(rows, *target.unbind(dim=1))]


def target_score(
    output: Any,
    target: Tensor | None,
    batch_size: int,
    score: Score,
    dtype: torch.dtype,
    *,
    indices: Sequence[Sequence[int]] | None = None,
) -> Tensor:
    """The score of the target in a model's output: its logit or its softmax probability.

    Args:
        output: as in :func:`select_target`.
        target: as in :func:`select_target`.
        batch_size: as in :func:`select_target`.
        score: ``"logit"`` or ``"probability"``, the softmax over the last dimension.
        dtype: dtype of the result and of the softmax.
        indices: as in :func:`select_target`.

    Returns:
        Tensor: (B,).

    Raises:
        ValueError: ``score`` is ``"probability"``, and the model has a single output, or one
            of four or more dimensions, as of segmentation, whose last one is not the classes.
    """
    if score == "probability" and isinstance(output, Tensor):
        if output.dim() < 2 or output.shape[-1] < 2:
            raise ValueError(
                f'score is "probability" and forward_func returned shape {tuple(output.shape)}, '
                'one number per image; wanted: logits of two classes or more, or score="logit"'
            )
        if output.dim() > 3:
            raise ValueError(
                f'score is "probability" and forward_func returned shape {tuple(output.shape)}, of '
                "which it is not known where the classes are; wanted: logits of shape (B, C), for "
                "instance of one place: lambda x: model(x)[:, :, row, column]"
            )
        output = output.to(dtype).softmax(dim=-1)
    return select_target(output, target, batch_size, indices=indices).to(dtype)
