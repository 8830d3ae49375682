"""The command ``captum-reflected speed``: compares the methods' speed with plain forwards."""

from __future__ import annotations

import argparse
import contextlib
import os
import platform
from collections.abc import Callable
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor, nn

from captum_reflected._writing import write_whole
from captum_reflected.cli.options import EXIT_OK, resolve_device, whole_number
from captum_reflected.cli.speed_report import (
    bf16_agreement,
    large_image,
    random_model,
    scaling,
    speed_table,
)
from captum_reflected.errors import UsageError
from captum_reflected.models import ModelLoadError, load_model


def add_speed_command(commands: Any) -> None:
    """Adds the subcommand ``speed``."""
    parser = commands.add_parser(
        "speed",
        description="Measures ReflectedRelevance, TransformerAttribution and the metrics in "
        "comparison with plain forwards of the model and with other methods, in one run, and "
        "prints a table: time, images per second, FLOP/s and their share of the machine's peak, "
        "peak memory.",
    )
    parser.add_argument("--model", default="deit_tiny_patch16_224", metavar="NAME",
                        help="as for explain (default: %(default)s)")  # fmt: skip
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--weights", type=Path, metavar="FILE.safetensors",
                        help="as for explain")  # fmt: skip
    source.add_argument("--random-weights", action="store_true",
                        help="load no weights; speed does not depend on them")  # fmt: skip
    parser.add_argument("--device", default="auto", help="as for explain (default: %(default)s)")
    parser.add_argument("--batch-size", type=whole_number(1), metavar="N",
                        help="batch size of the plain forwards (default: the fastest ones in a "
                        "trial)")  # fmt: skip
    parser.add_argument("--precision", default="both", choices=("float32", "bf16", "both"),
                        help="precision of the reflected forwards (default: %(default)s)"
                        )  # fmt: skip
    parser.add_argument("--repeats", type=whole_number(1), default=3, metavar="N",
                        help="the fastest of N runs counts (default: %(default)s)")  # fmt: skip
    parser.add_argument("--no-others", dest="others", action="store_false",
                        help="leave out other methods")  # fmt: skip
    parser.add_argument("--no-table", dest="table", action="store_false",
                        help="skip the table, and run only the options below")  # fmt: skip
    parser.add_argument("--photos", nargs="+", type=Path, default=[], metavar="IMAGE",
                        help="also compare the maps in bf16 with those in float32")  # fmt: skip
    parser.add_argument("--image-size", type=whole_number(1), metavar="PIXELS",
                        help="also run TransformerAttribution on one image with this side length, "
                        "with random weights")  # fmt: skip
    parser.add_argument("--scaling", type=Path, metavar="FILE.png",
                        help="also measure how the cost scales, and plot it")  # fmt: skip
    parser.add_argument("--output", type=Path, metavar="FILE.md",
                        help="also write the output to this file")  # fmt: skip
    parser.set_defaults(run=lambda arguments: _run(arguments, resolve_device(arguments.device)))


def _run(arguments: argparse.Namespace, device: torch.device) -> int:
    if not (arguments.table or arguments.photos or arguments.image_size or arguments.scaling):
        raise UsageError(
            "--no-table leaves nothing to measure; wanted: --photos, --image-size or --scaling"
        )
    if (arguments.scaling or arguments.image_size) and not timm.is_model(arguments.model):
        raise ModelLoadError(
            f"{arguments.model!r} cannot be created in other sizes; wanted: a name that timm knows"
        )
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
    text = "\n\n".join(texts)
    print(text)
    if arguments.output:
        arguments.output.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.output, f"{text}\n".encode())
    return EXIT_OK


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
