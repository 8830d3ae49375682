"""Figures on top of Captum's own; returned, never shown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias, get_args

import numpy as np
import numpy.typing as npt
import torch
from captum.attr import visualization as captum_visualization
from matplotlib import patheffects
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.patches import Rectangle
from matplotlib.ticker import PercentFormatter
from torch import Tensor

from captum_reflected._inputs import Score, check_option
from captum_reflected.metrics import Evaluation, mean_interval
from captum_reflected.reflection import (
    Reflection,
    TokenReflect,
    min_max,
    reflected_images,
    reflection_masks,
    replace_diagonal,
)

# Ordered in lightness, so that it reads the same without colour vision and in print.
HEAT_COLORS = "inferno"

Dashes: TypeAlias = tuple[float, ...]
_Values: TypeAlias = npt.NDArray[np.float64]

# Okabe and Ito's colours that show on light and on dark ground, and grey; told apart without
# colour vision, and by dashes without colour. 7 colours and 6 dashes make 42 different lines.
_COLORS = ("#D55E00", "#0072B2", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#858585")
_DASHES: tuple[Dashes, ...] = (
    (),
    (5, 2),
    (1.2, 1.4),
    (6, 1.5, 1.2, 1.5),
    (9, 2.5),
    (3, 1.2, 1.2, 1.2, 1.2, 1.2),
)

# What preprocessing, done and undone, may leave beyond 0 and 1.
_ROUNDING = 0.01

# How wide a prefix token is drawn beside the image tokens, so that its line can be read.
_PREFIX_SHARE = 0.045


def draw_heat(axes: Axes, picture: Tensor, heat: Tensor) -> None:
    """Draws a picture lit where a map is high.

    Args:
        axes: where to draw.
        picture: (H, W, C), from 0 to 1.
        heat: (H, W). Where it is negative it is dark; a map that is positive everywhere
            is dark at its least value. A map of zeros leaves the picture dark.
    """
    image: npt.NDArray[np.float32] = picture.cpu().numpy()
    positive = (heat - heat.min().clamp(min=0)).clamp(min=0).float().cpu().numpy()
    if positive.max() > 0:
        captum_visualization.visualize_image_attr(
            positive[..., None],
            image,
            method="blended_heat_map",
            sign="positive",
            cmap=HEAT_COLORS,
            alpha_overlay=0.6,
            plt_fig_axis=(axes.figure, axes),
            use_pyplot=False,
        )
    else:  # Captum refuses a map without positive values.
        axes.imshow(image.mean(axis=-1), cmap="gray", vmin=0, vmax=1)
        axes.imshow(np.zeros(positive.shape), cmap=HEAT_COLORS, vmin=0, vmax=1, alpha=0.6)
    axes.set_axis_off()


def comparison_grid(
    pictures: Tensor | Sequence[Tensor],
    maps: Mapping[str, Tensor | Sequence[Tensor | None]],
    *,
    masks: Tensor | Sequence[Tensor | None] | None = None,
    labels: Sequence[str] | None = None,
    size: float = 1.9,
) -> Figure:
    """One row an image, one column a method.

    Args:
        pictures: (B, H, W, C), from 0 to 1, or B of (H, W, C), which may differ in size.
        maps: (B, H, W) for each title, or B of (H, W), None where the cell is empty.
        masks: the same, true where the object is, drawn as a column of its own.
        labels: B texts, one under each picture.
        size: side of one cell in inches.

    Returns:
        Figure: not attached to any window; ``figure.savefig(path)`` writes it.

    Raises:
        ValueError: pictures, maps and masks are not as many or not of one size, or a value is
            not finite or, of pictures, beyond 0 to 1.
    """
    _check_pictures(pictures)
    _check_cells(pictures, maps if masks is None else {**maps, "masks": masks})
    titles = ["image", *(["object"] if masks is not None else []), *maps]
    figure = Figure(
        figsize=(size * len(titles), (size + 0.18) * len(pictures) + 0.15), layout="constrained"
    )
    grid = figure.subplots(len(pictures), len(titles), squeeze=False)
    for row, picture in zip(range(len(pictures)), pictures, strict=True):
        cells = iter(grid[row])
        axes = next(cells)
        axes.imshow(picture.cpu().numpy())
        axes.set_xticks([])
        axes.set_yticks([])
        if labels is not None:
            axes.set_xlabel(labels[row], fontsize=8, parse_math=False)
        if masks is not None:
            axes, mask = next(cells), masks[row]
            if mask is not None:
                axes.imshow(mask.cpu().numpy(), cmap="gray", vmin=0, vmax=1)
            axes.set_axis_off()
        for heats in maps.values():
            axes, heat = next(cells), heats[row]
            if heat is None:
                axes.set_axis_off()
            else:
                draw_heat(axes, picture, heat)
    for axes, title in zip(grid[0], titles, strict=True):
        axes.set_title(title, fontsize=9, parse_math=False)
    return figure


def _check_pictures(pictures: Tensor | Sequence[Tensor]) -> None:
    for picture in pictures:
        if picture.dim() != 3 or picture.shape[-1] not in (3, 4):
            raise ValueError(
                f"a picture has shape {tuple(picture.shape)}; wanted: (H, W, 3), as "
                "image.permute(1, 2, 0) gives"
            )
        low, high = float(picture.min()), float(picture.max())
        if not (low >= -_ROUNDING and high <= 1 + _ROUNDING):
            raise ValueError(
                f"a picture goes from {low:.3g} to {high:.3g}; wanted: from 0 to 1, the "
                "preprocessing undone"
            )


def _check_cells(
    pictures: Tensor | Sequence[Tensor], maps: Mapping[str, Tensor | Sequence[Tensor | None]]
) -> None:
    """Whether every map is of its picture's size: stretched over it, it would lie elsewhere."""
    for title, heats in maps.items():
        if len(heats) != len(pictures):
            raise ValueError(
                f"{title!r} has {len(heats)} maps and there are {len(pictures)} pictures; wanted: "
                "one for each"
            )
        for picture, heat in zip(pictures, heats, strict=True):
            if heat is None:
                continue
            if heat.shape != picture.shape[:2]:
                raise ValueError(
                    f"a map of {title!r} has shape {tuple(heat.shape)} and its picture "
                    f"{tuple(picture.shape)}; wanted: (H, W) of the picture"
                )
            if not bool(torch.isfinite(heat).all()):
                raise ValueError(
                    f"a map of {title!r} holds NaN or infinite values; wanted: finite numbers"
                )


