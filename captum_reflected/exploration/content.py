"""What the page holds of the measurements, within its size."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from captum_reflected.exploration.encoding import (
    Flow,
    flow_values,
    map_json,
    pack,
    pack_floats,
    picture_uri,
    quantise_flow,
)
from captum_reflected.exploration.measuring import ClassMeasurements, Measurements
from captum_reflected.masking.reflection import replace_diagonal
from captum_reflected.visualization.text import printable

# Relevance that would not fit even if it were compressed to this share is not encoded at all.
_BEST_COMPRESSION = 0.2


@dataclass(frozen=True)
class Content:
    """What the script of the page reads, and what the page says about it.

    Attributes:
        labels: short names of the classes, one line each.
        data: as JSON.
        notes: sentences that say how exact the values are, and what was left out.
    """

    labels: tuple[str, ...]
    data: str
    notes: tuple[str, ...]


def make_content(measured: Measurements, room: int) -> Content:
    """Chooses and encodes what the page holds.

    Most of it is relevance among tokens. It is added as long as there is room: that of the
    explained class, if need be in blocks of tokens; that of the other classes; and that after each
    layer.

    Args:
        measured: all that was measured.
        room: bytes that the data may have.

    Raises:
        ValueError: even without the other classes and the layers, there is not enough room.
    """
    grid = measured.grid_size
    labels = _labels([one.name for one in measured.classes])
    classes = [_class_json(one, label) for one, label in zip(measured.classes, labels, strict=True)]
    data = {
        "grid": grid,
        "ground": (measured.ground * 255).round().int().tolist(),
        "photo": picture_uri(measured.picture),
        "blurred": picture_uri(measured.blurred, quality=80),
        "methods": [printable(method) for method in measured.methods],
        "counts": measured.counts,
        "classes": classes,
        "firstLayer": measured.first_layer,
        "layers": None,
    }
    left = room - len(_json(data))
    flows: list[Flow] = []
    for place, one in enumerate(measured.classes):
        # The other classes are shown as the explained one is, or not at all.
        blocks = [flows[0].block] if flows else range(1, max(grid) + 1)
        flow = _first_that_fits(one.relevance, grid, blocks, left)
        if flow is None:
            break
        flows.append(flow)
        classes[place]["flow"] = flow.to_json()
        left -= len(_json(classes[place]["flow"]))
    if not flows:
        raise ValueError(
            f"a grid of {grid[0]} x {grid[1]} tokens, {len(measured.methods)} methods and "
            f"{len(classes)} classes do not fit into one page; wanted: fewer of them"
        )
    layers = _layers_that_fit(measured.partial[:-1], grid, flows[0].block, left)
    if layers is not None:
        data["layers"] = [layer.to_json() for layer in layers]
    return Content(labels, _json(data), tuple(_notes(measured, labels, flows, layers)))


def _labels(names: Sequence[str]) -> tuple[str, ...]:
    """The first of the names that ImageNet has for a class, if that tells the classes apart."""
    first = [printable(name.split(",")[0].strip()) for name in names]
    is_unique = all(first) and len(set(first)) == len(first)
    return tuple(first if is_unique else map(printable, names))


def _json(data: Any) -> str:
    """JSON in ASCII."""
    return json.dumps(data, separators=(",", ":"), allow_nan=False)


def _class_json(one: ClassMeasurements, label: str) -> dict[str, Any]:
    return {
        "name": label,
        "logit": one.logit,
        "probability": one.probability,
        "scores": pack_floats(one.scores),
        "outputRows": [map_json(row) for row in one.output_rows],
        "maps": [map_json(values) for values in one.maps],
        "orders": [pack(order.numpy().astype(np.uint16)) for order in one.orders],
        "deletion": _rounded(one.deletion),
        "insertion": _rounded(one.insertion),
        "flow": None,
    }


def _rounded(curves: Tensor) -> list[list[float]]:
    return [[round(value, 6) for value in curve] for curve in curves.tolist()]


def _first_that_fits(
    relevance: Tensor, grid: tuple[int, int], blocks: Iterable[int], room: int
) -> Flow | None:
    """The flow of relevance (J, J) over the first blocks with which it fits; None if none does."""
    for block in blocks:
        if _least_size(grid, block) > room:
            continue
        flow = quantise_flow(flow_values(relevance, grid, block), relevance.diagonal(), block)
        if len(_json(flow.to_json())) <= room:
            return flow
    return None


def _layers_that_fit(
    relevance: Tensor, grid: tuple[int, int], block: int, room: int
) -> list[Flow] | None:
    """The flows of relevance (L, J, J) if all of them fit."""
    if len(relevance) * _least_size(grid, block) > room:
        return None
    layers: list[Flow] = []
    for layer in relevance:
        flow = _first_that_fits(layer, grid, [block], room)
        if flow is None:
            return None
        room -= len(_json(flow.to_json())) + 1
        layers.append(flow)
    return layers


def _least_size(grid: tuple[int, int], block: int) -> float:
    rows, columns = grid
    receivers = -(-rows // block) * -(-columns // block)
    return rows * columns * receivers * 4 / 3 * _BEST_COMPRESSION


def _notes(
    measured: Measurements,
    labels: Sequence[str],
    flows: Sequence[Flow],
    layers: Sequence[Flow] | None,
) -> Iterable[str]:
    rows, columns = measured.grid_size
    error = max(flow.error for flow in [*flows, *(layers or ())])
    yield (
        "Relevance between patches is stored in 8 bits, on a square-root scale from the smallest "
        "to the largest value of each patch that it comes from. The largest rounding error on "
        f"this page is {_percent(error)} of the largest value of that patch."
    )
    yield (
        "Maps, and what has reached the output after each layer, are stored in 8 bits from their "
        f"lowest to their highest value; the rounding error is at most {_percent(1 / 510)} of that "
        "range. Scores, probabilities, and the places of the patches are those that were "
        "computed. The photo is a JPEG of what the model received; the model ran on the exact "
        "values."
    )
    empty = [
        label
        for label, one in zip(labels, measured.classes, strict=True)
        if not replace_diagonal(one.relevance.unsqueeze(0)).any()
    ]
    if empty:
        yield (
            f"Nothing flows between patches for {', '.join(empty)}: the reflected images are "
            "empty, and their scores are that of an image without content. This is so if the "
            "roll-out starts at the last layer (start_layer)."
        )
    block = flows[0].block
    if block > 1:
        yield (
            f"Reduced: {rows} × {columns} patches are too many for relevance from each to each. "
            f"On the receiving side, it is the mean over blocks of {block} × {block} patches, and "
            "so are the reflected images that are drawn. Their scores belong to the exact masks."
        )
    if len(flows) < len(labels):
        some = labels[: len(flows)]
        yield (
            f"Reduced: with {rows} × {columns} patches, relevance between patches, and so the "
            f"reflected images, fit into the page for {len(some)} of {len(labels)} "
            f"classes: {', '.join(some)}. Scores, maps and curves are there for all of them."
        )
    if layers is None:
        yield (
            f"Reduced: with {rows} × {columns} patches, relevance between patches fits into the "
            "page only after the last layer. After each layer, there is what has reached the "
            "output."
        )
    elif len(labels) > 1 and layers:
        yield (
            "Relevance between patches after each layer is stored for one class, the explained "
            f"one: {labels[0]}."
        )


def _percent(share: float) -> str:
    return f"{share:.2%}".replace("%", "\u00a0%")
