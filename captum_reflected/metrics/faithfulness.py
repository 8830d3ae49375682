"""Deletion, insertion, average drop and average increase of given attributions.

In the style of :func:`captum.metrics.infidelity`: they score attributions that were made
before, by any method, and return one number an image.

Sources: Petsiuk, Das & Saenko, *RISE*, BMVC 2018, section 4.2 (deletion, insertion);
Chattopadhay et al., *Grad-CAM++*, WACV 2018, section 4.1 (average drop, average increase);
Sago & Hotta, ICPRAM 2024, section 4.3, equations 5 and 6.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, get_args

import torch
from torch import Tensor

from captum_reflected.inputs.request import (
    Batch,
    Score,
    check_option,
    check_positive,
    make_batch,
    preserving_state,
    rows_per_forward,
)
from captum_reflected.metrics._maps import as_maps
from captum_reflected.metrics.perturbation import (
    Baselines,
    Point,
    rank_pixels,
    resolve_baseline,
    score_points,
)

# RISE removes 1792 of 224 x 224 pixels at a time: 28 steps.
_RISE_STEPS = 28


@dataclass(frozen=True)
class Evaluation:
    """All four metrics of B images, and what they are made of.

    NaN where the model's output for a version of the image is.

    Attributes:
        deletion: (B,), area under ``deletion_curve``; low is good.
        insertion: (B,), area under ``insertion_curve``; high is good.
        average_drop: (B,), max(0, Y - O) (equation 5); low is good.
        average_drop_normalized: (B,), max(0, Y - O) / Y (Chattopadhay et al.); NaN where the
            score falls from a logit that is not positive, of which there is no share.
        average_increase: (B,), 1 where O > Y, else 0 (equation 6); high is good.
        deletion_curve: (B, S + 1), from nothing to everything removed.
        insertion_curve: (B, S + 1), from nothing to everything inserted.
        fractions: (S + 1,), the share of pixels removed or inserted.
        original: (B,), Y, the score of the image itself.
        kept: (B,), O, the score with only the highest pixels kept.
    """

    deletion: Tensor
    insertion: Tensor
    average_drop: Tensor
    average_drop_normalized: Tensor
    average_increase: Tensor
    deletion_curve: Tensor
    insertion_curve: Tensor
    fractions: Tensor
    original: Tensor
    kept: Tensor


def evaluate(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor],
    attributions: Tensor | tuple[Tensor],
    *,
    target: Any = None,
    additional_forward_args: Any = None,
    deletion_baselines: Baselines = None,
    insertion_baselines: Baselines = None,
    drop_baselines: Baselines = None,
    pixels_per_step: int | None = None,
    fraction_kept: float = 0.5,
    score: Score = "probability",
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
) -> Evaluation:
    r"""
    Deletion, insertion, average drop and average increase, no forward done twice.

    Args:

        forward_func (Callable): The model, or any function of the images that runs it and
                    returns logits of shape (B, C).
        inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them.
        attributions (Tensor or tuple[Tensor]): Shape of the inputs, (B, 1, H, W) or
                    (B, H, W); channels are summed.
        target (int, tuple, Tensor or list, optional): Output that is scored, in any of
                    Captum's forms.
                    Default: None
        additional_forward_args (Any, optional): Further arguments of ``forward_func``.
                    Tensors whose first dimension is B are repeated along with the images.
                    Default: None
        deletion_baselines (float, str, Tensor or Callable, optional): What a removed pixel
                    shows: a number, ``"blur"`` (RISE's kernel), a tensor of the inputs'
                    shape, or a function of the inputs.
                    Default: None, which is 0
        insertion_baselines (float, str, Tensor or Callable, optional): What a pixel shows
                    before it is inserted.
                    Default: None, which is ``"blur"``
        drop_baselines (float, str, Tensor or Callable, optional): What a pixel shows that
                    average drop and increase do not keep.
                    Default: None, which is 0
        pixels_per_step (int, optional): Pixels removed or inserted between two points of
                    a curve.
                    Default: None, which is H * W / 28, rounded up: RISE's 1792 at 224 x 224
        fraction_kept (float, optional): Share of pixels kept for average drop and increase.
                    Default: 0.5
        score (str, optional): ``"probability"`` (softmax) or ``"logit"`` of the target.
                    Default: ``"probability"``
        max_examples_per_batch (int, optional): Perturbed images in one forward, at most.
                    None picks a number that suits the device.
                    Default: None
        show_progress (bool, optional): Whether a progress bar is shown.
                    Default: False

    Returns:
        *Evaluation*: the metrics, each (B,), and the curves.

    Raises:
        TypeError: an argument is of a type that is not taken.
        ValueError: shapes or values do not fit; the message says what was given.

    Examples::

        >>> from captum_reflected import TransformerAttribution
        >>> attributions = TransformerAttribution(model).attribute(images, target=1)
        >>> result = evaluate(model, images, attributions, target=1)
        >>> result.insertion.shape
        torch.Size([2])
    """
    batch = make_batch(inputs, target, additional_forward_args)
    ranks = _ranks(attributions, batch)
    counts = pixel_counts(batch, pixels_per_step)
    curves = {
        "deletion": [Point(count, keep=False, baseline=0) for count in counts],
        "insertion": [Point(count, keep=True, baseline=1) for count in counts],
        "kept": [Point(_count_kept(batch, fraction_kept), keep=True, baseline=2)],
    }
    fills: list[tuple[Baselines, float | str]] = [
        (deletion_baselines, 0.0),
        (insertion_baselines, "blur"),
        (drop_baselines, 0.0),
    ]
    scores = score_curves(
        forward_func, batch, ranks, curves, fills, score, max_examples_per_batch, show_progress
    )
    original, kept = scores["deletion"][:, 0], scores["kept"][:, 0]
    fractions = torch.tensor(counts, device=original.device).to(original) / counts[-1]
    return Evaluation(
        deletion=torch.trapezoid(scores["deletion"], fractions),
        insertion=torch.trapezoid(scores["insertion"], fractions),
        average_drop=drop(original, kept, normalize=False),
        average_drop_normalized=drop(original, kept, normalize=True),
        average_increase=increase(original, kept),
        deletion_curve=scores["deletion"],
        insertion_curve=scores["insertion"],
        fractions=fractions,
        original=original,
        kept=kept,
    )


def deletion(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor],
    attributions: Tensor | tuple[Tensor],
    *,
    baselines: Baselines = None,
    target: Any = None,
    additional_forward_args: Any = None,
    pixels_per_step: int | None = None,
    score: Score = "probability",
    max_examples_per_batch: int | None = None,
    return_curve: bool = False,
    show_progress: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""
    Area under the score while the pixels of highest attribution are removed; low is good.

    Args:

        forward_func (Callable): As in :func:`evaluate`, and so are ``inputs``,
                    ``attributions``, ``target``, ``additional_forward_args``,
                    ``pixels_per_step``, ``score``, ``max_examples_per_batch`` and
                    ``show_progress``.
        baselines (float, str, Tensor or Callable, optional): What a removed pixel shows.
                    Default: None, which is 0
        return_curve (bool, optional): Whether the curve is returned too.
                    Default: False

    Returns:
        *Tensor* (B,), or with ``return_curve`` a tuple of it and the curve (B, S + 1), from
        nothing to everything removed.
    """
    return _curve(
        forward_func, inputs, attributions, baselines, target, additional_forward_args,
        keep=False, default=0.0, pixels_per_step=pixels_per_step, score=score,
        max_examples_per_batch=max_examples_per_batch, return_curve=return_curve,
        show_progress=show_progress,
    )  # fmt: skip


def insertion(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor],
    attributions: Tensor | tuple[Tensor],
    *,
    baselines: Baselines = None,
    target: Any = None,
    additional_forward_args: Any = None,
    pixels_per_step: int | None = None,
    score: Score = "probability",
    max_examples_per_batch: int | None = None,
    return_curve: bool = False,
    show_progress: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    r"""
    Area under the score while the pixels of highest attribution are inserted; high is good.

    Args:

        forward_func (Callable): As in :func:`deletion`, and so are all other arguments.
        baselines (float, str, Tensor or Callable, optional): What a pixel shows before it
                    is inserted.
                    Default: None, which is ``"blur"``, RISE's blurred image

    Returns:
        *Tensor* (B,), or with ``return_curve`` a tuple of it and the curve (B, S + 1), from
        nothing to everything inserted.
    """
    return _curve(
        forward_func, inputs, attributions, baselines, target, additional_forward_args,
        keep=True, default="blur", pixels_per_step=pixels_per_step, score=score,
        max_examples_per_batch=max_examples_per_batch, return_curve=return_curve,
        show_progress=show_progress,
    )  # fmt: skip


def average_drop(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor],
    attributions: Tensor | tuple[Tensor],
    *,
    baselines: Baselines = None,
    target: Any = None,
    additional_forward_args: Any = None,
    normalize: bool = False,
    fraction_kept: float = 0.5,
    score: Score = "probability",
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
) -> Tensor:
    r"""
    How much the score falls with only the highest pixels kept: max(0, Y - O); low is good.

    Args:

        forward_func (Callable): As in :func:`evaluate`, and so are ``inputs``,
                    ``attributions``, ``target``, ``additional_forward_args``,
                    ``fraction_kept``, ``score``, ``max_examples_per_batch`` and
                    ``show_progress``.
        baselines (float, str, Tensor or Callable, optional): What the other pixels show.
                    Default: None, which is 0
        normalize (bool, optional): Whether it is divided by Y (Chattopadhay et al.); without
                    it, equation 5 of Sago & Hotta. NaN where a logit falls that is not
                    positive, of which there is no share.
                    Default: False

    Returns:
        *Tensor* (B,).
    """
    original, kept = _kept_scores(
        forward_func, inputs, attributions, baselines, target, additional_forward_args,
        fraction_kept, score, max_examples_per_batch, show_progress,
    )  # fmt: skip
    return drop(original, kept, normalize=normalize)


