"""The logits of a classifier, for code that needs those of all classes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from captum_reflected.inputs.batch import Batch, preserving_state
from captum_reflected.inputs.checks import check_finite
from captum_reflected.inputs.outputs import not_logits, run_model


def class_logits(forward_func: Callable[..., Any], batch: Batch, *, wanted: str) -> Tensor:
    """Runs a classifier once, without gradients; its state is kept.

    Args:
        forward_func: any function of the images.
        batch: B images, and further arguments.
        wanted: the end of the error about an output of another shape.

    Returns:
        Tensor: (B, K), float32 or float64.

    Raises:
        TypeError: the output is no tensor.
        ValueError: it is not (B, K) with K of 2 or more, or not finite.
    """
    with preserving_state(batch, gradients=False, forward_func=forward_func) as call:
        output = run_model(forward_func, call.images, call.args)
        if not isinstance(output, Tensor):
            raise TypeError(not_logits(output))
        if output.dim() != 2 or output.shape[0] != batch.size or output.shape[1] < 2:
            raise ValueError(
                f"forward_func returned shape {tuple(output.shape)} for {batch.size} images; "
                f"wanted: {wanted}"
            )
        logits = output.to(batch.compute_dtype)
    check_finite([logits], "the output of forward_func")
    return logits
