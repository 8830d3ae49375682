"""What a benchmark measures: written beside its rows, and compared when it is taken up again."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from captum_reflected._writing import write_whole
from captum_reflected.benchmark.rows import SETTINGS_FILE, VERSION, check_version
from captum_reflected.errors import BenchmarkError

Target = Literal["predicted", "label"]
Precision = Literal["float32", "bf16", "fp16"]
TARGETS: tuple[Target, ...] = get_args(Target)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Settings:
    """All that the figures of a run depend on.

    Attributes:
        captum_reflected: this package's version.
        model: its name.
        weights: digest of its parameters and buffers, see :func:`weights_digest`.
        data: name, number of images and fingerprint of the whole set.
        images: how many of them are evaluated, evenly spread over the set.
        methods: names of attribution methods.
        metrics: names of metrics.
        target: ``"predicted"`` or ``"label"``: the class that is explained and scored.
        precision: of the model's forwards, in attributions and in metrics.
        batch_size: images that go through the model together; other numbers round otherwise.
        gallery: how many images are kept as pictures with their maps.
        half: ``"choosing"``: images of even number, ``"confirming"``: of odd number, see
            ``tools/study.py``; None: all.
    """

    captum_reflected: str
    model: str
    weights: str
    data: dict[str, Any]
    images: int
    methods: list[str]
    metrics: list[str]
    target: Target
    precision: Precision
    batch_size: int
    gallery: int
    half: str | None = None


def weights_digest(model: nn.Module) -> str:
    """A digest of the parameters and buffers of a model, whatever device they are on.

    A zero-shot model holds its classes as a tensor, so they count as well.

    Args:
        model: any module.

    Returns:
        str: 16 hexadecimal digits of SHA-256 over names, types, shapes and values.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()[:16]


def read_settings(folder: Path) -> dict[str, Any] | None:
    """The settings of a benchmark's folder, or None where none has begun there.

    Raises:
        BenchmarkError: the file is damaged, or of another version.
    """
    path = folder / SETTINGS_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        settings = stored["settings"]
    except FileNotFoundError:
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise BenchmarkError(f"{path} does not hold a benchmark's settings: {error!r}") from None
    check_version(path, stored)
    known: dict[str, Any] = settings
    return known


def begin_or_continue(folder: Path, settings: Settings) -> None:
    """Writes the settings into a new folder, or checks that those there are the same.

    Args:
        folder: made if missing.
        settings: of this run.

    Raises:
        BenchmarkError: the folder holds a run with other settings, or something else; the
            message shows both.
        OSError: the folder cannot be written.
    """
    wanted = asdict(settings)
    stored = read_settings(folder)
    if stored is None:
        if folder.exists() and any(folder.glob("rows-*")):
            raise BenchmarkError(
                f"{folder} holds rows and no {SETTINGS_FILE}; wanted: a new folder"
            )
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, "settings": wanted}, indent=2)
        write_whole(folder / SETTINGS_FILE, f"{text}\n".encode())
        return
    ours, theirs = _what_counts(wanted), _what_counts(stored)
    differing = [name for name in {**theirs, **ours} if theirs.get(name) != ours.get(name)]
    if differing:
        lines = [
            f"  {name}: {json.dumps(stored.get(name))} there, {json.dumps(wanted.get(name))} now"
            for name in differing
        ]
        raise BenchmarkError(
            f"{folder} holds a run with other settings; wanted: the same, or another --output\n"
            + "\n".join(lines)
        )


def _what_counts(settings: dict[str, Any]) -> dict[str, Any]:
    """Without where the data lies: the same data may be named by another path."""
    data = settings.get("data")
    if not isinstance(data, dict):
        return settings
    return {**settings, "data": {key: value for key, value in data.items() if key != "name"}}
