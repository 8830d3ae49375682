"""Figures: what they show is held against the numbers that they were given."""

from dataclasses import replace

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from scipy import stats

from captum_reflected import ReflectedRelevance
from captum_reflected.masking.reflection import Reflection, reflection_masks
from captum_reflected.metrics import evaluate
from captum_reflected.visualization.curves import metric_curves
from captum_reflected.visualization.maps import comparison_grid
from captum_reflected.visualization.reflection import (
    reflected_gallery,
    reflection_stages,
    relevance_matrix,
)


@pytest.fixture
def pictures():
    return torch.rand(2, 24, 36, 3, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def reflection():
    """Two images of 2 x 3 tokens and their masks, scores 0 to 5 and back."""
    relevance = torch.rand(2, 7, 7, generator=torch.Generator().manual_seed(4))
    masks = reflection_masks(relevance[:, 1:, 1:], (2, 3))
    scores = torch.stack([torch.arange(6.0), 5 - torch.arange(6.0)])
    return Reflection(relevance, masks, scores, torch.rand(2, 6))


@pytest.fixture
def relevance():
    return torch.eye(13) + torch.rand(13, 13, generator=torch.Generator().manual_seed(1))


def drawn(axes):
    return [np.asarray(image.get_array()) for image in axes.images]


def gallery_cells(figure, rows=2):
    return np.array(figure.axes).reshape(rows, -1)


def test_the_gallery_shows_the_tokens_of_highest_score_through_their_masks(pictures, reflection):
    cells = gallery_cells(reflected_gallery(pictures, reflection, tokens=2, background=0.25))
    assert cells.shape == (2, 3)
    for row, picture, masks, tokens in zip(
        cells, pictures, reflection.masks, ([5, 4], [0, 1]), strict=True
    ):
        np.testing.assert_allclose(drawn(row[0])[0], picture)
        for axes, token in zip(row[1:], tokens, strict=True):
            top, left = 12 * (token // 3), 12 * (token % 3)
            mask = masks[token].repeat_interleave(12, 0).repeat_interleave(12, 1)[..., None]
            wanted = picture * mask + 0.25 * (1 - mask)
            np.testing.assert_allclose(drawn(axes)[0], wanted, atol=1e-6)
            frame = axes.patches[-1]
            assert (frame.get_x(), frame.get_y()) == (left - 0.5, top - 0.5)
            assert (frame.get_width(), frame.get_height()) == (12, 12)
    assert cells[0, 1].get_title() == "1: row 1, column 2\nscore 5"
    assert cells[1, 2].get_title() == "2: row 0, column 1\nscore 4"
    assert [text.get_text() for text in cells[0, 0].texts] == ["1", "2"]


def test_the_gallery_takes_tokens_for_all_images_or_for_each(pictures, reflection):
    same = gallery_cells(reflected_gallery(pictures, reflection, tokens=[3]))
    assert [row[1].get_title()[:18] for row in same] == ["1: row 1, column 0"] * 2
    each = gallery_cells(reflected_gallery(pictures, reflection, tokens=[[3], [2, 1]]))
    assert [bool(axes.images) for axes in each[0]] == [True, True, False]
    assert each[1, 2].get_title() == "2: row 0, column 1\nscore 4"


def test_the_gallery_shows_what_the_model_sees(vit, images, pictures):
    """With the mean as background it is the reflected image, put back into colours."""
    mean, std = torch.tensor([0.4, 0.5, 0.6]), 0.2
    colours = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    inputs = ((colours - mean) / std).permute(0, 3, 1, 2)
    reflection = ReflectedRelevance(vit).reflect(inputs, target=1)
    figure = reflected_gallery(colours, reflection, tokens=[7], background=mean)
    mask = reflection.masks[0, 7].repeat_interleave(8, 0).repeat_interleave(8, 1)
    seen = (inputs[0] * mask).permute(1, 2, 0) * std + mean
    np.testing.assert_allclose(drawn(figure.axes[1])[0], seen.clamp(0, 1), atol=1e-6)


@pytest.mark.parametrize("count", [8, 16])  # 16: one mask a token, and nothing that proves it
def test_masks_that_are_not_proven_to_be_of_tokens_are_named_masks(vit, images, count):
    colours = torch.rand(3, 32, 32, 3, generator=torch.Generator().manual_seed(2))
    masks = torch.rand(3, count, 4, 4, generator=torch.Generator().manual_seed(3)).round()
    reflection = replace(ReflectedRelevance(vit).reflect(images, target=1), masks=masks)
    cells = gallery_cells(reflected_gallery(colours, reflection, tokens=[0, 3]), rows=3)
    for row, masks, scores in zip(cells, reflection.masks, reflection.scores, strict=True):
        assert not any(axes.patches or axes.texts for axes in row)
        for axes, place in zip(row[1:], (0, 3), strict=True):
            assert axes.get_title() == f"mask {place}\nscore {float(scores[place]):.3g}"
            shown = drawn(axes)[0].reshape(4, 8, 4, 8, 3).mean(axis=(1, 3, 4))
            np.testing.assert_array_equal(shown == 0.5, masks[place] == 0)
    assert cells[0, 0].get_title() == "image"


@pytest.mark.parametrize("reflect", ["columns", "rows"])
@pytest.mark.parametrize("scaled", [True, False])
def test_one_mask_a_token_is_proven_by_the_relevance(vit, images, reflect, scaled):
    attributor = ReflectedRelevance(vit, reflect=reflect, scale_by_maxima=scaled)
    reflection = attributor.reflect(images, target=1)
    figure = reflected_gallery(torch.rand(3, 32, 32, 3), reflection, tokens=[6])
    assert gallery_cells(figure, rows=3)[2, 1].get_title().startswith("1: row 1, column 2")
    turned = replace(reflection, masks=reflection.masks.flip(1))
    figure = reflected_gallery(torch.rand(3, 32, 32, 3), turned, tokens=[6])
    assert gallery_cells(figure, rows=3)[2, 1].get_title().startswith("mask 6")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": [6]}, "tokens names 6; wanted: indices of masks, from 0 to 5"),
        ({"tokens": [-1]}, "tokens names -1"),
        ({"tokens": 0}, "at least one token"),
        ({"tokens": [[1]]}, "one list or 2 lists"),
    ],
)
def test_the_gallery_says_what_is_wrong_with_tokens(pictures, reflection, options, message):
    with pytest.raises(ValueError, match=message):
        reflected_gallery(pictures, reflection, **options)


