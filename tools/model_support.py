"""Which architectures of timm can be explained: tries every one and writes a table.

Run as ``python tools/model_support.py``. Every architecture is built at its
real size on the meta device, where the shapes of its attention maps decide. Those whose
shapes allow it are then explained: with depth 2 and narrow where the constructor takes
that, else at real size up to a bound on memory.
"""

from __future__ import annotations

import argparse
import os
import re
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from captum_reflected._writing import write_whole
from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.shapes import check_shapes
from captum_reflected.attr import TransformerAttribution
from captum_reflected.inputs.batch import make_batch

# Tried in turn; architectures differ in what their constructors take.
_SMALLER: Sequence[Mapping[str, Any]] = (
    {"depth": 2, "embed_dim": 64, "num_heads": 2},
    {"depth": 2},
    {},
)
_MAX_PARAMETERS = 100_000_000

# Held against attention maps obtained another way in tests/test_model_families.py.
_OTHER_LIBRARIES = (
    ("torchvision", "VisionTransformer", "class"),
    ("transformers", "ViTForImageClassification", "class"),
    ("transformers", "DeiTForImageClassification", "class"),
    ("transformers", "DeiTForImageClassificationWithTeacher", "distilled"),
    ("transformers", "BeitForImageClassification", "mean or class"),
    ("transformers", "Dinov2ForImageClassification", "class_mean"),
    ("transformers", "Dinov2WithRegistersForImageClassification", "class_mean"),
    ("transformers", "SiglipForImageClassification", "mean"),
    ("transformers", "SiglipVisionModel", "attention"),
    ("transformers", "CLIPForImageClassification", "mean"),
    ("transformers", "CLIPVisionModelWithProjection", "class"),
    ("transformers", "CLIPModel, image and text in one forward", "class"),
    ("open_clip", "VisionTransformer", "class, mean or attention"),
    ("open_clip", "CLIP, image and text in one forward", "class"),
)


@dataclass(frozen=True)
class Support:
    """What became of one architecture.

    Attributes:
        name: in timm.
        family: timm module and class.
        readout: where its answer is read, if it is explained.
        reason: why not, if it is refused.
        how: ``"small"``, ``"real size"`` or ``"shapes only"``; empty if it is refused.
    """

    name: str
    family: tuple[str, str]
    readout: str = ""
    reason: str = ""
    how: str = ""


