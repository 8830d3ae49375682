"""Deletion, insertion, average drop and average increase of given attributions.

Like :func:`captum.metrics.infidelity`, they score attributions that were computed before, by any
method, and return one number per image.

Sources: Petsiuk, Das & Saenko, *RISE*, BMVC 2018, section 4.2 (deletion, insertion);
Chattopadhay et al., *Grad-CAM++*, WACV 2018, section 4.1 (average drop, average increase);
Sago & Hotta, ICPRAM 2024, section 4.3, equations 5 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_reflected.inputs.batch import Batch, make_batch
from captum_reflected.inputs.targets import Score
from captum_reflected.metrics._maps import as_maps
from captum_reflected.metrics.curves import Curve, Scores, score_perturbed
from captum_reflected.metrics.perturbation import Baselines, Fill, rank_pixels


@dataclass(frozen=True)
class Evaluation:
    """All four metrics of B images, with the curves and scores that they are computed from.

    Values are NaN if the model's output for a version of the image is NaN.

    Attributes:
        deletion: (B,), area under ``deletion_curve``; lower is better.
        insertion: (B,), area under ``insertion_curve``; higher is better.
        average_drop: (B,), max(0, Y - O) (equation 5); lower is better.
        average_drop_normalized: (B,), max(0, Y - O) / Y (Chattopadhay et al.); NaN if the score
            falls from a logit that is not positive, for which the ratio is undefined.
        average_increase: (B,), 1 where O > Y, else 0 (equation 6); higher is better.
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
    Computes deletion, insertion, average drop and average increase without repeated forwards.

    Args:

        forward_func (Callable): The model, or any function of the images that runs it and
                    returns logits of shape (B, C), or an object with these as its ``logits``.
        inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them.
        attributions (Tensor or tuple[Tensor]): Shape of the inputs, (B, 1, H, W) or
                    (B, H, W); channels are summed.
        target (int, tuple, Tensor or list, optional): Output that is scored, in any of
                    Captum's target formats.
                    Default: None
        additional_forward_args (Any, optional): Further arguments of ``forward_func``.
                    Tensors whose first dimension is B are repeated along with the images.
                    Default: None
        deletion_baselines (float, str, Tensor or Callable, optional): What a removed pixel
                    shows: a number, ``"blur"`` (RISE's kernel), a tensor of the inputs'
                    shape, or a function of the inputs.
                    Default: None, which means 0
        insertion_baselines (float, str, Tensor or Callable, optional): What a pixel shows
                    before it is inserted.
                    Default: None, which means ``"blur"``
        drop_baselines (float, str, Tensor or Callable, optional): What a pixel shows that
                    average drop and increase do not keep.
                    Default: None, which means 0
        pixels_per_step (int, optional): Pixels removed or inserted between two points of
                    a curve.
                    Default: None, which means H * W / 28, rounded up: RISE's 1792 at 224 x 224
        fraction_kept (float, optional): Share of pixels kept for average drop and increase.
                    Default: 0.5
        score (str, optional): ``"probability"`` (softmax) or ``"logit"`` of the target.
                    Default: ``"probability"``
        max_examples_per_batch (int, optional): Maximal number of perturbed images in one forward.
                    None chooses a number suitable for the device.
                    Default: None
        show_progress (bool, optional): Whether to show a progress bar.
                    Default: False

    Returns:
        *Evaluation*: the metrics, each (B,), and the curves.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes or values do not fit; the message says what was given.

    Examples::

        >>> from captum_reflected import TransformerAttribution
        >>> attributions = TransformerAttribution(model).attribute(images, target=1)
        >>> result = evaluate(model, images, attributions, target=1)
        >>> result.insertion.shape
        torch.Size([2])
    """
    batch = make_batch(inputs, target, additional_forward_args)
    scores = score_perturbed(
        forward_func,
        batch,
        _ranks(attributions, batch),
        {
            "deletion": Curve(keep=False, fill=_or_default(deletion_baselines, 0.0)),
            "insertion": Curve(keep=True, fill=_or_default(insertion_baselines, "blur")),
        },
        kept_fill=_or_default(drop_baselines, 0.0),
        fraction_kept=fraction_kept,
        pixels_per_step=pixels_per_step,
        score=score,
        max_examples_per_batch=max_examples_per_batch,
        show_progress=show_progress,
    )
    original, kept = scores.original_and_kept()
    return Evaluation(
        deletion=scores.area("deletion"),
        insertion=scores.area("insertion"),
        average_drop=scores.drop(normalize=False),
        average_drop_normalized=scores.drop(normalize=True),
        average_increase=scores.increase(),
        deletion_curve=scores.curves["deletion"],
        insertion_curve=scores.curves["insertion"],
        fractions=scores.fractions,
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
    Area under the score while the pixels of highest attribution are removed; lower is better.

    Args:

        forward_func (Callable): As in :func:`evaluate`, and so are ``inputs``,
                    ``attributions``, ``target``, ``additional_forward_args``,
                    ``pixels_per_step``, ``score``, ``max_examples_per_batch`` and
                    ``show_progress``.
        baselines (float, str, Tensor or Callable, optional): What a removed pixel shows.
                    Default: None, which means 0
        return_curve (bool, optional): Whether to return the curve, too.
                    Default: False

    Returns:
        *Tensor* (B,), or with ``return_curve`` a tuple of this tensor and the curve (B, S + 1),
        from nothing to everything removed.
    """
    batch = make_batch(inputs, target, additional_forward_args)
    scores = score_perturbed(
        forward_func, batch, _ranks(attributions, batch),
        {"curve": Curve(keep=False, fill=_or_default(baselines, 0.0))},
        pixels_per_step=pixels_per_step, score=score,
        max_examples_per_batch=max_examples_per_batch, show_progress=show_progress,
    )  # fmt: skip
    return (scores.area("curve"), scores.curves["curve"]) if return_curve else scores.area("curve")


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
    Area under the score while the pixels of highest attribution are inserted; higher is better.

    Args:

        forward_func (Callable): As in :func:`deletion`, like all other arguments.
        baselines (float, str, Tensor or Callable, optional): What a pixel shows before it
                    is inserted.
                    Default: None, which means ``"blur"``, RISE's blurred image

    Returns:
        *Tensor* (B,), or with ``return_curve`` a tuple of this tensor and the curve (B, S + 1),
        from nothing to everything inserted.
    """
    batch = make_batch(inputs, target, additional_forward_args)
    scores = score_perturbed(
        forward_func, batch, _ranks(attributions, batch),
        {"curve": Curve(keep=True, fill=_or_default(baselines, "blur"))},
        pixels_per_step=pixels_per_step, score=score,
        max_examples_per_batch=max_examples_per_batch, show_progress=show_progress,
    )  # fmt: skip
    return (scores.area("curve"), scores.curves["curve"]) if return_curve else scores.area("curve")


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
    Drop of the score if only the highest pixels are kept: max(0, Y - O); lower is better.

    Args:

        forward_func (Callable): As in :func:`evaluate`, and so are ``inputs``,
                    ``attributions``, ``target``, ``additional_forward_args``,
                    ``fraction_kept``, ``score``, ``max_examples_per_batch`` and
                    ``show_progress``.
        baselines (float, str, Tensor or Callable, optional): What the other pixels show.
                    Default: None, which means 0
        normalize (bool, optional): Whether to divide the drop by Y (Chattopadhay et al.); if
                    not, it is equation 5 of Sago & Hotta. NaN if the score falls from a logit
                    that is not positive, for which the ratio is undefined.
                    Default: False

    Returns:
        *Tensor* (B,).
    """
    return _kept_scores(
        forward_func, inputs, attributions, baselines, target, additional_forward_args,
        fraction_kept, score, max_examples_per_batch, show_progress,
    ).drop(normalize=normalize)  # fmt: skip


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
    Whether the score rises if only the highest pixels are kept: 1 where O > Y; higher is better.

    This is equation 6 of Sago & Hotta.

    Args:

        forward_func (Callable): As in :func:`average_drop`, like all other arguments.

    Returns:
        *Tensor* (B,), 0 or 1.
    """
    return _kept_scores(
        forward_func, inputs, attributions, baselines, target, additional_forward_args,
        fraction_kept, score, max_examples_per_batch, show_progress,
    ).increase()  # fmt: skip


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
) -> Scores:
    batch = make_batch(inputs, target, additional_forward_args)
    return score_perturbed(
        forward_func, batch, _ranks(attributions, batch), {}, kept_fill=_or_default(baselines, 0.0),
        fraction_kept=fraction_kept, score=score, max_examples_per_batch=max_examples_per_batch,
        show_progress=show_progress,
    )  # fmt: skip


def _or_default(baselines: Baselines, default: float | str) -> Fill:
    return default if baselines is None else baselines


def _ranks(attributions: Any, batch: Batch) -> Tensor:
    """Pixel ranks (B, H, W) on the images' device.

    The attributions are ranked on their own device and in their own dtype, since a conversion
    could round different values to equal ones.
    """
    size, channels, height, width = batch.images.shape
    return rank_pixels(as_maps(attributions, (size, height, width), channels)).to(
        batch.images.device
    )