@dataclass(frozen=True)
class Theme:
    """Colours of text and of lines behind the data."""

    ink: str
    faint: str


LIGHT = Theme(ink="#1f2328", faint="#d9dde2")
DARK = Theme(ink="#e4e7eb", faint="#3a4048")


def line_style(place: int) -> tuple[str, Dashes]:
    """Colour and dashes of the method at this place of a figure; () is a solid line."""
    return _COLORS[place % len(_COLORS)], _DASHES[place % len(_DASHES)]


@dataclass(frozen=True)
class Band:
    """A mean curve and the half-width of its 95 % interval, 0 for a single image."""

    mean: _Values
    half_width: _Values

    @property
    def top(self) -> float:
        """The highest point."""
        return float((self.mean + self.half_width).max())

    @property
    def bottom(self) -> float:
        """The lowest point."""
        return float((self.mean - self.half_width).min())


@dataclass(frozen=True)
class CurvePanel:
    """Mean curves that share their axes.

    Attributes:
        heading: above them.
        xlabel: what happens along the curves.
        fractions: (S + 1,), the share of pixels at each point.
        bands: method to its curve.
    """

    heading: str
    xlabel: str
    fractions: _Values
    bands: Mapping[str, Band]


def metric_curves(results: Mapping[str, Evaluation], *, score: Score = "probability") -> Figure:
    """Mean deletion and insertion curves with their 95 % intervals, point by point.

    The smaller the area under a deletion curve, and the larger that under an insertion
    curve, the better the maps rank the pixels.

    Args:
        results: title to what :func:`captum_reflected.metrics.evaluate` found for a method.
        score: what the curves were asked of ``evaluate`` in.

    Returns:
        Figure: one panel for deletion and one for insertion.

    Raises:
        ValueError: there are no results, their curves have other points, or ``score`` is
            unknown or not what the curves are of.
    """
    check_option("score", score, get_args(Score))
    if not results:
        raise ValueError("results is empty; wanted: one Evaluation or more, by title")
    fractions = next(iter(results.values())).fractions.double().cpu()
    for title, result in results.items():
        if not torch.equal(result.fractions.double().cpu(), fractions):
            raise ValueError(
                f"the curves of {title!r} have {len(result.fractions)} points and the first "
                f"{len(fractions)}, or others; wanted: one pixels_per_step and one size of images"
            )
        curves = torch.stack([result.deletion_curve, result.insertion_curve])
        if score == "probability" and bool(((curves < 0) | (curves > 1 + _ROUNDING)).any()):
            raise ValueError(
                f'score is "probability" and the curves of {title!r} go beyond 0 to 1; wanted: '
                'score="logit", if evaluate was asked for it'
            )
    panels = []
    for kind, change, hint in (
        ("deletion", "removed", "low is better"),
        ("insertion", "inserted", "high is better"),
    ):
        bands = {
            title: _mean_band(getattr(result, f"{kind}_curve")) for title, result in results.items()
        }
        heading = f"{kind.capitalize()}: {hint}"
        panels.append(CurvePanel(heading, f"pixels {change}", fractions.numpy(), bands))
    return curves_figure(panels, {title: title for title in results}, score=score)


