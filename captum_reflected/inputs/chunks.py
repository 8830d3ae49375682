"""Runs many rows through a model in chunks that fit into memory."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_reflected._captum import progress_bar
from captum_reflected.inputs.checks import check_positive


def in_chunks(
    run: Callable[[int, int], Tensor],
    total: int,
    rows: int,
    *,
    description: str,
    show_progress: bool,
) -> Tensor:
    """Runs rows in order, in chunks of ``rows``; halves the chunks when memory runs out.

    Args:
        run: a function from (start, stop) to the results of these rows, first dimension
            stop - start.
        total: number of rows.
        rows: maximal number of rows in a chunk.
        description: label of the progress bar.
        show_progress: whether to show a progress bar.

    Returns:
        Tensor: all results, first dimension ``total``.

    Raises:
        torch.OutOfMemoryError: a single row does not fit into memory.
    """
    results: list[Tensor] = []
    done, initial_rows = 0, rows
    # The progress bar counts rows, since the number of chunks changes when they are halved.
    with progress_bar(description=description, total=total, show=show_progress) as bar:
        while done < total:
            stop = min(done + rows, total)
            outcome = _attempt(run, done, stop)
            if isinstance(outcome, Tensor):
                results.append(outcome)
                bar.update(stop - done)
                done = stop
                continue
            failed = stop - done
            if failed == 1:
                raise torch.OutOfMemoryError(
                    f"out of memory with a single image in a forward ({outcome}); wanted: more "
                    "free memory, smaller images, or a smaller model or half the precision "
                    "(model.bfloat16())"
                )
            if rows == initial_rows:
                warnings.warn(
                    f"out of memory with {failed} images in a forward; continuing with fewer, "
                    "which gives the same result. A smaller perturbations_per_eval or "
                    "max_examples_per_batch avoids the failed attempt",
                    stacklevel=2,
                )
            rows = failed // 2
    return torch.cat(results)


def _attempt(run: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor | str:
    """The result, or the error message if memory ran out; the failed rows are freed by then."""
    try:
        return run(start, stop)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    # The CPU allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def default_rows_per_forward(device: torch.device) -> int:
    """Default number of images in one forward: few fit a CPU's cache, many fill a GPU."""
    return 16 if device.type == "cpu" else 128


def rows_per_forward(max_examples_per_batch: Any, device: torch.device) -> int:
    """The checked ``max_examples_per_batch``; the default for the device if it is None."""
    if max_examples_per_batch is None:
        return default_rows_per_forward(device)
    return check_positive("max_examples_per_batch", max_examples_per_batch)
