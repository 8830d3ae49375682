"""Localisation metrics, by hand and on scenes whose truth is known."""

import pytest
import torch

from captum_reflected import TransformerAttribution, demo
from captum_reflected.metrics import (
    average_precision,
    pointing_game,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)

HEAT = torch.tensor([[[4.0, 1.0, 0.0], [3.0, -9.0, 2.0]]])
MASK = torch.tensor([[[True, False, False], [False, True, True]]])
METRICS = [relevance_mass_accuracy, relevance_rank_accuracy, pointing_game, average_precision]


def test_by_hand():
    assert relevance_mass_accuracy(HEAT, masks=MASK).item() == pytest.approx(0.6)
    assert relevance_rank_accuracy(HEAT, masks=MASK).item() == pytest.approx(2 / 3)
    assert pointing_game(HEAT, masks=MASK).item() == 1
    assert pointing_game(HEAT, masks=~MASK).item() == 0
    # The object's pixels are found at the ranks 1, 3 and 6.
    found = average_precision(HEAT, masks=MASK).item()
    assert found == pytest.approx((1 / 1 + 2 / 3 + 3 / 6) / 3)
    tied = torch.ones(1, 2, 3)
    for metric in METRICS:
        torch.testing.assert_close(metric(tied, masks=MASK), torch.tensor([0.5]))


def test_average_precision_of_tied_pixels():
    """Both pixels of value 2 are found at once: 2 of 3 pixels lie on the object."""
    heat = torch.tensor([[[3.0, 2.0], [2.0, 0.0]]])
    mask = torch.tensor([[[True, True], [False, False]]])
    expected = (1 / 1 + 2 / 3) / 2
    for turned in (heat, heat.mT):
        assert average_precision(turned, masks=mask).item() == pytest.approx(expected)
    assert average_precision(-heat, masks=mask).item() == pytest.approx((1 / 3 + 2 / 4) / 2)
    assert average_precision(heat, masks=mask | True).item() == 1


def test_average_precision_is_scikit_learns():
    reference = pytest.importorskip("sklearn.metrics").average_precision_score
    torch.manual_seed(0)
    maps, masks = torch.randn(6, 9, 11), torch.rand(6, 9, 11) < 0.3
    ignore = torch.rand(6, 9, 11) < 0.2
    maps[:4] = (2 * maps[:4]).round()  # many ties
    maps[0] = 0
    for counted in (torch.ones_like(ignore), ~ignore):
        found = average_precision(maps, masks=masks, ignore=~counted)
        expected = [
            reference(mask[kept].numpy(), heat[kept].numpy())
            for heat, mask, kept in zip(maps, masks, counted, strict=True)
        ]
        torch.testing.assert_close(found, torch.tensor(expected), check_dtype=False)


def test_ignored_pixels_by_hand():
    """Without the highest pixel, object: 1 and -9 and 2 of 1, 0, 3, -9, 2."""
    ignore = torch.tensor([[[True, False, False], [False, False, False]]])
    for masks in (MASK, MASK & ~ignore):  # what the mask says of an ignored pixel is not used
        arguments = {"masks": masks, "ignore": ignore}
        assert relevance_mass_accuracy(HEAT, **arguments).item() == pytest.approx(2 / 6)
        assert relevance_rank_accuracy(HEAT, **arguments).item() == pytest.approx(1 / 2)
        assert pointing_game(HEAT, **arguments).item() == 0
        assert pointing_game(HEAT, **arguments, tolerance=1).item() == 1
        found = average_precision(HEAT, **arguments).item()
        assert found == pytest.approx((1 / 2 + 2 / 5) / 2)
    # An ignored object does not count within the tolerance either.
    masks = torch.tensor([[[True, False, False], [False, False, True]]])
    assert pointing_game(HEAT, masks=masks, ignore=ignore, tolerance=1).item() == 0


@pytest.mark.parametrize("metric", METRICS)
def test_ignored_pixels_are_as_if_they_were_not_there(metric):
    torch.manual_seed(0)
    maps, masks = torch.randn(5, 4, 6), torch.rand(5, 4, 6) < 0.4
    ignore = torch.zeros_like(masks)
    ignore[:, :, 4:] = True
    cropped = metric(maps[..., :4], masks=masks[..., :4])
    torch.testing.assert_close(metric(maps, masks=masks, ignore=ignore), cropped)
    maps[..., 4:] *= 1e30
    torch.testing.assert_close(metric(maps, masks=~ignore & masks, ignore=ignore), cropped)
    none = torch.zeros_like(ignore)
    torch.testing.assert_close(
        metric(maps, masks=masks, ignore=none), metric(maps, masks=masks), rtol=0, atol=0
    )


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("ignore", "error", "message"),
    [
        (MASK.float(), TypeError, "ignore has dtype torch.float32; wanted: torch.bool"),
        ([1], TypeError, "ignore is a list"),
        (MASK[:, :1], ValueError, r"ignore has shape \(1, 1, 3\); wanted: \(1, 2, 3\)"),
        (MASK, ValueError, r"masks is ignored as a whole for image\(s\) \[0\]"),
    ],
)
def test_bad_ignored_pixels(metric, ignore, error, message):
    with pytest.raises(error, match=message):
        metric(HEAT, masks=MASK, ignore=ignore)


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
    # No positive value: 0. Average precision depends only on the order, here of 0, 1, 2, 3, 4, 9.
    without = (1 / 3 + 2 / 5 + 3 / 6) / 3 if metric is average_precision else 0
    torch.testing.assert_close(both, torch.tensor([expected.item(), without]))
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