def curves_figure(
    panels: Sequence[CurvePanel], titles: Mapping[str, str], *, score: Score = "probability"
) -> Figure:
    """Panels side by side, on one scale and with one legend.

    Args:
        panels: one or more.
        titles: method to its name in the legend; a method keeps the line style of its place
            here in every panel.
        score: what the curves are of.

    Returns:
        Figure: not attached to any window.
    """
    columns = 2 * len(panels)
    rows = -(-len(titles) // columns)
    figure = Figure(
        figsize=(4.2 * len(panels), 3.9 + 0.22 * rows), layout=ConstrainedLayoutEngine(wspace=0.05)
    )
    grid = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    limits = curve_limits(panels, score)
    lines: dict[str, Artist] = {}
    for axes, panel in zip(grid, panels, strict=True):
        draw_curves(axes, panel, titles, limits=limits, score=score)
        axes.set_title(panel.heading, fontsize=10, color=LIGHT.ink, parse_math=False)
        for line, label in zip(*axes.get_legend_handles_labels(), strict=True):
            lines.setdefault(label, line)
    for axes in grid[1:]:
        axes.set_ylabel("")
    figure.legend(
        list(lines.values()),
        list(lines),
        loc="outside lower center",
        ncols=columns,
        frameon=False,
        fontsize=9,
        handlelength=3.2,
    )
    return figure


def curve_limits(panels: Sequence[CurvePanel], score: Score = "probability") -> tuple[float, float]:
    """From where to where all panels go, so that they can be compared; 0 is always in."""
    bands = [band for panel in panels for band in panel.bands.values()]
    top = max([*(band.top for band in bands), 0.01])
    if score == "probability":  # where few images leave a wide band, it goes beyond what can be
        return 0.0, 1.03 * min(top, 1.0)
    return min([0.0, *(band.bottom for band in bands)]), 1.03 * top


def draw_curves(
    axes: Axes,
    panel: CurvePanel,
    titles: Mapping[str, str],
    *,
    limits: tuple[float, float],
    score: Score = "probability",
    theme: Theme = LIGHT,
) -> None:
    """Draws the curves of one panel; heading and legend are left to the caller.

    Args:
        axes: where to draw.
        panel: the curves.
        titles: method to its label; its place here is that of its line style.
        limits: from :func:`curve_limits`.
        score: what the curves are of.
        theme: colours of all that is no curve.
    """
    for place, (method, title) in enumerate(titles.items()):
        band = panel.bands.get(method)
        if band is None:
            continue
        color, dashes = line_style(place)
        axes.fill_between(
            panel.fractions,
            band.mean - band.half_width,
            band.mean + band.half_width,
            color=color,
            alpha=0.13,
            linewidth=0,
        )
        axes.plot(
            panel.fractions,
            band.mean,
            color=color,
            linestyle=(0, dashes) if dashes else "-",
            linewidth=1.7,
            label=title.replace("$", r"\$"),
        )
    axes.set_xlim(0, 1)
    axes.set_ylim(limits)
    axes.set_xlabel(panel.xlabel, fontsize=10, color=theme.ink)
    axes.set_ylabel(f"{score} of the explained class", fontsize=10, color=theme.ink)
    axes.xaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    if score == "probability":
        axes.yaxis.set_major_formatter(PercentFormatter(1, decimals=0))
    axes.tick_params(labelsize=9, colors=theme.ink, length=0, pad=6)
    axes.grid(color=theme.faint, linewidth=0.6)
    axes.set_axisbelow(True)
    axes.set_facecolor("none")
    for side, spine in axes.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(theme.faint)


def _mean_band(curves: Tensor) -> Band:
    """The mean of (B, S + 1) curves over the images."""
    points = [mean_interval(point) for point in curves.detach().cpu().T]
    return Band(
        np.array([point.mean for point in points]),
        np.array([point.half_width if point.count > 1 else 0.0 for point in points]),
    )


def reflected_gallery(
    pictures: Tensor | Sequence[Tensor],
    reflection: Reflection,
    *,
    tokens: int | Sequence[int] | Sequence[Sequence[int]] = 5,
    background: float | Tensor = 0.5,
    labels: Sequence[str] | None = None,
    size: float = 1.9,
) -> Figure:
    """Reflected images of some tokens, as in figure 5 of Sago & Hotta.

    One row an image: the picture with the tokens outlined and numbered, then each token's
    reflected image, the token outlined, with the score that the model gave it.

    Masks that are not the paper's one a token (components; a stride, smoothing, opposites,
    ``keep`` or ``binary``, all of which :meth:`ReflectedRelevance.voting` may have) are named
    by their number alone, and no token is outlined: nothing in the reflection tells which
    token such a mask belongs to, if any.

    Args:
        pictures: (B, H, W, C), from 0 to 1, or B of (H, W, C).
        reflection: of the same images, from ``ReflectedRelevance.reflect``.
        tokens: how many, of highest score; or the numbers of the masks, from 0, one list for
            all images or one for each. The paper's mask j is that of image token j.
        background: what a masked pixel shows, a number or a colour (C,). With the mean that
            the model's preprocessing subtracts it is what the model sees with the paper's
            baseline of 0.
        labels: B texts, one under each picture.
        size: side of one cell in inches.

    Returns:
        Figure: not attached to any window.

    Raises:
        ValueError: the numbers of pictures and images differ, or a mask is not there.
    """
    count, num_masks, *grid = reflection.masks.shape
    if len(pictures) != count:
        raise ValueError(
            f"there are {len(pictures)} pictures and the reflection is of {count} images; "
            "wanted: the same images"
        )
    _check_pictures(pictures)
    chosen = _chosen_masks(tokens, reflection.scores, num_masks)
    of_tokens = _has_one_mask_a_token(reflection)
    columns = 1 + max(len(row) for row in chosen)
    figure = Figure(
        figsize=(size * columns, (size + 0.42) * count + 0.1), layout="constrained", dpi=100
    )
    rows = figure.subplots(count, columns, squeeze=False)
    if isinstance(background, Tensor):
        background = background.reshape(1, -1, 1, 1).float().cpu()
    for index, (cells, picture, places) in enumerate(zip(rows, pictures, chosen, strict=True)):
        image = picture.detach().float().cpu()
        for axes in cells:
            axes.set_axis_off()
        cells[0].set_axis_on()
        cells[0].imshow(image.clamp(0, 1).numpy())
        cells[0].set_xticks([])
        cells[0].set_yticks([])
        if labels is not None:
            cells[0].set_xlabel(labels[index], fontsize=8, parse_math=False)
        if index == 0:
            cells[0].set_title("image and tokens" if of_tokens else "image", fontsize=8)
        masks = reflection.masks[index : index + 1, places].float().cpu()
        seen = reflected_images(image.movedim(-1, 0).unsqueeze(0), masks, background)[0]
        for number, (axes, place, shown) in enumerate(
            zip(cells[1:], places, seen, strict=False), start=1
        ):
            row, column = divmod(place, grid[1])
            name = f"{number}: row {row}, column {column}" if of_tokens else f"mask {place}"
            axes.imshow(shown.movedim(0, -1).clamp(0, 1).numpy())
            axes.set_title(
                f"{name}\nscore {float(reflection.scores[index, place]):.3g}", fontsize=8
            )
            if not of_tokens:
                continue
            cell = image.shape[0] / grid[0], image.shape[1] / grid[1]
            _outline(axes, row, column, cell)
            _outline(cells[0], row, column, cell, text=str(number))
    return figure


def _has_one_mask_a_token(reflection: Reflection) -> bool:
    """Whether mask j is proven to be that of image token j: the relevance gives the same.

    That there are as many masks as tokens proves nothing, and masks of zeros prove nothing.
    """
    masks = reflection.masks.cpu()
    grid_size = masks.shape[-2], masks.shape[-1]
    tokens = grid_size[0] * grid_size[1]
    if masks.shape[1] != tokens or not masks.any():
        return False
    block = reflection.relevance.cpu()[:, -tokens:, -tokens:]
    made = [
        reflection_masks(block, grid_size, reflect=reflect, scale_by_maxima=scaled)
        for reflect in get_args(TokenReflect)
        for scaled in (True, False)
    ]
    return any(torch.allclose(masks, found, rtol=0, atol=1e-4) for found in made)


def _chosen_masks(
    tokens: int | Sequence[int] | Sequence[Sequence[int]], scores: Tensor, num_masks: int
) -> list[list[int]]:
    """For each image the numbers of the masks to show."""
    chosen: list[list[Any]]
    if isinstance(tokens, int):
        chosen = scores.argsort(dim=1, descending=True, stable=True)[:, :tokens].tolist()
    elif all(isinstance(token, int) for token in tokens):
        chosen = [list(tokens)] * len(scores)
    else:
        chosen = [list(row) if isinstance(row, Sequence) else [row] for row in tokens]
    if len(chosen) != len(scores) or not all(chosen):
        raise ValueError(
            f"tokens is {tokens!r}; wanted: a number, or one list or {len(scores)} lists of at "
            "least one token"
        )
    unknown = [token for row in chosen for token in row if token not in range(num_masks)]
    if unknown:
        raise ValueError(
            f"tokens names {unknown[0]!r}; wanted: masks, which there are from 0 to {num_masks - 1}"
        )
    return chosen


def _outline(
    axes: Axes, row: int, column: int, cell: tuple[float, float], text: str | None = None
) -> None:
    """A frame around a token, white in black, so that it shows on any picture."""
    height, width = cell
    corner = column * width - 0.5, row * height - 0.5
    for color, line_width in (("black", 2.4), ("white", 1.1)):
        axes.add_patch(
            Rectangle(corner, width, height, fill=False, edgecolor=color, linewidth=line_width)
        )
    if text is not None:
        axes.text(
            corner[0] + width / 2,
            corner[1] + height / 2,
            text,
            color="white",
            fontsize=7,
            ha="center",
            va="center_baseline",
            path_effects=[patheffects.withStroke(linewidth=1.6, foreground="black")],
        )


def relevance_matrix(relevance: Tensor, *, num_prefix_tokens: int = 1, size: float = 4.6) -> Figure:
    """The relevance R among all tokens of one image, prefix tokens apart and drawn larger.

    Row i says which tokens flow into token i; the row of the class token is the map of
    TransformerAttribution. The identity, every token's relevance for itself that the
    roll-out starts from, is taken off: it would outshine the rest. Colours go with the
    cube root of the values, from 0 to the largest of each block.

    Args:
        relevance: (N, N), one of :attr:`Reflection.relevance`.
        num_prefix_tokens: tokens before the image tokens.
        size: side in inches.

    Returns:
        Figure: not attached to any window.

    Raises:
        ValueError: the matrix is not square, or leaves no image tokens.
    """
    _check_matrix(relevance, num_prefix_tokens)
    values = relevance.detach().double().cpu() - torch.eye(len(relevance), dtype=torch.float64)
    prefix, image = slice(0, num_prefix_tokens), slice(num_prefix_tokens, None)
    figure = Figure(figsize=(size * 1.24, size), layout="constrained")
    if num_prefix_tokens == 0:
        axes = figure.subplots()
        drawn = _draw_matrix(axes, values)
        axes.set_xlabel("image token j: from", fontsize=9)
        axes.set_ylabel("image token i: into", fontsize=9)
        figure.colorbar(drawn, ax=axes, shrink=0.8).ax.tick_params(labelsize=8)
        return figure
    share = [_PREFIX_SHARE * num_prefix_tokens, 1.0]
    grid = figure.subplots(2, 2, width_ratios=share, height_ratios=share, squeeze=False)
    _draw_matrix(grid[0, 0], values[prefix, prefix])
    row = _draw_matrix(grid[0, 1], values[prefix, image])
    _draw_matrix(grid[1, 0], values[image, prefix])
    block = _draw_matrix(grid[1, 1], values[image, image])
    name = "prefix token" + ("s" if num_prefix_tokens > 1 else "")
    grid[0, 1].set_title(f"image tokens into {name}: the map's row", fontsize=9)
    grid[1, 0].set_ylabel(f"{name} into image tokens", fontsize=9)
    grid[1, 1].set_xlabel("image tokens j into image tokens i", fontsize=9)
    for drawn, axes in ((row, grid[0]), (block, grid[1])):
        bar = figure.colorbar(drawn, ax=list(axes), shrink=0.95, aspect=25)
        bar.ax.tick_params(labelsize=7)
        if axes is grid[0]:
            bar.set_ticks([0, float(values[prefix, image].max())])
            bar.ax.yaxis.set_major_formatter("{x:.2g}")
    return figure


def reflection_stages(
    relevance: Tensor,
    *,
    num_prefix_tokens: int = 1,
    reflect: TokenReflect = "columns",
    size: float = 2.9,
) -> Figure:
    """How R becomes masks: equations 1-2 and the steps of Figure 4 of Sago & Hotta.

    From left to right: the relevance among image tokens with its diagonal replaced, each
    column from 0 to 1 ("red"), the maxima of the columns from 0 to 1 ("green"), and their
    product, whose column j is mask j. Colours go with the cube root of the values.

    Args:
        relevance: (N, N), one of :attr:`Reflection.relevance`.
        num_prefix_tokens: tokens before the image tokens.
        reflect: as in :class:`~captum_reflected.ReflectedRelevance`; ``"rows"`` does the
            same to the transposed matrix. Components are not made of R and have no stages.
        size: side of one panel in inches.

    Returns:
        Figure: not attached to any window.

    Raises:
        ValueError: the matrix is not square, or leaves no image tokens; ``reflect`` is
            unknown.
    """
    check_option("reflect", reflect, get_args(TokenReflect))
    _check_matrix(relevance, num_prefix_tokens)
    block = relevance.detach().double().cpu()[num_prefix_tokens:, num_prefix_tokens:]
    columns = replace_diagonal((block if reflect == "columns" else block.mT).unsqueeze(0))[0]
    red = min_max(columns, dim=-2)
    green = min_max(columns.amax(dim=-2, keepdim=True), dim=-1)
    figure = Figure(figsize=(4 * size, 1.22 * size), layout="constrained")
    grid = figure.subplots(1, 4)
    _draw_matrix(grid[0], columns)
    _draw_matrix(grid[1], red, top=1)
    _draw_matrix(grid[2], green.expand_as(red), top=1)
    last = _draw_matrix(grid[3], red * green, top=1)
    for axes, title in zip(
        grid,
        (
            "relevance, diagonal replaced",
            "red: each column 0 to 1",
            "green: the columns' maxima 0 to 1",
            "red × green: the masks",
        ),
        strict=True,
    ):
        axes.set_title(title, fontsize=9)
        axes.set_xlabel("column j", fontsize=8)
        axes.set_box_aspect(1)
    grid[0].set_ylabel("image token i" if reflect == "columns" else "transposed", fontsize=8)
    figure.colorbar(last, ax=list(grid), shrink=0.8, aspect=25).ax.tick_params(labelsize=7)
    return figure


def _check_matrix(relevance: Tensor, num_prefix_tokens: int) -> None:
    shape = tuple(relevance.shape)
    if len(shape) != 2 or shape[0] != shape[1]:
        raise ValueError(f"relevance has shape {shape}; wanted: (N, N), of one image")
    if not 0 <= num_prefix_tokens < shape[0]:
        raise ValueError(
            f"num_prefix_tokens is {num_prefix_tokens}; wanted: from 0 to {shape[0] - 1}, so that "
            f"image tokens are left of {shape[0]}"
        )


def _draw_matrix(axes: Axes, values: Tensor, *, top: float | None = None) -> AxesImage:
    highest = float(values.max()) if top is None else top
    axes.set_xticks([])
    axes.set_yticks([])
    return axes.imshow(
        values.clamp(min=0).numpy(),
        cmap=HEAT_COLORS,
        norm=PowerNorm(1 / 3, vmin=0, vmax=highest if highest > 0 else 1),
        aspect="auto",
        interpolation="nearest",
    )