def average_increase(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor],
    attributions: Tensor | tuple[Tensor],
    *,
    baselines: Baselines = None,
    target: Any = None,
    additional_forward_args: Any = None,
    fraction_kept: float = 0.5,
    score: Score = "probability",
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
) -> Tensor:
    r"""
    Whether the score rises with only the highest pixels kept: 1 where O > Y; high is good.

    Args:

        forward_func (Callable): As in :func:`average_drop`, and so are all other arguments
                    (equation 6 of Sago & Hotta).

    Returns:
        *Tensor* (B,), 0 or 1.
    """
    original, kept = _kept_scores(
        forward_func, inputs, attributions, baselines, target, additional_forward_args,
        fraction_kept, score, max_examples_per_batch, show_progress,
    )  # fmt: skip
    return increase(original, kept)


def _curve(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    baselines: Baselines,
    target: Any,
    additional_forward_args: Any,
    *,
    keep: bool,
    default: float | str,
    pixels_per_step: int | None,
    score: Score,
    max_examples_per_batch: int | None,
    return_curve: bool,
    show_progress: bool,
) -> Tensor | tuple[Tensor, Tensor]:
    batch = make_batch(inputs, target, additional_forward_args)
    ranks = _ranks(attributions, batch)
    counts = pixel_counts(batch, pixels_per_step)
    curves = {"curve": [Point(count, keep=keep, baseline=0) for count in counts]}
    curve = score_curves(
        forward_func, batch, ranks, curves, [(baselines, default)], score,
        max_examples_per_batch, show_progress,
    )["curve"]  # fmt: skip
    area = torch.trapezoid(curve, torch.tensor(counts, device=curve.device).to(curve) / counts[-1])
    return (area, curve) if return_curve else area


