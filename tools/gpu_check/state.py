"""What an explanation leaves alone or works with: random state, threads, streams, torch.compile."""

from __future__ import annotations

import threading
from contextlib import nullcontext
from typing import Any

import timm
import torch
from torch import Tensor, nn

from captum_reflected import (
    AttentionGradCam,
    AttentionRollout,
    BalancedRelevance,
    MaskRegression,
    RawAttention,
    ReflectedRelevance,
    TransformerAttribution,
)
from gpu_check.accuracy import deviation
from gpu_check.precision import tf32
from gpu_check.registry import Context, Report, Skipped, check

ATTRIBUTORS: tuple[Any, ...] = (
    TransformerAttribution,
    ReflectedRelevance,
    MaskRegression,
    BalancedRelevance,
    AttentionRollout,
    RawAttention,
    AttentionGradCam,
)
_REPEATS = 5


def small_model(device: torch.device, **options: Any) -> tuple[nn.Module, Tensor]:
    """A small random Vision Transformer, and three images for it."""
    generator = torch.Generator().manual_seed(0)
    model = timm.models.VisionTransformer(
        img_size=32, patch_size=8, embed_dim=32, depth=3, num_heads=4, num_classes=7, **options
    )
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(0.2 * torch.randn(parameter.shape, generator=generator))
    images = torch.randn(3, 3, 32, 32, generator=generator)
    return model.eval().to(device), images.to(device)


def _states(device: torch.device) -> list[Tensor]:
    """The states of all random generators."""
    on_gpu = torch.cuda.get_rng_state_all() if device.type == "cuda" else []
    return [torch.get_rng_state(), *on_gpu]


@check("random-state", "the random state of CPU and device is unchanged by an explanation", 10)
def random_state(context: Context, report: Report) -> None:
    """With dropout in train mode, which draws on the device in every forward."""
    model, images = small_model(context.device, proj_drop_rate=0.5, attn_drop_rate=0.5)
    changed = 0
    for mode in (True, False):
        model.train(mode)
        for attributor in ATTRIBUTORS:
            before = _states(context.device)
            attributor(model).attribute(images, 1)
            after = _states(context.device)
            if not all(map(torch.equal, before, after)):
                changed += 1
                report.problems.append(
                    f"{attributor.__name__} changed the random state, train mode {mode}"
                )
    before = _states(context.device)
    model.train()
    with torch.no_grad():
        model(images)
    drew = not all(map(torch.equal, before, _states(context.device)))
    report.measured("explanations that changed it", changed, most=0)
    report.measured("plain forwards that change it, as they should", int(drew), least=1)


@check("threads", "two threads, each on a stream of its own, get the maps of one", 15)
def threads(context: Context, report: Report) -> None:
    """Each attributor, on one model."""
    device = context.device
    model, images = small_model(device)
    for attributor in ATTRIBUTORS:
        with tf32(device, enabled=False):
            alone = [attributor(model).attribute(images, target) for target in (1, 5)]
            if context.on_gpu:
                torch.cuda.synchronize(device)
            worst: dict[int, float] = {}
            errors: list[Exception] = []
            barrier = threading.Barrier(2)

            def work(
                place: int,
                attributor: Any = attributor,
                alone: list[Tensor] = alone,
                worst: dict[int, float] = worst,
                errors: list[Exception] = errors,
                barrier: threading.Barrier = barrier,
            ) -> None:
                try:
                    barrier.wait(60)
                    stream = torch.cuda.Stream(device) if context.on_gpu else None
                    with nullcontext() if stream is None else torch.cuda.stream(stream):
                        for _ in range(_REPEATS):
                            found = attributor(model).attribute(images, (1, 5)[place])
                            off = deviation(found, alone[place])
                            worst[place] = max(worst.get(place, 0.0), off)
                except Exception as raised:
                    errors.append(raised)

            workers = [threading.Thread(target=work, args=(place,)) for place in range(2)]
            for worker in workers:
                worker.start()
            for worker in workers:
                worker.join()
        report.problems += [f"{attributor.__name__}: {error!r}" for error in errors]
        if not errors:
            report.measured(f"{attributor.__name__}: off by", max(worst.values()), most=1e-4)


@check("compile", "a model of torch.compile is explained as the model itself", 60)
def compiled(context: Context, report: Report) -> None:
    """By the default compiler on a GPU; elsewhere, by the one that needs no C++ compiler."""
    model, images = small_model(context.device)
    backend = "inductor" if context.on_gpu else "aot_eager"
    _need_compiler(backend, context.device)
    fast: Any = torch.compile(model, backend=backend)
    with tf32(context.device, enabled=False):
        with torch.no_grad():
            fast(images)
        for attributor in ATTRIBUTORS:
            # MaskRegression leaves hidden tokens out of models that are known to allow it.
            options = {"baselines": 0.0} if attributor is MaskRegression else {}
            expected = attributor(model).attribute(images, 1, **options)
            found = attributor(fast).attribute(images, 1, **options)
            report.measured(
                f"{attributor.__name__}, {backend}: off by", deviation(found, expected), most=1e-3
            )


def _need_compiler(backend: str, device: torch.device) -> None:
    """Skips the check where nothing can be compiled: Triton needs a C compiler and headers."""
    try:
        torch.compile(torch.sin, backend=backend)(torch.ones(8, device=device))
    except Exception as error:
        said = str(error).strip().splitlines() or [""]
        raise Skipped(
            f"torch.compile does not work here: {type(error).__name__}: {said[0][:300]}"
        ) from error
