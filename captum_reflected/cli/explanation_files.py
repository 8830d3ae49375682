"""Writes the results of a photo: figure, overlays and maps."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from captum_reflected._writing import write_whole
from captum_reflected.models import LoadedModel
from captum_reflected.visualization.explanation_figure import FigureRow, explanation_figure
from captum_reflected.visualization.notebook_figure import figure_bytes
from captum_reflected.visualization.overlay import Box, Pixels, heat_scale, photo_overlay

_DPI = 150
# Characters of a class name in a file name.
_NAME_LENGTH = 30
# A centre crop that keeps less than this share of a photo is marked in the figure.
SHARE_TO_MARK = 0.75


@dataclass(frozen=True)
class PhotoResult:
    """The explanations of one photo.

    Attributes:
        photo: (H, W, 3), uint8, the whole photo.
        box: where the model's input lies in it.
        classes: the T explained classes.
        probabilities: (T,), of these.
        predicted: the class with the highest probability.
        predicted_probability: its probability.
        maps: (T, M, h, w), the map of each class and method.
    """

    photo: Pixels
    box: Box
    classes: Sequence[int]
    probabilities: Sequence[float]
    predicted: int
    predicted_probability: float
    maps: npt.NDArray[np.float32]

    @property
    def share_seen(self) -> float:
        """The share of the photo's pixels that the model sees."""
        height, width = self.photo.shape[:2]
        return self.box.share_of(width, height)


class ExplanationFiles:
    """Writes results into a folder.

    Args:
        folder: created if missing.
        loaded: the model, for the names of its classes.
        methods: the keys of the M methods, with their options.
        titles: their names in figures.
        alpha: opacity of the maps over the photo where they are bright.
        cmap: their colour map.
    """

    def __init__(
        self,
        folder: Path,
        loaded: LoadedModel,
        methods: Sequence[str],
        titles: Sequence[str],
        *,
        alpha: float,
        cmap: str,
    ) -> None:
        self._folder, self._loaded = folder, loaded
        self._methods = [method.replace(":", ".") for method in methods]
        self._titles, self._alpha, self._cmap = titles, alpha, cmap

    def write(self, name: str, title: str, result: PhotoResult) -> list[tuple[Path, bool]]:
        """Writes the files of one photo.

        Args:
            name: the beginning of the file names.
            title: the name of the photo in the figure.
            result: the explanations.

        Returns:
            list[tuple[Path, bool]]: each file, and whether it replaced another; the figure first.

        Raises:
            OSError: a file cannot be written. Those written before are kept.
        """
        rows, others = [], {}
        for index, probability, maps in zip(
            result.classes, result.probabilities, result.maps, strict=True
        ):
            overlays, scales = [], []
            for method, heat in zip(self._methods, maps, strict=True):
                stem = f"{name}.{self._file_name_of(index)}.{method}"
                scales.append(heat_scale(heat))
                overlays.append(
                    photo_overlay(
                        result.photo, heat, result.box, alpha=self._alpha, cmap=self._cmap
                    )
                )
                others[f"{stem}.overlay.png"] = _png(overlays[-1])
                others[f"{stem}.npy"] = _npy(heat)
            rows.append(
                FigureRow(
                    result.photo,
                    f"explained: {self._loaded.class_name(index)} ({probability:.1%})",
                    overlays,
                    scales,
                    result.box if result.share_seen < SHARE_TO_MARK else None,
                )
            )
        predicted = self._loaded.class_name(result.predicted)
        figure = explanation_figure(
            rows,
            self._titles,
            heading="   ".join(
                part.replace(" ", "\u00a0")  # lines are broken between the parts
                for part in (
                    title,
                    f"predicted: {predicted} ({result.predicted_probability:.1%})",
                    f"model: {self._loaded.name}",
                )
            ),
            alpha=self._alpha,
            cmap=self._cmap,
        )
        single = len(result.classes) == 1
        classes = (
            self._file_name_of(result.classes[0])
            if single
            else "+".join(str(index) for index in result.classes)
        )
        figure_name = f"{name}.{classes}.{'+'.join(self._methods)}.png"
        files = {figure_name: figure_bytes(figure, "png", dpi=_DPI), **others}
        self._folder.mkdir(parents=True, exist_ok=True)
        return [self._write(self._folder / file, content) for file, content in files.items()]

    def _file_name_of(self, index: int) -> str:
        """A class in file names: its number, since names can repeat, and its name."""
        if self._loaded.class_names is None:
            return f"class-{index}"
        first = self._loaded.class_name(index).partition(",")[0]
        text = re.sub(r"[^\w]+", "-", first).strip("-")[:_NAME_LENGTH]
        return f"{index}-{text}" if text else str(index)

    @staticmethod
    def _write(path: Path, content: bytes) -> tuple[Path, bool]:
        replaced = path.exists()
        write_whole(path, content)
        return path, replaced


def _content(write: Callable[[io.BytesIO], object]) -> bytes:
    buffer = io.BytesIO()
    write(buffer)
    return buffer.getvalue()


def _png(pixels: Pixels) -> bytes:
    return _content(lambda file: Image.fromarray(pixels).save(file, "png"))


def _npy(heat: npt.NDArray[np.float32]) -> bytes:
    return _content(lambda file: np.save(file, heat))
