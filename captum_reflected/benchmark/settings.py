"""What a benchmark measures: written beside its rows, and compared when it is taken up again."""

from __future__ import annotations

import hashlib
import json
import os
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import method_key
from captum_reflected.benchmark.rows import ROW_FILES, VERSION, check_version
from captum_reflected.errors import BenchmarkError
from captum_reflected.masking.precision import canonical_precision

Target = Literal["predicted", "label"]
Precision = Literal["float32", "bf16", "fp16"]
TARGETS: tuple[Target, ...] = get_args(Target)
PRECISIONS: tuple[Precision, ...] = get_args(Precision)

SETTINGS_FILE = "settings.json"
GALLERY = "gallery"

PATIENCE = 600.0
"""Seconds that processes of one run wait for each other to start."""

_POLL = 0.2
# Of the data: its folder, and that of its masks.
_PLACES = ("name", "masks")

AUTOCAST_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Processes:
    """Where this process stands among those that share a run.

    Attributes:
        rank: its number.
        count: how many there are.
        local_rank: its number on this node, which picks its GPU.
    """

    rank: int = 0
    count: int = 1
    local_rank: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this process begins the run and says how it ended."""
        return self.rank == 0

    @classmethod
    def started(cls) -> Processes:
        """What torchrun's environment says; one process where it says nothing."""
        return cls(
            rank=int(os.environ.get("RANK", 0)),
            count=int(os.environ.get("WORLD_SIZE", 1)),
            local_rank=int(os.environ.get("LOCAL_RANK", 0)),
        )


@dataclass(frozen=True)
class Settings:
    """All that the figures of a run depend on.

    Attributes:
        captum_reflected: this package's version.
        model: its name.
        weights: digest of its parameters and buffers, see :func:`weights_digest`.
        data: name, number of images and fingerprint of the whole set; the folder of the masks,
            if there is one. Each row holds a digest of its mask.
        images: how many of them are evaluated, evenly spread over the set.
        methods: keys of attribution methods, with their options.
        metrics: keys of metrics.
        target: ``"predicted"`` or ``"label"``: the class that is explained and scored.
        precision: of the model's forwards, in attributions and in metrics.
        batch_size: images that go through the model together; other numbers round otherwise.
        gallery: how many images are kept as pictures with their maps.
        half: ``"choosing"``: images of even number, ``"confirming"``: of odd number, see
            ``tools/study.py``; None: all.
        correct_only: whether images whose predicted class is not their label are left out.
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
    correct_only: bool = False

    def __post_init__(self) -> None:
        """Checks lists and counts, and stores precision and methods by their one name each.

        Runs of the same are then equal, however it was written.
        """
        for name, wanted in (("methods", "names"), ("metrics", "names"), ("images", "a number")):
            value = getattr(self, name)
            names = isinstance(value, list) and all(isinstance(part, str) for part in value)
            if not value or not (names if wanted == "names" else type(value) is int):
                raise ValueError(f"{name} is {value!r}; wanted: {wanted}")
        object.__setattr__(self, "precision", canonical_precision(self.precision))
        object.__setattr__(self, "methods", list(dict.fromkeys(map(method_key, self.methods))))


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


def read_settings(folder: Path) -> Settings | None:
    """The settings of a benchmark's folder, or None where none has begun there.

    Raises:
        BenchmarkError: the file is damaged, or of another version.
        OSError: it cannot be read.
    """
    path = folder / SETTINGS_FILE
    try:
        stored = json.loads(path.read_text(encoding="utf-8"))
        check_version(path, stored)
        settings = Settings(**stored["settings"])
        settings.data["name"], settings.data["fingerprint"]
    except FileNotFoundError:
        return None
    except BenchmarkError:
        raise
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise BenchmarkError(f"{path} does not hold a benchmark's settings: {error}") from None
    return settings


def begin_or_continue(folder: Path, settings: Settings, processes: Processes) -> bool:
    """Writes the settings into a new folder, or checks that those there are the same.

    The first process writes them; the others wait until they see them.

    Args:
        folder: made if missing.
        settings: of this run.
        processes: that share the run.

    Returns:
        bool: whether the run is new.

    Raises:
        BenchmarkError: the folder holds a run with other settings, or something else (the
            message shows both), or is not the folder in which the first process began.
        OSError: the folder cannot be written.
    """
    # Looked for first: another process may write settings and rows meanwhile, in this order.
    has_rows = any(folder.glob(ROW_FILES))
    stored = read_settings(folder)
    if stored is None and has_rows:
        raise BenchmarkError(f"{folder} holds rows and no {SETTINGS_FILE}; wanted: a new folder")
    if stored is None and processes.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        text = json.dumps({"version": VERSION, "settings": asdict(settings)}, indent=2)
        write_whole(folder / SETTINGS_FILE, f"{text}\n".encode())
        return True
    began = time.monotonic()
    while stored is None:
        if time.monotonic() - began > PATIENCE:
            raise BenchmarkError(
                f"process {processes.rank} has not seen within {PATIENCE:.0f} seconds that the "
                f"first one began a run in {folder}; wanted: a folder that all nodes share"
            )
        time.sleep(_POLL)
        stored = read_settings(folder)
    ours, theirs = asdict(settings), asdict(stored)
    differing = [name for name in ours if _compared(ours[name]) != _compared(theirs[name])]
    if differing:
        lines = [
            f"  {name}: {json.dumps(theirs[name])} there, {json.dumps(ours[name])} now"
            for name in differing
        ]
        raise BenchmarkError(
            f"{folder} holds a run with other settings; wanted: the same, or another --output\n"
            + "\n".join(lines)
        )
    return False


def _compared(value: Any) -> Any:
    """Without where the data lies: the same data may be named by another path."""
    if not isinstance(value, dict):
        return value
    return {key: None if key in _PLACES else inner for key, inner in value.items()}
