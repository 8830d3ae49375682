"""Explains and scores a block of images: their rows, and the pictures of the gallery."""

from __future__ import annotations

import io
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import find_method
from captum_reflected.benchmark.data import ImageSet, choose
from captum_reflected.benchmark.masks import IGNORED, OBJECT
from captum_reflected.benchmark.settings import AUTOCAST_DTYPES, GALLERY, Settings
from captum_reflected.errors import BenchmarkError, UnsupportedModelError
from captum_reflected.masking.precision import Autocast
from captum_reflected.metrics.registry import score_maps
from captum_reflected.models import LoadedModel

# Figures are rounded: what lies beyond is rounding of the hardware's own.
_DECIMALS = 6


@dataclass(frozen=True)
class Sample:
    """One image as read: a tensor (C, H, W) and the mask (H, W) of its object, if known, with the
    values of :mod:`~captum_reflected.benchmark.masks`; or why there is none.
    """

    index: int
    image: Tensor | None = None
    label: int | None = None
    error: str | None = None
    content: str | None = None
    stamp: list[int] | None = None
    mask: Tensor | None = None
    mask_content: str | None = None


class Evaluator:
    """Turns blocks of images into rows.

    Args:
        model: on its device.
        images: the whole set.
        settings: of the run.
        folder: of the run, into which the gallery is written.
    """

    def __init__(
        self, model: LoadedModel, images: ImageSet, settings: Settings, folder: Path
    ) -> None:
        self._model, self._images, self._settings, self._folder = model, images, settings, folder
        self._methods = {name: find_method(name) for name in settings.methods}
        self._device = next(model.model.parameters()).device
        self._forward: nn.Module = model.model
        if settings.precision != "float32":
            self._forward = Autocast(model.model, AUTOCAST_DTYPES[settings.precision]).eval()
        chosen = choose(len(images.files), settings.images, settings.half)
        self._shown = {chosen[place] for place in choose(len(chosen), settings.gallery)}
        if self._shown:
            (folder / GALLERY).mkdir(exist_ok=True)

    def __call__(self, block: Sequence[Sample]) -> list[dict[str, Any]]:
        """One row an image."""
        rows: list[dict[str, Any]] = [
            {"index": sample.index, "file": self._images.files[sample.index]}
            | ({} if sample.error is None else {"error": sample.error})
            for sample in block
        ]
        read = [place for place, sample in enumerate(block) if sample.image is not None]
        if not read:
            return rows
        tensors = [sample.image for sample in block if sample.image is not None]
        images = torch.stack(tensors).to(self._device)
        with torch.no_grad():
            probabilities = self._forward(images).softmax(dim=-1)
        # One copy to the host a block.
        values, predictions = (part.tolist() for part in probabilities.max(dim=-1))
        usable, targets = [], []
        for place, value, prediction in zip(read, values, predictions, strict=True):
            sample, row = block[place], rows[place]
            # Of a correct prediction, both are the same class.
            by_label = self._settings.target == "label" or self._settings.correct_only
            target = sample.label if by_label else prediction
            problem = self._problem(value, target)
            if problem is not None:
                row["error"] = problem
                continue
            row["content"] = sample.content
            row |= {} if sample.stamp is None else {"stamp": sample.stamp}
            row |= {} if sample.mask_content is None else {"mask": sample.mask_content}
            row |= {"label": sample.label, "prediction": prediction, "target": target}
            if self._settings.correct_only and prediction != sample.label:
                row |= {"skipped": True, "methods": {}}
                continue
            usable.append(read.index(place))
            targets.append(target)
        if usable:
            chosen = torch.tensor(targets, device=self._device)
            scores = probabilities[usable].gather(1, chosen[:, None]).squeeze(1).tolist()
            own = [rows[read[place]] for place in usable]
            for row, score in zip(own, scores, strict=True):
                row |= {"probability": round(score, _DECIMALS), "methods": {}}
            masks = [block[read[place]].mask for place in usable]
            self._explain(images[usable], chosen, own, masks)
        return rows

    def _problem(self, probability: float, target: int | None) -> str | None:
        """Why an image cannot be evaluated."""
        if not math.isfinite(probability):
            return "the model's output is not finite"
        if target is None:
            return "its class is not known"
        if target >= self._model.num_classes:
            return f"its class {target} is none of the model's {self._model.num_classes}"
        return None

    def _explain(
        self,
        images: Tensor,
        target: Tensor,
        rows: Sequence[dict[str, Any]],
        mask_of_each: Sequence[Tensor | None],
    ) -> None:
        """Runs all methods, writes their metrics into the rows, and the gallery."""
        found = [mask for mask in mask_of_each if mask is not None]
        masks = torch.stack(found).to(self._device) if found else None
        maps = {
            name: self._apply(name, images, target, rows, masks) for name in self._settings.methods
        }
        for place, row in enumerate(rows):
            if row["index"] in self._shown:
                picture = self._model.to_pictures(images[place : place + 1])[0]
                heat = {name: of_block[place] for name, of_block in maps.items()}
                self._keep_picture(row, picture, heat, mask_of_each[place])

    def _apply(
        self,
        name: str,
        images: Tensor,
        target: Tensor,
        rows: Sequence[dict[str, Any]],
        masks: Tensor | None,
    ) -> Tensor:
        """Runs a method, writes its metrics into the rows and returns its maps (B, H, W)."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a map of zeros has its metrics, too
            try:
                maps = self._methods[name].explain(self._forward, images, target).detach().float()
            except (UnsupportedModelError, ValueError) as error:
                raise BenchmarkError(
                    f"method {name!r} does not suit model {self._model.name!r}: {error}"
                ) from error
        finite = maps.flatten(1).isfinite().all(dim=1)
        maps = torch.where(finite[:, None, None], maps, 0)
        results = score_maps(
            self._forward,
            images,
            maps,
            target,
            self._settings.metrics,
            masks=None if masks is None else masks == OBJECT,
            ignore=None if masks is None else masks == IGNORED,
        )
        columns = {metric: values.double().cpu().numpy() for metric, values in results.items()}
        for place, (row, good) in enumerate(zip(rows, finite.tolist(), strict=True)):
            values = {metric: column[place] for metric, column in columns.items()}
            if not good:
                row["methods"][name] = {"error": "its map holds NaN or infinite values"}
            elif not np.isfinite(np.hstack(list(values.values()))).all():
                reason = "the model's output for parts of the image is not finite"
                row["methods"][name] = {"error": reason}
            else:
                row["methods"][name] = {metric: _rounded(values[metric]) for metric in values}
        return maps

    def _keep_picture(
        self,
        row: Mapping[str, Any],
        picture: Tensor,
        maps: Mapping[str, Tensor],
        mask: Tensor | None,
    ) -> None:
        """Writes an image of the gallery with its maps, before its row is written."""
        arrays: dict[str, Any] = {
            "picture": (picture * 255).round().byte().numpy(),
            "maps": torch.stack(list(maps.values())).cpu().numpy(),
            "methods": np.array(list(maps)),
            "titles": np.array([self._methods[name].title for name in maps]),
        }
        for name in ("prediction", "target", "label"):
            known = row[name] is not None and row[name] < self._model.num_classes
            arrays[name] = np.array(self._model.class_name(row[name]) if known else "")
        if mask is not None:
            arrays["mask"] = (mask == OBJECT).numpy()
        buffer = io.BytesIO()
        np.savez_compressed(buffer, **arrays)
        write_whole(self._folder / GALLERY / f"{row['index']:08d}.npz", buffer.getvalue())


def _rounded(values: Any) -> Any:
    if values.ndim:
        return [round(value, _DECIMALS) for value in values.tolist()]
    return round(values.item(), _DECIMALS)
