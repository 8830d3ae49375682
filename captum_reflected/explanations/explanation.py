"""The attribution maps of a call, with what is needed to show them."""

from __future__ import annotations

import html
import io
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt
from matplotlib.figure import Figure
from torch import Tensor

from captum_reflected.explanations.saving import (
    SHOWN,
    figure_formats,
    figure_html,
    note_html,
    save_as,
)
from captum_reflected.visualization.explanation_figure import FigureRow, explanation_figure
from captum_reflected.visualization.overlay import (
    HEAT_COLORS,
    OPACITY,
    Pixels,
    check_style,
    heat_scale,
    overlay,
)


@dataclass(frozen=True, repr=False)
class Explanation:
    r"""
    Why a model predicts the targets of B images; :func:`captum_reflected.explain` returns it.

    Attributes:
        attributions: (B, H, W), the map of each image. Gradients with respect to pixels are added
            over the channels, as Captum's visualization does.
        pictures: (B, H, W, 3), the images with the preprocessing undone, from 0 to 1, on the CPU.
        target: (B,), the explained class of each image.
        probability: (B,), the model's softmax probability of the target.
        predicted: (B,), the class with the highest probability.
        predicted_probability: (B,), the probability of that class.
        method: the key of the method, with its options, such as ``mask_regression:forwards=50``.
        title: its name in figures and texts.
        model: the name of the model's architecture in timm, or of its class.
        class_names: the names of all classes, or None.
    """

    attributions: Tensor
    pictures: Tensor
    target: Tensor
    probability: Tensor
    predicted: Tensor
    predicted_probability: Tensor
    method: str
    title: str
    model: str
    class_names: tuple[str, ...] | None = None

    def __len__(self) -> int:
        return len(self.attributions)

    def __getitem__(self, images: int | slice) -> Explanation:
        """The explanation of one image, or of several; iteration gives one after another."""
        if not isinstance(images, slice):
            image = range(len(self))[images]
            images = slice(image, image + 1)
        return replace(
            self,
            attributions=self.attributions[images],
            pictures=self.pictures[images],
            target=self.target[images],
            probability=self.probability[images],
            predicted=self.predicted[images],
            predicted_probability=self.predicted_probability[images],
        )

    def __repr__(self) -> str:
        lines = [self._text(row, ", ") for row in range(min(len(self), SHOWN))]
        if len(self) > SHOWN:
            lines.append(f"and {len(self) - SHOWN} more")
        return f"Explanation of {self.model} by {self.title}:\n  " + "\n  ".join(lines)

    def class_name(self, index: int) -> str:
        """The name of a class, or ``class N`` if the names are not known."""
        return f"class {index}" if self.class_names is None else self.class_names[index]

    def overlay(self, *, alpha: float = OPACITY, cmap: str = HEAT_COLORS) -> Pixels:
        r"""
        The pictures under their maps. The pictures' own colours are pale, so that they are not
        mistaken for those of the maps.

        Args:

            alpha (float, optional): Opacity of the maps where they are bright, from 0 to 1; where
                        they are dark, they have 30 % of it. 0 shows the pictures alone.
                        Default: 0.8
            cmap (str, optional): Name of a colour map of matplotlib.
                        Default: ``"inferno"``

        Returns:
            *ndarray*: (B, H, W, 3), uint8.

        Raises:
            ValueError: ``alpha`` is not from 0 to 1, or ``cmap`` is unknown.
        """
        pictures = self.pictures.numpy()
        return np.stack(
            [
                overlay(picture, heat, alpha=alpha, cmap=cmap)
                for picture, heat in zip(pictures, self._heats(), strict=True)
            ]
        )

    def plot(self, *, alpha: float = OPACITY, cmap: str = HEAT_COLORS, size: float = 3.2) -> Figure:
        r"""
        A figure with one row per image: the picture, and the picture under its map.

        Args:

            alpha (float, optional): Opacity of the maps where they are bright, from 0 to 1; where
                        they are dark, they have 30 % of it. 0 shows the pictures alone.
                        Default: 0.8
            cmap (str, optional): Name of a colour map of matplotlib.
                        Default: ``"inferno"``
            size (float, optional): Width of one cell in inches; those of very wide pictures are
                        wider.
                        Default: 3.2

        Returns:
            *Figure*: of matplotlib, not attached to any window.

        Raises:
            ValueError: ``alpha`` is not from 0 to 1, or ``cmap`` is unknown.
        """
        check_style(alpha, cmap)
        photos = (255 * self.pictures).round().byte().numpy()
        rows = [
            FigureRow(photo, self._text(row, "\n"), [picture], [heat_scale(heat)])
            for row, (photo, picture, heat) in enumerate(
                zip(photos, self.overlay(alpha=alpha, cmap=cmap), self._heats(), strict=True)
            )
        ]
        return explanation_figure(
            rows, [self.title], heading=self.model, alpha=alpha, cmap=cmap, size=size
        )

    def save(self, path: str | Path) -> None:
        r"""
        Writes the figure, or the maps, to a file, which is replaced as a whole if it exists.

        Args:

            path (str or Path): The file. ``.png``, ``.jpg``, ``.pdf`` and ``.svg`` are the figure
                        of :meth:`plot`, ``.npy`` the maps (B, H, W).

        Raises:
            ValueError: the file name ends otherwise.
            OSError: the file cannot be written.
        """
        save_as(path, {**figure_formats(self.plot), ".npy": self._npy})

    def _heats(self) -> npt.NDArray[np.float64]:
        return self.attributions.double().cpu().numpy()  # NumPy has no bfloat16

    def _npy(self) -> bytes:
        content = io.BytesIO()
        np.save(content, self.attributions.float().cpu().numpy())
        return content.getvalue()

    def _repr_html_(self) -> str:
        shown = self[:SHOWN]
        text = html.escape(repr(shown), quote=True)
        note = note_html(len(shown), len(self), ".plot()")
        return figure_html(shown.plot(), text) + note

    def _text(self, row: int, separator: str) -> str:
        target, predicted = int(self.target[row]), int(self.predicted[row])
        name = f"{self.class_name(target)} ({self.probability[row]:.1%})"
        if target == predicted:
            return f"predicted and explained: {name}"
        other = f"{self.class_name(predicted)} ({self.predicted_probability[row]:.1%})"
        return f"explained: {name}{separator}predicted: {other}"