def _kept_scores(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    baselines: Baselines,
    target: Any,
    additional_forward_args: Any,
    fraction_kept: float,
    score: Score,
    max_examples_per_batch: int | None,
    show_progress: bool,
) -> tuple[Tensor, Tensor]:
    """Y and O of equations 5 and 6, each (B,)."""
    batch = make_batch(inputs, target, additional_forward_args)
    ranks = _ranks(attributions, batch)
    curves = {
        "original": [Point(0, keep=False, baseline=0)],
        "kept": [Point(_count_kept(batch, fraction_kept), keep=True, baseline=0)],
    }
    scores = score_curves(
        forward_func, batch, ranks, curves, [(baselines, 0.0)], score, max_examples_per_batch,
        show_progress,
    )  # fmt: skip
    return scores["original"][:, 0], scores["kept"][:, 0]


def drop(original: Tensor, kept: Tensor, *, normalize: bool) -> Tensor:
    """max(0, Y - O) of each image, divided by Y if ``normalize``; NaN where there is no share."""
    fall = (original - kept).clamp(min=0)
    if not normalize:
        return fall
    # A drop of nothing is nothing, also where Y is 0; of a negative logit there is no share.
    share = torch.where(original > 0, fall / original, torch.nan)
    return torch.where(fall == 0, fall, share)


