"""Gathers a metric over batches and processes, and says how far its mean can be trusted."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric
from torchmetrics.utilities import dim_zero_cat

from captum_reflected.metrics.statistics import check_confidence, mean_interval


class MeanAccumulator(Metric):
    r"""Mean and confidence interval of per-image values that come in batches.

    The values themselves are kept (8 bytes an image) and summed exactly, so that the result
    is the same to the last bit however the images are split into batches and processes.
    The interval is that of :func:`mean_interval`.

    A sampler that repeats images to give every process as many (``DistributedSampler``
    does unless told not to) counts them twice: leave the repeats out.

    Examples::

        >>> accumulator = MeanAccumulator()
        >>> accumulator.update(torch.tensor([1.0, 2.0]))
        >>> accumulator.update(torch.tensor([3.0]))
        >>> {name: round(float(value), 3) for name, value in accumulator.compute().items()}
        {'mean': 2.0, 'low': -0.484, 'high': 4.484, 'count': 3.0}
    """

    is_differentiable = False
    full_state_update = False
    values: list[Tensor] | Tensor

    def __init__(self, *, confidence: float = 0.95, **kwargs: Any) -> None:
        r"""
        Args:

            confidence (float, optional): Of the interval, between 0 and 1.
                        Default: 0.95
            kwargs (Any): Further arguments of ``torchmetrics.Metric``.

        Raises:

            TypeError: ``confidence`` is not a number.
            ValueError: ``confidence`` is not between 0 and 1.
        """
        check_confidence(confidence)
        super().__init__(**kwargs)
        self.confidence = confidence
        # What a process without values gives to the others must be of their dtype.
        self.set_dtype(torch.float64)
        self.add_state("values", default=[], dist_reduce_fx="cat")

    def update(self, values: Tensor) -> None:
        r"""
        Args:

            values (Tensor): (B,), one for each image, as the metrics of
                        :mod:`captum_reflected.metrics` return them.

        Raises:

            TypeError: not a tensor of real numbers.
            ValueError: not of one dimension, or a value is not finite. Nothing of the batch
                        is kept then.
        """
        if not isinstance(values, Tensor):
            raise TypeError(f"values is a {type(values).__name__}; wanted: a tensor (B,)")
        if values.is_complex():
            raise TypeError(f"values has dtype {values.dtype}; wanted: real numbers")
        if values.dim() != 1:
            raise ValueError(f"values has shape {tuple(values.shape)}; wanted: (B,)")
        if not bool(torch.isfinite(values).all()):
            bad = (~torch.isfinite(values)).nonzero().flatten().tolist()
            raise ValueError(
                f"values is not finite for image(s) {bad} of the batch; wanted: finite numbers"
            )
        assert isinstance(self.values, list)  # a tensor only while processes are in sync
        self.values.append(values.detach().to(self.device, torch.float64))

    def compute(self) -> dict[str, Tensor]:
        r"""
        Returns:
            *dict[str, Tensor]*: ``mean``, ``low``, ``high`` (the interval's ends; infinite
            for a single value) and ``count``, each a float64 scalar.

        Raises:

            ValueError: there are no values yet.
        """
        gathered = dim_zero_cat(self.values) if len(self.values) else torch.empty(0)
        if gathered.numel() == 0:
            raise ValueError("there are no values to take the mean of; wanted: update() before")
        interval = mean_interval(gathered, confidence=self.confidence)
        return {
            name: torch.tensor(number, dtype=torch.float64, device=self.device)
            for name, number in (
                ("mean", interval.mean),
                ("low", interval.low),
                ("high", interval.high),
                ("count", interval.count),
            )
        }