def test_the_gallery_wants_a_picture_for_each_image(pictures, reflection):
    with pytest.raises(ValueError, match="1 pictures and the reflection is of 2 images"):
        reflected_gallery(pictures[:1], reflection)


HEAT = torch.ones(2, 24, 36)


@pytest.mark.parametrize(
    ("maps", "masks", "message"),
    [
        ({"a": torch.ones(2, 12, 18)}, None, r"shape \(12, 18\) and its picture \(24, 36, 3\)"),
        ({"a": torch.ones(2, 3, 12, 36)}, None, r"shape \(12, 36\) and its picture"),
        ({"a": torch.ones(3, 24, 36)}, None, "'a' has 3 maps and there are 2 pictures"),
        ({"a": HEAT * torch.nan}, None, "map of 'a' holds NaN"),
        ({"a": HEAT}, torch.ones(2, 36, 24).bool(), r"'masks' has shape \(36, 24\)"),
        ({"a": HEAT}, HEAT[:1].bool(), "'masks' has 1 maps"),
    ],
    ids=range(6),
)
def test_maps_that_are_not_the_pictures_are_refused(pictures, maps, masks, message):
    comparison_grid(pictures, {"a": HEAT, "b": [None, HEAT[0]]}, masks=[None, HEAT[0] > 0])
    with pytest.raises(ValueError, match=message):
        comparison_grid(pictures, maps, masks=masks)


def test_pictures_are_from_0_to_1(pictures, reflection):
    for bad, message in (
        (4 * pictures - 2, "has values from -2 to 2; wanted: from 0 to 1"),
        (pictures.permute(0, 3, 1, 2), r"shape \(3, 24, 36\); wanted: \(H, W, 3\)"),
        (pictures * torch.nan, "has values from nan to nan"),
    ):
        for draw in (
            lambda bad=bad: comparison_grid(bad, {"a": HEAT}),
            lambda bad=bad: reflected_gallery(bad, reflection),
        ):
            with pytest.raises(ValueError, match=message):
                draw()


def test_curves_that_cannot_be_compared_are_refused(vit, images):
    maps = torch.rand(3, 32, 32)
    results = {
        "one": evaluate(vit, images, maps, target=2),
        "coarse": evaluate(vit, images, maps, target=2, pixels_per_step=300),
    }
    with pytest.raises(ValueError, match="curves of 'coarse' have 5 points and the first 29"):
        metric_curves(results)
    logits = {"logits": evaluate(vit, images, maps, target=2, score="logit")}
    with pytest.raises(ValueError, match="curves of 'logits' go beyond 0 to 1"):
        metric_curves(logits)


