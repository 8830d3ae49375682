"""The mean of a metric over images, and its confidence interval."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class MeanInterval:
    """A mean with its confidence interval.

    Attributes:
        mean: the mean of the values.
        half_width: distance from the mean to either end of the interval.
        count: number of values.
        confidence: confidence level of the interval, between 0 and 1.
    """

    mean: float
    half_width: float
    count: int
    confidence: float

    @property
    def low(self) -> float:
        """Lower end of the interval."""
        return self.mean - self.half_width

    @property
    def high(self) -> float:
        """Upper end of the interval."""
        return self.mean + self.half_width


def mean_interval(
    values: Sequence[float] | NDArray[Any] | Tensor, *, confidence: float = 0.95
) -> MeanInterval:
    r"""
    Mean of independent values and its confidence interval by Student's t distribution.

    With n values of mean m and standard deviation s (n - 1 in its denominator) the interval
    is :math:`m \pm t_{n-1} s / \sqrt n` (Student, *The Probable Error of a Mean*, Biometrika
    1908). Sums are computed exactly and rounded once, so the result does not depend on the
    order of the values.

    To compare two methods on the same images, pass the differences per image: the interval of
    a paired difference is much narrower than those of the two means.

    Args:

        values (Sequence[float], ndarray or Tensor): (n,), one for each image, n of 1 or
                    more. The interval of a single value is infinite, since its spread is
                    unknown.
        confidence (float, optional): The probability, between 0 and 1, that such an interval
                    contains the true mean.
                    Default: 0.95

    Returns:
        *MeanInterval*: mean, half width, count and confidence.

    Raises:
        TypeError: the values are not numbers, or ``confidence`` is not a number.
        ValueError: there are no values, they have several dimensions, one of them is not
                    finite, or ``confidence`` is out of range.

    Examples::

        >>> interval = mean_interval([1.0, 2.0, 3.0])
        >>> interval.mean, round(interval.half_width, 3)
        (2.0, 2.484)
    """
    from scipy.special import stdtrit  # takes long to import

    _check_confidence(confidence)
    numbers = _numbers(values)
    count = len(numbers)
    if count == 1:
        return MeanInterval(numbers[0], math.inf, count, confidence)
    if min(numbers) == max(numbers):  # rounding of the mean would give a spread above 0
        return MeanInterval(numbers[0], 0.0, count, confidence)
    # Scaled, since squares of very large or small numbers would overflow or underflow; by a
    # power of two, which is exact.
    scale = 2.0 ** (math.frexp(max(map(abs, numbers)))[1] - 1)
    scaled = [number / scale for number in numbers]
    mean = math.fsum(scaled) / count
    variance = math.fsum((number - mean) ** 2 for number in scaled) / (count - 1)
    quantile = float(stdtrit(count - 1, (1 + confidence) / 2))
    half_width = quantile * math.sqrt(variance / count)
    return MeanInterval(mean * scale, half_width * scale, count, confidence)


def _check_confidence(confidence: Any) -> None:
    """Raises TypeError or ValueError if this is not a confidence level."""
    if isinstance(confidence, bool) or not isinstance(confidence, (int, float)):
        raise TypeError(f"confidence is {confidence!r}; wanted: a number between 0 and 1")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; wanted: a number between 0 and 1")


def _numbers(values: Any) -> list[float]:
    if isinstance(values, Tensor):
        # Converted on the CPU: some devices have no float64, and numpy has no bfloat16.
        values = values.detach().cpu().double().numpy()
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"values has shape {array.shape}; wanted: (n,), one for each image")
    if array.size == 0:
        raise ValueError("values is empty; wanted: one number for each image, 1 or more")
    if array.dtype.kind not in "biuf":
        raise TypeError(f"values has dtype {array.dtype}; wanted: real numbers")
    numbers = array.astype(np.float64)
    bad = np.flatnonzero(~np.isfinite(numbers))
    if bad.size:
        raise ValueError(
            f"values holds {numbers[bad[0]]} at index {bad[0]} ({bad.size} not finite of "
            f"{numbers.size}); wanted: finite numbers"
        )
    return [float(number) for number in numbers]
