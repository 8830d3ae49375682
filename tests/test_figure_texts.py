"""Texts of figures neither overlap, nor cover a picture, nor run out of the figure."""

import itertools
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.font_manager import FontProperties
from matplotlib.textpath import TextPath

from captum_reflected.explanations.comparison import Comparison
from captum_reflected.explanations.explanation import Explanation
from captum_reflected.visualization import comparison_grid
from captum_reflected.visualization.cells import picture_inches
from captum_reflected.visualization.explanation_figure import FigureRow, explanation_figure
from captum_reflected.visualization.overlay import Box, HeatScale
from captum_reflected.visualization.text import printable, wrapped

NAMES = {
    "short": "cup",
    "sentence": "a photo of a cup of coffee on a saucer, as somebody could describe it in a prompt "
    * 3,
    "word": "vit_base_patch14_reg4_dinov2.lvd142m/" * 5,
    "wide": "W" * 150,
    "other": "tab\tzero\0 $x_1^2$ \\frac{ \ud800 no\u00a0break",
}
SIZES = {"tall": (96, 16), "wide": (16, 96), "strip": (4, 400), "pole": (400, 4), "dot": (1, 1)}
CASES = [
    *(pytest.param(size, NAMES["sentence"], id=key) for key, size in SIZES.items()),
    *(
        pytest.param(SIZES["wide"], NAMES[key], id=key)
        for key in ("short", "word", "wide", "other")
    ),
]


def drawn_boxes(figure):
    """What is drawn, after layout, in pixels: the texts that are not empty, and the pictures."""
    figure.draw_without_rendering()
    renderer = FigureCanvasAgg(figure).get_renderer()
    texts = list(figure.texts)
    for axes in figure.axes:
        texts.append(axes.title)
        if axes.axison:
            texts += [axes.xaxis.label, axes.yaxis.label]
            texts += [*axes.get_xticklabels(), *axes.get_yticklabels()]
    shown = [(one.get_text(), one.get_window_extent(renderer)) for one in texts if one.get_text()]
    return shown, [axes.get_window_extent() for axes in figure.axes if axes.images]


def check(figure, *names):
    """Fails if a text is not as it should be; returns the boxes of the pictures."""
    texts, pictures = drawn_boxes(figure)
    whole = figure.bbox
    for text, box in texts:
        assert box.x0 >= 0, text
        assert box.y0 >= 0, text
        assert box.x1 <= whole.x1, text
        assert box.y1 <= whole.y1, text
    for (text, box), (other, other_box) in itertools.combinations(texts, 2):
        assert not overlap(box, other_box), (text, other)
    for (text, box), picture in itertools.product(texts, pictures):
        assert not overlap(box, picture), text
    for one, other in itertools.combinations(pictures, 2):
        assert not overlap(one, other)
    everything = "".join(bare(text) for text, _ in texts)
    for name in names:
        assert bare(printable(name).replace(r"\xa0", "")) in everything
    return pictures


def overlap(one, other):
    return min(one.x1, other.x1) - max(one.x0, other.x0) > 0.5 and (
        min(one.y1, other.y1) - max(one.y0, other.y0) > 0.5
    )


def bare(text):
    return re.sub(r"\s", "", text)


def explanation(size, name, count=1, title="MaskRegression"):
    height, width = size
    generator = torch.Generator().manual_seed(0)
    numbers = torch.arange(count)
    return Explanation(
        torch.rand(count, height, width, generator=generator) / 1e4 + 1e-5,
        torch.rand(count, height, width, 3, generator=generator),
        numbers,
        0.5 + 0 * numbers,
        numbers + 1,
        0.5 + 0 * numbers,
        "key",
        title,
        "VisionTransformer",
        (name,) * (count + 1),
    )


@pytest.mark.parametrize(("size", "name"), CASES)
def test_an_explanation(size, name):
    found = explanation(size, name, title=f"Method ({name})")
    photo, map_, _ = check(found.plot(), name, found.title)
    assert photo.width / photo.height == pytest.approx(size[1] / size[0], rel=0.02)
    assert (map_.width, map_.height) == pytest.approx((photo.width, photo.height))


@pytest.mark.parametrize("inches", [0.9, 1.4, 6.0])
def test_an_explanation_in_another_size(inches):
    check(explanation((24, 24), NAMES["sentence"], count=2).plot(size=inches))


@pytest.mark.parametrize(("size", "name"), CASES)
def test_a_comparison(size, name):
    methods = ("BalancedRelevance", f"MaskRegression ({name})", "AttentionRollout")
    figure = Comparison({one: explanation(size, name, 2, one) for one in methods}, {}).figure
    pictures = check(figure, name, *methods)
    assert len(pictures) == 2 * 4


def test_pictures_of_several_sizes_in_one_grid():
    pictures = [torch.rand(*size, 3) for size in SIZES.values()]
    maps = {"one": [torch.rand(*size) for size in SIZES.values()], "two": [None] * len(SIZES)}
    labels = list(NAMES.values())
    figure = comparison_grid(pictures, maps, labels=labels, masks=[None] * len(SIZES))
    assert len(check(figure, *labels)) == 2 * len(SIZES)


@pytest.mark.parametrize(("size", "name"), CASES)
def test_a_photo_of_the_command_line(size, name):
    """The heading has parts, which stay whole where a line has room for them."""
    photo = (255 * torch.rand(*size, 3)).byte().numpy()
    box = Box(size[1] / 2 - 2, size[0] / 2 - 2, size[1] / 2 + 2, size[0] / 2 + 2)
    row = FigureRow(
        photo, f"explained: {name} (1.0%)", [photo] * 2, [HeatScale(1e-5, 2e-4)] * 2, box
    )
    parts = ["photo.jpg", f"predicted: {name} (1.0%)", "model: deit tiny"]
    heading = "   ".join(part.replace(" ", "\u00a0") for part in parts)
    figure = explanation_figure([row, row], ["BalancedRelevance", name], heading=heading)
    check(figure, name, *parts)
    assert "model:\u00a0deit\u00a0tiny" in figure.texts[0].get_text()


def test_strips_keep_their_proportions_and_are_longer_than_other_pictures():
    assert picture_inches((100, 100, 3), 3.0) == (3.0, 3.0)
    assert picture_inches((100, 200), 3.0) == (1.5, 3.0)
    assert picture_inches((150, 100), 3.0) == (4.5, 3.0)
    for shape in ((60, 6), (300, 6), (6, 60), (6, 300)):
        height, width = picture_inches(shape, 3.0)
        assert height / width == pytest.approx(shape[0] / shape[1])
        assert min(height, width) >= 0.18
        assert max(height, width) <= 9.0


@settings(deadline=None, max_examples=40)
@given(st.text(max_size=80), st.floats(0.3, 3), st.sampled_from([8, 10, 11]))
def test_lines_have_room_and_nothing_is_lost(text, inches, font_size):
    lines = wrapped(text, inches, font_size).split("\n")
    assert bare("".join(lines)) == bare(
        "".join(c if c in "\n\u00a0" else printable(c) for c in text)
    )
    font = FontProperties(size=font_size)
    for line in lines:
        assert (
            len(line) <= 1 or TextPath((0, 0), line, prop=font).get_extents().width <= 72 * inches
        )
