"""Compares methods on the same images: a figure, and a table with confidence intervals."""

from __future__ import annotations

import csv
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from captum_reflected.explanations.explaining import AnyMethod, explain_all
from captum_reflected.explanations.explanation import Explanation
from captum_reflected.explanations.saving import (
    SHOWN,
    figure_formats,
    figure_html,
    note_html,
    save_as,
)
from captum_reflected.explanations.score_table import ScoreTable, score_tables
from captum_reflected.metrics.registry import METRICS, score_maps
from captum_reflected.visualization.maps import comparison_grid

_METRICS = tuple(metric for metric in METRICS.values() if not metric.needs_masks)
_DEFAULT_METHODS = (
    "balanced_relevance",
    "mask_regression",
    "transformer_attribution",
    "integrated_gradients",
)


@dataclass(frozen=True, repr=False)
class Comparison:
    r"""
    Several methods on the same images; :func:`captum_reflected.compare` returns it.

    Attributes:
        explanations: by key of the method, or by the title given to it, its explanation of the
            images.
        scores: by the same and by key of the metric, the metric of each image, (B,). The metrics
            are those of :data:`captum_reflected.metrics.registry.METRICS` that need no masks.
    """

    explanations: Mapping[str, Explanation]
    scores: Mapping[str, Mapping[str, Tensor]]

    @cached_property
    def figure(self) -> Figure:
        """One row per image, one column per method."""
        return self._draw(len(self._first))

    @cached_property
    def table(self) -> str:
        """Means of the metrics, and paired differences from the first method, in Markdown.

        With 10 images or more, both have 95 % intervals by Student's t distribution
        (:func:`captum_reflected.metrics.mean_interval`). With fewer, such intervals would be wider
        than the range of a metric, or would miss the true mean far more often than in 5 % of cases;
        the table then has the means alone, and says so. Average increase, which is 0 or 1 for each
        image, needs 30 images; with fewer, its intervals are too narrow, which the table says, too.
        """
        return "\n\n".join(table.markdown for table in self._tables)

    def save(self, path: str | Path) -> None:
        r"""
        Writes the figure, the table or the scores to a file, which is replaced as a whole if it
        exists.

        Args:

            path (str or Path): The file. ``.png``, ``.jpg``, ``.pdf`` and ``.svg`` are the figure,
                        ``.md`` is the table, ``.csv`` the scores: one line per method and image
                        with the explained class, its probability and each metric, from 0 to 1.

        Raises:
            ValueError: the file name ends otherwise.
            OSError: the file cannot be written.
        """
        save_as(
            path,
            {
                **figure_formats(lambda: self.figure),
                ".md": lambda: f"{self.table}\n".encode(),
                ".csv": lambda: self._csv().encode(),
            },
        )

    @property
    def _first(self) -> Explanation:
        return next(iter(self.explanations.values()))

    @cached_property
    def _tables(self) -> list[ScoreTable]:
        scores = {found.title: self.scores[name] for name, found in self.explanations.items()}
        return score_tables(scores, _METRICS)

    def _draw(self, count: int) -> Figure:
        """The figure of the first images."""
        first = self._first
        return comparison_grid(
            first.pictures[:count],
            {found.title: found.attributions[:count] for found in self.explanations.values()},
            labels=[
                f"{first.class_name(target)} ({probability:.0%})"
                for target, probability in zip(
                    first.target[:count].tolist(), first.probability[:count].tolist(), strict=True
                )
            ],
        )

    def _csv(self) -> str:
        text = io.StringIO()
        lines = csv.writer(text, lineterminator="\n")
        keys = [metric.key for metric in _METRICS]
        lines.writerow(["method", "image", "target", "class", "probability", *keys])
        for method, found in self.explanations.items():
            for image, (target, probability) in enumerate(
                zip(found.target.tolist(), found.probability.tolist(), strict=True)
            ):
                values = [self.scores[method][key][image].item() for key in keys]
                name = found.class_name(target)
                lines.writerow([method, image, target, name, probability, *values])
        return text.getvalue()

    @property
    def _titles(self) -> str:
        return ", ".join(found.title for found in self.explanations.values())

    def __repr__(self) -> str:
        return f"Comparison of {self._titles}\n\n{self.table}"

    def _repr_html_(self) -> str:
        count = len(self._first)
        shown = min(count, SHOWN)
        text = html.escape(f"Maps of {self._titles}", quote=True)
        figure = self.figure if shown == count else self._draw(shown)
        tables = "".join(table.html for table in self._tables)
        return figure_html(figure, text) + note_html(shown, count, ".figure") + tables


def compare(
    model: Callable[..., Any],
    images: Tensor | tuple[Tensor],
    methods: Sequence[AnyMethod] | Mapping[str, AnyMethod] = _DEFAULT_METHODS,
    target: Any = None,
    *,
    class_names: Sequence[str] | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    show_progress: bool = False,
) -> Comparison:
    r"""
    Explains images by several methods, and scores every map by deletion, insertion, average drop
    and average increase.

    Scoring takes about 82 forwards without gradients for each image and method.

    Args:

        model (Callable): As in :func:`captum_reflected.explain`.
        images (Tensor or tuple[Tensor]): As there.
        methods (Sequence or Mapping, optional): The methods, as ``method`` there; or a dictionary
                    from titles to methods. Differences are from the first.
                    Default: BalancedRelevance, MaskRegression, TransformerAttribution and
                    IntegratedGradients
        target (int, Tensor or list, optional): As there.
                    Default: None
        class_names (Sequence[str] or str, optional): As there.
                    Default: None
        mean (float or Sequence[float], optional): As there.
                    Default: None
        std (float or Sequence[float], optional): As there.
                    Default: None
        show_progress (bool, optional): Whether to show a progress bar.
                    Default: False

    Returns:
        *Comparison*: ``.figure``, ``.table`` (Markdown), ``.explanations`` and ``.scores`` by key
        of the method or by the title given to it, ``.save(path)``; a notebook shows figure and
        table. The table has confidence intervals if there are 10 images or more.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes or values do not fit, or there are no methods or the same one twice.
        UnsupportedModelError: a method cannot explain this model.

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
        >>> images = images.clamp(0, 1)  # of a model without preprocessing
        >>> comparison = compare(model, images, ["fast", "attention_rollout"])
        >>> list(comparison.scores)
        ['balanced_relevance', 'attention_rollout']
    """
    if not isinstance(methods, (Sequence, Mapping)) or isinstance(methods, str) or not methods:
        raise ValueError(f"methods is {methods!r}; wanted: a list of one method or more")
    found = explain_all(
        model,
        images,
        target,
        methods,
        class_names=class_names,
        mean=mean,
        std=std,
        show_progress=show_progress,
    )
    keys = [metric.key for metric in _METRICS]
    # All maps at once, since they share the scores of the whole and of the empty image.
    scores = score_maps(
        model,
        images[0] if isinstance(images, tuple) else images,
        torch.stack([one.attributions for one in found.values()]),
        next(iter(found.values())).target,
        keys,
        show_progress=show_progress,
    )
    return Comparison(
        found,
        {name: {key: scores[key][place].cpu() for key in keys} for place, name in enumerate(found)},
    )
