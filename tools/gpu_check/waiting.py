"""Where the program waits for the device: nowhere in the loop over masks, and how often beside it.

Every wait empties the queue of a GPU. Where there is no GPU, the simulated device shows the waits.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from captum_reflected import (
    AttentionRollout,
    BalancedRelevance,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
    score_masks,
)
from captum_reflected.inputs import chunks
from captum_reflected.masking import scoring
from captum_reflected.metrics import evaluate, perturbation
from gpu_check import simulated
from gpu_check.registry import Context, Report, Skipped, check
from gpu_check.state import small_model


@contextmanager
def waits(device: torch.device) -> Iterator[list[simulated.Wait]]:
    """Records every wait for the device in the block, with the place that caused it."""
    if device.type != "cuda":
        with simulated.waits() as log:
            yield log
        return
    found: list[simulated.Wait] = []

    def show(message: Warning | str, *_: Any, **__: Any) -> None:
        if "synchronizing CUDA operation" in str(message):
            found.append(simulated.Wait("", simulated.place()))

    before = torch.cuda.get_sync_debug_mode()
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = show
        torch.cuda.set_sync_debug_mode("warn")
        try:
            yield found
        finally:
            torch.cuda.set_sync_debug_mode(before)


@contextmanager
def no_waits(device: torch.device) -> Iterator[None]:
    """Raises RuntimeError if the block waits for the device."""
    if device.type == "cuda":
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode(before)
        return
    with simulated.waits() as log:
        yield
    if log:
        wait = log[0]
        raise RuntimeError(f"{wait.operation} waits for the device, called at {wait.place}")


@contextmanager
def loops_without_waits(device: torch.device) -> Iterator[list[int]]:
    """Forbids waits inside the loops over masked images; yields the number of rows of each chunk.

    The loops of the metrics run in the same function, ``in_chunks``.
    """
    sizes: list[int] = []

    def guarded(run: Callable[[int, int], Tensor], total: int, rows: int, **options: Any) -> Tensor:
        def counted(start: int, stop: int) -> Tensor:
            sizes.append(stop - start)
            return run(start, stop)

        with no_waits(device):
            return chunks.in_chunks(counted, total, rows, **options)

    with (
        mock.patch.object(scoring, "in_chunks", guarded),
        mock.patch.object(perturbation, "in_chunks", guarded),
    ):
        yield sizes


@check("waits", "nothing waits for the device inside the loop over masks", 20)
def waits_of_the_loop(context: Context, report: Report) -> None:
    """Each way to score masks, and then how often each attributor waits in a call."""
    if context.device.type == "cpu":
        _on_simulated_device(report)
        return
    device = context.device
    model, images = small_model(device)
    targets = torch.tensor([0, 1, 2])
    few: dict[str, Any] = {"perturbations_per_eval": 5}
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(40, 4, 4, generator=generator).to(device)
    maps = torch.rand(3, *images.shape[-2:], generator=generator).to(device)

    def explain(attributor: Any, **options: Any) -> Callable[[], object]:
        return lambda: attributor.attribute(images, targets, **few, **options)

    loops: dict[str, Callable[[], object]] = {
        "ReflectedRelevance": explain(ReflectedRelevance(model)),
        'ReflectedRelevance, precision="bf16"': explain(
            ReflectedRelevance(model, precision="bf16")
        ),
        "ReflectedRelevance, generic path": explain(ReflectedRelevance(lambda x: model(x))),
        "MaskRegression": explain(MaskRegression(model)),
        "MaskRegression, baselines": explain(MaskRegression(model), baselines=images / 2),
        "score_masks, targets on the device": lambda: score_masks(
            model, images, masks, targets.to(device), score="probability", **few
        ),
        "evaluate": lambda: evaluate(model, images, maps, target=targets, max_examples_per_batch=9),
    }
    for title, work in loops.items():
        work()  # what is proved once a model is not part of the loop
        with loops_without_waits(device) as sizes:
            work()
        report.measured(f"{title}: chunks without a wait", len(sizes), least=2)
    for attributor in (
        TransformerAttribution,
        BalancedRelevance,
        AttentionRollout,
        ReflectedRelevance,
        MaskRegression,
    ):
        explainer: Any = attributor(model)
        explainer.attribute(images, targets)
        with waits(device) as found:
            explainer.attribute(images, targets)
        report.measured(f"{attributor.__name__}: waits in a call", len(found))
        places = Counter(f"{wait.operation} {wait.place}".strip() for wait in found)
        report.notes += [f"{attributor.__name__}: {n} x {where}" for where, n in places.items()]


def _on_simulated_device(report: Report) -> None:
    """The same check in a process of its own: the device stays registered in a process."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "waits.json"
        done = subprocess.run(
            [
                *(sys.executable, str(Path(__file__).parent)),
                *("--device", simulated.NAME, "--only", "waits", "--output", str(output)),
            ],
            capture_output=True,
            text=True,
            check=False,
        )
        if not output.is_file():
            if "does not allow devices in Python" in done.stderr:
                raise Skipped(done.stderr.strip().splitlines()[-1])
            raise RuntimeError(f"the simulated device could not be used: {done.stderr[-2000:]}")
        (entry,) = json.loads(output.read_text(encoding="utf-8"))["checks"]
    for figure in entry["figures"]:
        report.measured(figure["name"], figure["value"], least=figure["least"], most=figure["most"])
    report.notes += ["on the simulated device", *entry["notes"]]
    report.problems += [problem for problem in entry["problems"] if ", wanted: " not in problem]
