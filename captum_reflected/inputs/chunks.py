"""Many rows through a model, as many at a time as memory allows."""

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
    """Runs rows in order, ``rows`` at a time, in halves where memory does not suffice.

    Args:
        run: from (start, stop) to the results of these rows, first dimension stop - start.
        total: number of rows.
        rows: how many to run at a time, at most.
        description: of the progress bar.
        show_progress: whether a progress bar is shown.

    Returns:
        Tensor: all results, first dimension ``total``.

    Raises:
        torch.OutOfMemoryError: a single row does not fit into memory.
    """
    results: list[Tensor] = []
    done, wanted = 0, rows
    # The bar counts rows: how many chunks there are changes where they are halved.
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
            if rows == wanted:
                warnings.warn(
                    f"out of memory with {failed} images in a forward, so that fewer are taken; "
                    "the result is the same. A smaller perturbations_per_eval or "
                    "max_examples_per_batch saves the failed attempt",
                    stacklevel=2,
                )
            rows = failed // 2
    return torch.cat(results)


def _attempt(run: Callable[[int, int], Tensor], start: int, stop: int) -> Tensor | str:
    """The result, or what was said where memory ran out; by then the failed rows are freed."""
    try:
        return run(start, stop)
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        return str(error).splitlines()[0] if str(error) else type(error).__name__


def _is_out_of_memory(error: Exception) -> bool:
    # A CPU's allocator raises a plain RuntimeError.
    return isinstance(error, (MemoryError, torch.OutOfMemoryError)) or (
        "DefaultCPUAllocator: can't allocate memory" in str(error)
    )


def default_rows_per_forward(device: torch.device) -> int:
    """How many images one forward should see: few fit a CPU's cache, many fill a GPU."""
    return 16 if device.type == "cpu" else 128


def rows_per_forward(max_examples_per_batch: Any, device: torch.device) -> int:
    """The caller's ``max_examples_per_batch``, checked; what suits the device where it is None."""
    if max_examples_per_batch is None:
        return default_rows_per_forward(device)
    return check_positive("max_examples_per_batch", max_examples_per_batch)
