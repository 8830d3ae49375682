"""Localisation metrics, by hand and on scenes whose truth is known."""

import pytest
import torch

from captum_reflected import TransformerAttribution, demo
from captum_reflected.metrics import (
    pointing_game,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)

HEAT = torch.tensor([[[4.0, 1.0, 0.0], [3.0, -9.0, 2.0]]])
MASK = torch.tensor([[[True, False, False], [False, True, True]]])
METRICS = [relevance_mass_accuracy, relevance_rank_accuracy, pointing_game]


def test_by_hand():
    assert relevance_mass_accuracy(HEAT, masks=MASK).item() == pytest.approx(0.6)
    assert relevance_rank_accuracy(HEAT, masks=MASK).item() == pytest.approx(2 / 3)
    assert pointing_game(HEAT, masks=MASK).item() == 1
    assert pointing_game(HEAT, masks=~MASK).item() == 0
    tied = torch.ones(1, 2, 3)
    for metric in METRICS:
        torch.testing.assert_close(metric(tied, masks=MASK), torch.tensor([0.5]))


def test_the_mass_of_very_large_numbers():
    heat = torch.full((1, 2, 3), 3e38)
    assert relevance_mass_accuracy(heat, masks=MASK).item() == pytest.approx(0.5)


def test_tolerance_is_a_distance():
    heat, mask = torch.zeros(1, 7, 9), torch.zeros(1, 7, 9, dtype=torch.bool)
    heat[0, 0, 0] = 1
    mask[0, 4, 3] = True
    assert pointing_game(heat, masks=mask, tolerance=4.9).item() == 0
    assert pointing_game(heat, masks=mask, tolerance=5).item() == 1
    assert pointing_game(heat, masks=mask, tolerance=1000).item() == 1


@pytest.mark.parametrize("metric", METRICS)
def test_forms(metric):
    expected = metric(HEAT, masks=MASK)
    for given in (HEAT[:, None], HEAT[:, None].expand(-1, 3, -1, -1), (HEAT,), HEAT.half()):
        torch.testing.assert_close(metric(given, masks=MASK), expected)
    both = metric(torch.cat([HEAT, -HEAT.abs()]), masks=torch.cat([MASK, MASK]))
    assert both.tolist() == [expected.item(), 0]
    for bad, error, message in (
        (MASK.float(), TypeError, "dtype torch.float32; wanted: torch.bool"),
        ([1], TypeError, "masks is a list"),
        (MASK[0], ValueError, "wanted: .B, H, W."),
        (MASK & False, ValueError, "masks is empty for image.s. .0."),
        (MASK[:, :1], ValueError, "attributions has shape"),
    ):
        with pytest.raises(error, match=message):
            metric(HEAT, masks=bad)


@pytest.mark.parametrize(
    ("tolerance", "error"), [("1", TypeError), (-1, ValueError), (float("inf"), ValueError)]
)
def test_bad_tolerance(tolerance, error):
    with pytest.raises(error, match="tolerance is"):
        pointing_game(HEAT, masks=MASK, tolerance=tolerance)


@pytest.mark.parametrize("metric", METRICS)
def test_an_explanation_beats_a_uniform_map(metric):
    scenes = demo.load_scenes()
    images = demo.preprocess(scenes.images)
    heat = TransformerAttribution(demo.load_model()).attribute(images, scenes.labels)
    uniform = torch.ones_like(heat)
    assert (
        metric(heat, masks=scenes.masks).mean() > 1.5 * metric(uniform, masks=scenes.masks).mean()
    )
