"""Confidence intervals against scipy."""

import math
import random

import numpy as np
import pytest
import torch
from scipy import stats

from captum_reflected.metrics import mean_interval

VALUES = torch.rand(23, generator=torch.Generator().manual_seed(3)) ** 3


@pytest.mark.parametrize("confidence", [0.5, 0.95, 0.999])
@pytest.mark.parametrize("count", [2, 3, 23])
def test_the_interval_is_students(count, confidence):
    values = VALUES[:count].double().numpy()
    low, high = stats.t.interval(
        confidence, count - 1, loc=values.mean(), scale=stats.sem(values, ddof=1)
    )
    interval = mean_interval(VALUES[:count], confidence=confidence)
    assert interval.mean == pytest.approx(values.mean(), rel=1e-12)
    assert (interval.low, interval.high) == pytest.approx((low, high), rel=1e-9)
    assert (interval.count, interval.confidence) == (count, confidence)


def test_the_interval_of_paired_differences_is_the_paired_t_test():
    first, second = VALUES[:11].double().numpy(), VALUES[12:].double().numpy()
    wanted = stats.ttest_rel(first, second).confidence_interval(0.9)
    interval = mean_interval(first - second, confidence=0.9)
    assert (interval.low, interval.high) == pytest.approx((wanted.low, wanted.high), rel=1e-9)


def test_the_interval_holds_the_true_mean_as_often_as_it_says():
    samples = np.random.default_rng(0).normal(2.0, 3.0, (2000, 5))
    held = [interval.low <= 2 <= interval.high for interval in map(mean_interval, samples)]
    assert np.mean(held) == pytest.approx(0.95, abs=0.015)


def test_order_does_not_matter_to_the_last_bit():
    values = [1e16, 1.0, -1e16, 0.1, *VALUES.tolist()]
    expected = mean_interval(values)
    assert expected.mean == pytest.approx((1.1 + math.fsum(VALUES.tolist())) / 27)
    shuffled = list(values)
    for seed in range(5):
        random.Random(seed).shuffle(shuffled)
        assert mean_interval(shuffled) == expected


@pytest.mark.parametrize("scale", [2.0**1022, 2.0**-1000])
def test_very_large_and_very_small_numbers(scale):
    values = [0.5, 1.0, 0.25, -0.75]
    expected = mean_interval(values)
    found = mean_interval([scale * value for value in values])
    assert found.mean == scale * expected.mean
    assert found.half_width == scale * expected.half_width
    assert mean_interval([1.7e308, -1.7e308]).half_width == math.inf


@pytest.mark.parametrize(
    "given",
    [[0.0, 1.0, 1.0], (0, 1, 1), np.array([False, True, True]), torch.tensor([0, 1, 1]),
     torch.tensor([0.0, 1.0, 1.0], dtype=torch.bfloat16, requires_grad=True)],
    ids=range(5),
)  # fmt: skip
def test_forms(given):
    assert mean_interval(given) == mean_interval(np.array([0.0, 1.0, 1.0]))


def test_a_single_value_says_nothing_of_the_spread():
    interval = mean_interval([0.25])
    assert (interval.mean, interval.low, interval.high) == (0.25, -math.inf, math.inf)
    assert mean_interval([0.25, 0.25]).half_width == 0


@pytest.mark.parametrize(
    ("values", "confidence", "error", "message"),
    [
        ([], 0.95, ValueError, "values is empty; wanted: one number"),
        ([1.0, math.nan, math.inf], 0.95, ValueError, r"holds nan at index 1 \(2 not finite of 3"),
        (torch.zeros(2, 1), 0.95, ValueError, r"shape \(2, 1\); wanted: \(n,\)"),
        (["1"], 0.95, TypeError, "wanted: real numbers"),
        ([1 + 1j], 0.95, TypeError, "complex128; wanted: real numbers"),
        ([1.0], 95, ValueError, "confidence is 95; wanted: a number between 0 and 1"),
        ([1.0], 1, ValueError, "confidence is 1"),
        ([1.0], "0.95", TypeError, "confidence is '0.95'"),
    ],
    ids=range(8),
)
def test_bad_values(values, confidence, error, message):
    with pytest.raises(error, match=message):
        mean_interval(values, confidence=confidence)