def increase(original: Tensor, kept: Tensor) -> Tensor:
    """1 where O > Y, else 0; NaN where one of them is."""
    unknown = original.isnan() | kept.isnan()
    return torch.where(unknown, torch.nan, (kept > original).to(original))


def score_curves(
    forward_func: Callable[..., Any],
    batch: Batch,
    ranks: Tensor,
    curves: Mapping[str, Sequence[Point]],
    fills: Sequence[tuple[Baselines, float | str]],
    score: Score = "probability",
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    """What the model says along each curve; versions that curves have in common run once.

    Args:
        forward_func: images (R, C, H, W) to (R, K).
        batch: B images.
        ranks: (B, H, W), from :func:`~captum_reflected.metrics.rank_pixels`.
        curves: the points of each, P of them.
        fills: the baselines that the points name by their place here, each with what it is
            where it is None.
        score: as in :func:`evaluate`, and so are the others.
        max_examples_per_batch: at most so many rows in a forward.
        show_progress: whether a progress bar is shown.

    Returns:
        dict[str, Tensor]: (B, P) for each curve.
    """
    check_option("score", score, get_args(Score))
    rows = rows_per_forward(max_examples_per_batch, batch.images.device)
    meant = [default if given is None else given for given, default in fills]
    # Tensors and functions are what they are; numbers and names may say the same.
    keys = [fill if isinstance(fill, (int, float, str)) else id(fill) for fill in meant]
    pixels = batch.image_size[0] * batch.image_size[1]

    def same(point: Point) -> Point:
        """One way to write each version of an image."""
        if point.count == (pixels if point.keep else 0):
            return Point(0, keep=False, baseline=0)
        baseline = keys.index(keys[point.baseline])
        if point.count == pixels:
            return Point(0, keep=True, baseline=baseline)
        return replace(point, baseline=baseline)

    versions = list(dict.fromkeys(same(point) for curve in curves.values() for point in curve))
    with preserving_state(batch, gradients=False, forward_func=forward_func) as call:
        scores = score_points(
            forward_func,
            call,
            ranks,
            versions,
            [resolve_baseline(fill, call.images) for fill in meant],
            score=score,
            rows_per_forward=rows,
            show_progress=show_progress,
        )
        places = {version: place for place, version in enumerate(versions)}
        return {
            name: scores[:, [places[same(point)] for point in curve]]
            for name, curve in curves.items()
        }


def _ranks(attributions: Any, batch: Batch) -> Tensor:
    """(B, H, W), where the images are; ranked as given, since rounding makes values equal."""
    size, channels, height, width = batch.images.shape
    return rank_pixels(as_maps(attributions, (size, height, width), channels)).to(
        batch.images.device
    )


def pixel_counts(batch: Batch, pixels_per_step: int | None = None) -> list[int]:
    """Pixels removed or inserted at each point of a curve, from 0 to all."""
    pixels = batch.images.shape[-2] * batch.images.shape[-1]
    if pixels_per_step is None:
        step = math.ceil(pixels / _RISE_STEPS)
    else:
        step = check_positive("pixels_per_step", pixels_per_step)
    return [*range(0, pixels, step), pixels]


def _count_kept(batch: Batch, fraction_kept: float) -> int:
    if isinstance(fraction_kept, bool) or not isinstance(fraction_kept, (int, float)):
        raise TypeError(f"fraction_kept is {fraction_kept!r}; wanted: a number from 0 to 1")
    if not 0 < fraction_kept < 1:
        raise ValueError(f"fraction_kept is {fraction_kept}; wanted: a number between 0 and 1")
    return round(fraction_kept * batch.images.shape[-2] * batch.images.shape[-1])
