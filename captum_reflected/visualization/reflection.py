"""Figures of the relevance among tokens and of reflected images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, get_args

import torch
from matplotlib import patheffects
from matplotlib.axes import Axes
from matplotlib.colors import PowerNorm
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.patches import Rectangle
from torch import Tensor

from captum_reflected.inputs.checks import check_option
from captum_reflected.masking.reflection import (
    Reflect,
    Reflection,
    min_max,
    reflected_images,
    reflection_masks,
    replace_diagonal,
)
from captum_reflected.visualization.maps import check_pictures
from captum_reflected.visualization.notebook_figure import NotebookFigure
from captum_reflected.visualization.overlay import HEAT_COLORS
from captum_reflected.visualization.text import wrapped

# Relative width of a prefix token beside the image tokens, so that its row is visible.
_PREFIX_SHARE = 0.045


def reflected_gallery(
    pictures: Tensor | Sequence[Tensor],
    reflection: Reflection,
    *,
    tokens: int | Sequence[int] | Sequence[Sequence[int]] = 5,
    background: float | Tensor = 0.5,
    labels: Sequence[str] | None = None,
    size: float = 1.9,
) -> Figure:
    """Draws reflected images of some tokens, as in figure 5 of Sago & Hotta.

    Each row shows one image: the picture with the tokens outlined and numbered, then each token's
    reflected image with the token outlined and the model's score.

    If the masks are not those of the tokens, computed from the relevance in ``reflection``, they
    are only named by their number, and no token is outlined.

    Args:
        pictures: (B, H, W, C), from 0 to 1, or B of (H, W, C).
        reflection: the result of ``ReflectedRelevance.reflect`` for the same images.
        tokens: the number of tokens to show, those with the highest scores; or the indices of
            the masks, from 0, as one list for all images or one list per image. The paper's
            mask j is that of image token j.
        background: the value of masked pixels, a number or a colour (C,). The mean that the
            model's preprocessing subtracts shows what the model receives with the paper's
            baseline of 0.
        labels: B texts, one under each picture.
        size: side length of one cell in inches.

    Returns:
        Figure: not attached to any window.

    Raises:
        ValueError: the numbers of pictures and images differ, or a mask does not exist.
    """
    count, num_masks, *grid = reflection.masks.shape
    if len(pictures) != count:
        raise ValueError(
            f"there are {len(pictures)} pictures and the reflection is of {count} images; "
            "wanted: the same images"
        )
    check_pictures(pictures)
    chosen = _chosen_masks(tokens, reflection.scores, num_masks)
    is_per_token = _has_one_mask_per_token(reflection)
    columns = 1 + max(len(row) for row in chosen)
    figure = NotebookFigure(
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
            cells[0].set_xlabel(wrapped(labels[index], size, 8), fontsize=8, parse_math=False)
        if index == 0:
            cells[0].set_title("image and tokens" if is_per_token else "image", fontsize=8)
        masks = reflection.masks[index : index + 1, places].float().cpu()
        reflected = reflected_images(image.movedim(-1, 0).unsqueeze(0), masks, background)[0]
        for number, (axes, place, shown) in enumerate(
            zip(cells[1:], places, reflected, strict=False), start=1
        ):
            row, column = divmod(place, grid[1])
            name = f"{number}: row {row}, column {column}" if is_per_token else f"mask {place}"
            axes.imshow(shown.movedim(0, -1).clamp(0, 1).numpy())
            axes.set_title(
                f"{name}\nscore {float(reflection.scores[index, place]):.3g}", fontsize=8
            )
            if not is_per_token:
                continue
            cell = image.shape[0] / grid[0], image.shape[1] / grid[1]
            _outline(axes, row, column, cell)
            _outline(cells[0], row, column, cell, text=str(number))
    return figure


def _has_one_mask_per_token(reflection: Reflection) -> bool:
    """Whether mask j is that of image token j, verified by computing the masks from the relevance.

    An equal number of masks and tokens is not sufficient, and neither are masks of zeros.
    """
    masks = reflection.masks.cpu()
    grid_size = masks.shape[-2], masks.shape[-1]
    tokens = grid_size[0] * grid_size[1]
    if masks.shape[1] != tokens or not masks.any():
        return False
    block = reflection.relevance.cpu()[:, -tokens:, -tokens:]
    expected = [
        reflection_masks(block, grid_size, reflect=reflect, scale_by_maxima=scaled)
        for reflect in get_args(Reflect)
        for scaled in (True, False)
    ]
    return any(torch.allclose(masks, candidate, rtol=0, atol=1e-4) for candidate in expected)


def _chosen_masks(
    tokens: int | Sequence[int] | Sequence[Sequence[int]], scores: Tensor, num_masks: int
) -> list[list[int]]:
    """For each image, the indices of the masks to show."""
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
            f"tokens names {unknown[0]!r}; wanted: indices of masks, from 0 to {num_masks - 1}"
        )
    return chosen


def _outline(
    axes: Axes, row: int, column: int, cell: tuple[float, float], text: str | None = None
) -> None:
    """Draws a white frame with a black border around a token, visible on any picture."""
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
    """Draws the relevance R among all tokens of one image; prefix tokens are separate and larger.

    Row i shows which tokens flow into token i; the row of the class token is the map of
    TransformerAttribution. The identity that the roll-out starts from, every token's relevance
    for itself, is subtracted, since it would dominate the figure. Colours are proportional to
    the cube root of the values, from 0 to the largest of each block.

    Args:
        relevance: (N, N), one of :attr:`Reflection.relevance`.
        num_prefix_tokens: number of tokens before the image tokens.
        size: side length in inches.

    Returns:
        Figure: not attached to any window.

    Raises:
        ValueError: the matrix is not square, or there are no image tokens.
    """
    _check_matrix(relevance, num_prefix_tokens)
    values = relevance.detach().double().cpu() - torch.eye(len(relevance), dtype=torch.float64)
    prefix, image = slice(0, num_prefix_tokens), slice(num_prefix_tokens, None)
    figure = NotebookFigure(figsize=(size * 1.24, size), layout="constrained")
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
    reflect: Reflect = "columns",
    size: float = 2.9,
) -> Figure:
    """Draws how masks are computed from R: equations 1-2 and Figure 4 of Sago & Hotta.

    From left to right: the relevance among image tokens with its diagonal replaced, each
    column normalised to [0, 1] ("red"), the maxima of the columns normalised to [0, 1]
    ("green"), and their product, whose column j is mask j. Colours are proportional to the cube
    root of the values.

    Args:
        relevance: (N, N), one of :attr:`Reflection.relevance`.
        num_prefix_tokens: number of tokens before the image tokens.
        reflect: as in :class:`~captum_reflected.ReflectedRelevance`; ``"rows"`` uses the
            transposed matrix. The masks of MaskRegression are not computed from R and have no
            such stages.
        size: side length of one panel in inches.

    Returns:
        Figure: not attached to any window.

    Raises:
        ValueError: the matrix is not square, there are no image tokens, or ``reflect`` is
            unknown.
    """
    check_option("reflect", reflect, get_args(Reflect))
    _check_matrix(relevance, num_prefix_tokens)
    block = relevance.detach().double().cpu()[num_prefix_tokens:, num_prefix_tokens:]
    columns = replace_diagonal((block if reflect == "columns" else block.mT).unsqueeze(0))[0]
    red = min_max(columns, dim=-2)
    green = min_max(columns.amax(dim=-2, keepdim=True), dim=-1)
    figure = NotebookFigure(figsize=(4 * size, 1.22 * size), layout="constrained")
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
            f"some of the {shape[0]} tokens are image tokens"
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
