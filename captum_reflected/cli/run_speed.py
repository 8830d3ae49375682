"""Runs the command ``captum-reflected speed``."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from collections.abc import Callable
from pathlib import Path

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from captum_reflected._writing import write_whole
from captum_reflected.cli.options import resolve_device
from captum_reflected.cli.parsing import EXIT_OK
from captum_reflected.cli.speed_report import (
    bf16_agreement,
    large_image,
    random_model,
    scaling,
    speed_table,
)
from captum_reflected.errors import UsageError
from captum_reflected.models import ModelLoadError, load_model


def run_command(arguments: argparse.Namespace) -> int:
    """Measures what the options ask for, prints it, and writes it to a file."""
    device = resolve_device(arguments.device)
    if not (arguments.table or arguments.photos or arguments.image_size or arguments.scaling):
        raise UsageError(
            "--no-table leaves nothing to measure; wanted: --photos, --image-size or --scaling"
        )
    if (arguments.scaling or arguments.image_size) and not timm.is_model(arguments.model):
        raise ModelLoadError(
            f"{arguments.model!r} cannot be created in other sizes; wanted: a name that timm knows"
        )
    before = torch.get_float32_matmul_precision()
    if arguments.tf32:
        torch.set_float32_matmul_precision("high")
    try:
        text = _measured(arguments, device)
    finally:
        torch.set_float32_matmul_precision(before)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, f"{text}\n".encode())
    return EXIT_OK


def _measured(arguments: argparse.Namespace, device: torch.device) -> str:
    model, transform = _load(arguments, device)
    size = transform(Image.new("RGB", (512, 512))).shape
    texts = [f"{_machine(device)}."]
    if arguments.table:
        texts.append(
            speed_table(
                model,
                size,
                device,
                name=arguments.model,
                batch_size=arguments.batch_size,
                precision=arguments.precision,
                repeats=arguments.repeats,
                others=arguments.others,
            )
        )
    if arguments.photos:
        texts.append(bf16_agreement(model, transform, arguments.photos, device))
    if arguments.image_size:
        texts.append(large_image(arguments.model, arguments.image_size, device))
    if arguments.scaling:
        texts.append(scaling(arguments.model, device, arguments.scaling))
    return "\n\n".join(texts)


def _load(
    arguments: argparse.Namespace, device: torch.device
) -> tuple[nn.Module, Callable[[Image.Image], Tensor]]:
    if not arguments.random_weights:
        loaded = load_model(arguments.model, weights=arguments.weights, device=device)
        return loaded.model, loaded.transform
    model = random_model(arguments.model, device)
    return model, create_transform(**resolve_model_data_config(model), is_training=False)


def _machine(device: torch.device) -> str:
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, {versions}"
    name = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            (line.partition(":")[2].strip() for line in lines if line.startswith("model name")),
            name,
        )
    capability = torch.backends.cpu.get_cpu_capability()
    cores = f"{torch.get_num_threads()} of {os.cpu_count()} cores"
    busy = f"{os.getloadavg()[0]:.1f}" if hasattr(os, "getloadavg") else "unknown"
    return f"{name} ({capability}), {cores}, load average before the run {busy}, {versions}"
