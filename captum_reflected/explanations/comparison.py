"""Compares methods on the same images: a figure, and a table with confidence intervals."""

from __future__ import annotations

import html
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from captum.attr import Attribution
from matplotlib.figure import Figure
from torch import Tensor
from tqdm.auto import tqdm

from captum_reflected.explanations.explaining import explain
from captum_reflected.explanations.explanation import Explanation, figure_html
from captum_reflected.metrics import mean_interval
from captum_reflected.metrics.registry import METRICS, Metric, score_maps
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
        explanations: by key of the method, its explanation of the images.
        scores: by key of the method and of the metric, the metric of each image, (B,). The metrics
            are those of :data:`captum_reflected.metrics.registry.METRICS` that need no masks.
    """

    explanations: Mapping[str, Explanation]
    scores: Mapping[str, Mapping[str, Tensor]]

    @cached_property
    def figure(self) -> Figure:
        """One row per image, one column per method."""
        first = next(iter(self.explanations.values()))
        maps = {found.title: found.attributions for found in self.explanations.values()}
        labels = [first.class_name(target) for target in first.target.tolist()]
        return comparison_grid(first.pictures, maps, labels=labels)

    @cached_property
    def table(self) -> str:
        """Means with 95 % intervals, and paired differences from the first method, in Markdown."""
        reference = next(iter(self.scores))
        count = len(next(iter(self.explanations.values())))
        parts = [
            f"Mean of {count} image{'s' if count > 1 else ''}, in percent"
            + (", ± 95 % interval:" if count > 1 else "; a single image has no interval:"),
            self._rows(lambda method, metric: self.scores[method][metric.key], list(self.scores)),
        ]
        others = [method for method in self.scores if method != reference]
        if others and count > 1:
            parts += [
                f"Difference from {self.explanations[reference].title} on the same images; bold: "
                "the interval excludes 0:",
                self._rows(
                    lambda method, metric: (
                        self.scores[method][metric.key] - self.scores[reference][metric.key]
                    ),
                    others,
                    signed=True,
                ),
            ]
        return "\n\n".join(parts)

    def _rows(
        self, values: Callable[[str, Metric], Tensor], methods: list[str], *, signed: bool = False
    ) -> str:
        def cell(method: str, metric: Metric) -> str:
            found = mean_interval(values(method, metric))
            text = metric.format(found.mean, signed=signed)
            if found.count == 1:
                return text
            text += f" ± {metric.format(found.half_width)}"
            return f"**{text}**" if signed and abs(found.mean) > found.half_width else text

        head = ["", *(f"{metric.title} {metric.arrow}" for metric in _METRICS)]
        lines = [head, ["---", *["---:"] * len(_METRICS)]]
        for method in methods:
            title = self.explanations[method].title
            lines.append([title, *(cell(method, metric) for metric in _METRICS)])
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)

    @property
    def _titles(self) -> str:
        return ", ".join(found.title for found in self.explanations.values())

    def __repr__(self) -> str:
        return f"Comparison of {self._titles}\n\n{self.table}"

    def _repr_html_(self) -> str:
        text = html.escape(f"Maps of {self._titles}", quote=True)
        return f"{figure_html(self.figure, text)}<pre>{html.escape(self.table)}</pre>"


def compare(
    model: Callable[..., Any],
    images: Tensor | tuple[Tensor],
    methods: Sequence[str | Attribution] = _DEFAULT_METHODS,
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

    Args:

        model (Callable): As in :func:`captum_reflected.explain`.
        images (Tensor or tuple[Tensor]): As there.
        methods (Sequence, optional): The methods, as ``method`` there. Differences are from the
                    first.
                    Default: BalancedRelevance, MaskRegression, TransformerAttribution and
                    IntegratedGradients
        target (int, Tensor or list, optional): As there.
                    Default: None
        class_names (Sequence[str], optional): As there.
                    Default: None
        mean (float or Sequence[float], optional): As there.
                    Default: None
        std (float or Sequence[float], optional): As there.
                    Default: None
        show_progress (bool, optional): Whether to show a progress bar.
                    Default: False

    Returns:
        *Comparison*: ``.figure``, ``.table`` (Markdown), ``.explanations`` and ``.scores`` by key
        of the method; a notebook shows figure and table.

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
    if isinstance(methods, str) or not methods:
        raise ValueError(f"methods is {methods!r}; wanted: a list of one method or more")
    explanations: dict[str, Explanation] = {}
    scores: dict[str, dict[str, Tensor]] = {}
    keys = [metric.key for metric in _METRICS]
    for method in tqdm(methods, desc="comparing", unit="method", disable=not show_progress):
        found = explain(
            model, images, target, method=method, class_names=class_names, mean=mean, std=std
        )
        if found.method in explanations:
            raise ValueError(f"methods has {found.method} twice; wanted: each method once")
        explanations[found.method] = found
        inputs = images[0] if isinstance(images, tuple) else images
        measured = score_maps(model, inputs, found.attributions, found.target, keys)
        scores[found.method] = {key: measured[key].cpu() for key in keys}
    return Comparison(explanations, scores)