def examine(name: str) -> Support:
    """Tries to explain one architecture of timm, with random weights.

    Args:
        name: an architecture that ``timm.list_models`` lists.

    Returns:
        Support: explained with its readout, or refused with the reason.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with torch.device("meta"):
            model = timm.create_model(name).eval()
        size = model.pretrained_cfg.get("input_size", (3, 224, 224))
        module = timm.model_entrypoint(name).__module__.rpartition(".")[2]
        family = (module, type(model).__name__)
        num_parameters = sum(parameter.numel() for parameter in model.parameters())
        try:
            check_shapes(_attention_shapes(model, size), batch_size=1)
            model, how = _runnable(name, num_parameters)
            if model is None:
                return Support(name, family, how="shapes only")
            return Support(name, family, readout=_readout(model, size), how=how)
        except ValueError as error:  # UnsupportedModelError is one
            return Support(name, family, reason=re.split(": |; wanted", str(error))[0])


# Kinds of modules that were seen to hold no attention: a deeper or wider sister has none.
_without_attention: set[frozenset[type[nn.Module]]] = set()


def _attention_shapes(model: nn.Module, size: tuple[int, int, int]) -> list[tuple[int, ...]]:
    """The shapes of the attention maps for one image, on the meta device."""
    shapes: list[tuple[int, ...]] = []

    def observe(attention: Tensor) -> Tensor:
        shapes.append(tuple(attention.shape))
        return attention

    kinds = frozenset(type(module) for module in model.modules())
    if kinds not in _without_attention:
        with AttentionMode(observe), torch.no_grad():
            model(torch.zeros(1, *size, device="meta"))
        if not shapes:
            _without_attention.add(kinds)
    return shapes


def _runnable(name: str, num_parameters: int) -> tuple[nn.Module | None, str]:
    """The smallest version of an architecture that its constructor makes, and how small."""
    for options in _SMALLER:
        if not options and num_parameters > _MAX_PARAMETERS:
            break
        try:
            model = timm.create_model(name, num_classes=3, **options)
        except (TypeError, ValueError, AssertionError, RuntimeError, IndexError):
            continue
        with torch.no_grad():  # some heads start at zero
            for parameter in model.parameters():
                parameter.normal_(std=0.1 if options else 0.02)
        return model.eval(), "small" if options else "real size"
    return None, ""


def _readout(model: nn.Module, size: tuple[int, int, int]) -> str:
    """Explains a model; where its answer is read."""
    images = torch.randn(1, *size)
    with torch.no_grad():
        answer = model(images)
    # An encoder without a classifier gives features, of which any one can be explained.
    target = (0,) * (answer.dim() - 1)
    found = TransformerAttribution(model).layer_relevance(make_batch(images, target, None))
    return str(found.layout.readout)


def sweep(names: Sequence[str], jobs: int) -> list[Support]:
    """Examines architectures in ``jobs`` processes, each with one thread.

    Args:
        names: architectures of timm.
        jobs: number of processes.

    Returns:
        list[Support]: in the order of the names.
    """
    with ProcessPoolExecutor(jobs, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        return list(pool.map(examine, names, chunksize=4))


def report(results: Sequence[Support]) -> str:
    """The table of :func:`sweep` as Markdown, one line a family."""
    explained = [result for result in results if not result.reason]
    by_shape = [result.name for result in explained if result.how == "shapes only"]
    lines = [
        "# Supported architectures",
        "",
        f"Written by `python tools/model_support.py` with timm {timm.__version__} and "
        f"torch {torch.__version__.partition('+')[0]}.",
        "",
        f"Of {len(results)} architectures in timm, {len(explained)} are explained and "
        f"{len(results) - len(explained)} are refused with an error that gives the reason.",
        "",
        "Explained means: at real size, every attention map has the shape (B, h, N, N) of one "
        "set of tokens, and a version with random weights (depth 2 if the constructor has this "
        f"option) was explained: {sum(r.how == 'small' for r in explained)} at reduced size, "
        f"{sum(r.how == 'real size' for r in explained)} at real size. Classified by their shapes "
        "only, because they cannot be made smaller and are too large to run here: "
        f"{', '.join(by_shape) or 'none'}.",
        "",
        "A convolutional stem or earlier stage counts as the patch embedding. R follows attention "
        "only. It does not include what convolutions between attention layers move from token to "
        "token.",
        "",
        "The read-outs are explained in `captum_reflected.TokenLayout`.",
        "",
        "## timm",
        "",
        "| module | class | explained | refused | read-out | reason of refusal |",
        "|---|---|--:|--:|---|---|",
        *(_line(family, list(group)) for family, group in _families(results)),
        "",
        "## Other libraries",
        "",
        "Tested with small models of random weights. The `transformers` models are passed as they "
        "are, with `attn_implementation` `sdpa` and `eager`.",
        "",
        "| library | class | read-out |",
        "|---|---|---|",
        *(f"| {library} | {name} | {readout} |" for library, name, readout in _OTHER_LIBRARIES),
        "",
    ]
    return "\n".join(lines)


def _families(results: Sequence[Support]) -> Iterator[tuple[tuple[str, str], Iterator[Support]]]:
    return groupby(sorted(results, key=lambda r: r.family), key=lambda r: r.family)


def _line(family: tuple[str, str], members: Sequence[Support]) -> str:
    refused = [member for member in members if member.reason]
    readouts = sorted({member.readout for member in members if member.readout})
    reasons = sorted({member.reason for member in refused})
    return (
        f"| {family[0]} | {family[1]} | {len(members) - len(refused)} | {len(refused)} "
        f"| {', '.join(readouts)} | {'; '.join(reasons)} |"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Sweeps all of timm, writes the table and prints the time it took."""
    parser = argparse.ArgumentParser(
        prog="python tools/model_support.py",
        description="Tries every architecture of timm and writes which ones are explained.",
    )
    parser.add_argument("--output", type=Path, default=Path("docs/model_support.md"))
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--filter", default="", help="only names that this pattern matches")
    options = parser.parse_args(arguments)
    start = time.perf_counter()
    results = sweep(timm.list_models(options.filter), options.jobs)
    options.output.parent.mkdir(parents=True, exist_ok=True)
    write_whole(options.output, report(results).encode())
    explained = sum(not result.reason for result in results)
    print(
        f"{options.output}: {explained} explained, {len(results) - explained} refused, "
        f"{time.perf_counter() - start:.0f} s"
    )


if __name__ == "__main__":
    main()