@pytest.mark.parametrize("score", ["probability", "logit"])
def test_metric_curves_are_means_with_their_intervals(vit, images, score):
    generator = torch.Generator().manual_seed(3)
    results = {
        name: evaluate(
            vit, images, torch.rand(3, 32, 32, generator=generator), target=2, score=score
        )
        for name in ("one", "cost in $", "three")
    }
    figure = metric_curves(results, score=score)
    for axes, kind in zip(figure.axes, ("deletion", "insertion"), strict=True):
        for line, result in zip(axes.lines, results.values(), strict=True):
            curves = getattr(result, f"{kind}_curve").double().numpy()
            np.testing.assert_allclose(line.get_xdata(), result.fractions.numpy())
            np.testing.assert_allclose(line.get_ydata(), curves.mean(axis=0), rtol=1e-6)
        low, high = stats.ttest_1samp(curves, 0).confidence_interval(0.95)
        corners = axes.collections[-1].get_paths()[0].vertices
        for bounds in (low, high):
            points = np.stack([result.fractions.double().numpy(), bounds], axis=1)
            distances = np.abs(corners[None] - points[:, None]).sum(axis=-1)
            assert distances.min(axis=1).max() < 1e-6
        assert len({line.get_linestyle() for line in axes.lines}) > 1  # told apart without colour
        lowest = min(line.get_ydata().min() for line in axes.lines)
        assert axes.get_ylim()[0] <= min(lowest, 0)
        assert score == "logit" or axes.get_ylim()[1] <= 1.04
    assert figure.axes[0].get_ylim() == figure.axes[1].get_ylim()
    assert figure.axes[0].get_ylabel() == f"{score} of the explained class"
    assert len(figure.legends[0].get_texts()) == 3


def test_metric_curves_of_one_image_have_no_band(vit, images):
    result = evaluate(vit, images[:1], torch.rand(1, 32, 32), target=0)
    axes = metric_curves({"only": result}).axes[0]
    corners = axes.collections[0].get_paths()[0].vertices
    assert corners[:, 1].max() == pytest.approx(float(result.deletion_curve.max()))


def test_metric_curves_want_results_and_a_known_score(vit, images):
    with pytest.raises(ValueError, match="results is empty"):
        metric_curves({})
    result = evaluate(vit, images[:1], torch.rand(1, 32, 32), target=0)
    with pytest.raises(ValueError, match="score is 'loss'"):
        metric_curves({"only": result}, score="loss")


@pytest.mark.parametrize("prefix", [0, 1, 2])
def test_the_relevance_matrix_keeps_every_entry_and_drops_the_identity(relevance, prefix):
    figure = relevance_matrix(relevance, num_prefix_tokens=prefix)
    parts = [drawn(axes)[0] for axes in figure.axes if axes.images]
    values = (relevance.double() - torch.eye(13)).clamp(min=0).numpy()
    whole = np.block([parts[:2], parts[2:]]) if prefix else parts[0]
    np.testing.assert_allclose(whole, values)


@pytest.mark.parametrize("reflect", ["columns", "rows"])
def test_the_stages_end_in_the_masks_of_the_attributor(relevance, reflect):
    figure = reflection_stages(relevance, reflect=reflect)
    stages = [drawn(axes)[0] for axes in figure.axes[:4]]
    masks = reflection_masks(relevance[None, 1:, 1:].double(), (3, 4), reflect=reflect)[0]
    np.testing.assert_allclose(stages[3], masks.flatten(1).T)
    without_green = reflection_masks(
        relevance[None, 1:, 1:].double(), (3, 4), reflect=reflect, scale_by_maxima=False
    )[0]
    np.testing.assert_allclose(stages[1], without_green.flatten(1).T)
    np.testing.assert_allclose(stages[1] * stages[2], stages[3])
    block = relevance[1:, 1:] if reflect == "columns" else relevance[1:, 1:].T
    off = ~np.eye(12, dtype=bool)
    np.testing.assert_allclose(stages[0][off], block.numpy()[off])


def test_components_have_no_stages_and_are_not_made_of_the_relevance(relevance):
    for make in (
        lambda: reflection_stages(relevance, reflect="components"),
        lambda: reflection_masks(relevance[None, 1:, 1:], (3, 4), reflect="components"),
    ):
        with pytest.raises(ValueError, match="reflect is 'components'; wanted: one of columns, r"):
            make()


@pytest.mark.parametrize("draw", [relevance_matrix, reflection_stages])
def test_matrices_that_are_none_are_refused(draw, relevance):
    with pytest.raises(ValueError, match=r"shape \(1, 13, 13\); wanted: \(N, N\)"):
        draw(relevance[None])
    with pytest.raises(ValueError, match="num_prefix_tokens is 13; wanted: from 0 to 12"):
        draw(relevance, num_prefix_tokens=13)


def test_figures_of_zeros_are_drawn_and_no_window_is_opened(tmp_path, pictures):
    """Maps without relevance are no error, and pyplot is left alone."""
    zeros = Reflection(
        torch.eye(7).repeat(2, 1, 1), torch.zeros(2, 6, 2, 3), torch.zeros(2, 6), torch.zeros(2, 6)
    )
    figures = [
        comparison_grid(pictures, {"zero": torch.zeros(2, 24, 36)}),
        reflected_gallery(pictures, zeros, labels=["a", "cost in $"]),
        relevance_matrix(zeros.relevance[0]),
        reflection_stages(zeros.relevance[0]),
    ]
    for number, figure in enumerate(figures):
        assert isinstance(figure, Figure)
        figure.savefig(tmp_path / f"{number}.png")
        assert (tmp_path / f"{number}.png").stat().st_size > 1000
    assert plt.get_fignums() == []
