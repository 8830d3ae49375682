"""The smallest share of the highest pixels whose removal changes the prediction.

The search is Captum's :class:`captum.robust.MinParamPerturbation`, run on one image at a time,
since the share differs between images.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from captum.robust import MinParamPerturbation
from torch import Tensor

from captum_reflected._captum import progress
from captum_reflected.inputs.batch import Batch, make_batch, preserving_state
from captum_reflected.inputs.checks import check_option
from captum_reflected.inputs.chunks import rows_per_forward
from captum_reflected.inputs.outputs import run_model
from captum_reflected.inputs.targets import select_target
from captum_reflected.metrics._maps import as_maps
from captum_reflected.metrics.perturbation import Baselines, rank_pixels, resolve_baseline

Search = Literal["linear", "binary"]


def minimal_deletion(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor],
    attributions: Tensor | tuple[Tensor],
    *,
    baselines: Baselines = None,
    target: Any = None,
    additional_forward_args: Any = None,
    step: float = 0.01,
    search: Search = "linear",
    max_examples_per_batch: int | None = None,
    show_progress: bool = False,
) -> Tensor:
    r"""
    Smallest share of the highest pixels whose removal changes the prediction; lower is better.

    Like :func:`deletion`, but uses the predicted class instead of the score, like the
    "percentage of top features" of Captum's robustness metrics.

    Args:

        forward_func (Callable): The model, or any function of the images that runs it and
                    returns logits of shape (B, C), two classes or more, or an object with
                    these as its ``logits``.
        inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them.
        attributions (Tensor or tuple[Tensor]): Shape of the inputs, (B, 1, H, W) or
                    (B, H, W); channels are summed.
        baselines (float, str, Tensor or Callable, optional): What a removed pixel shows: a
                    number, ``"blur"`` (RISE's kernel), a tensor of the inputs' shape, or a
                    function of the inputs.
                    Default: None, which means 0
        target (int, tuple, Tensor or list, optional): The class that the prediction has to
                    change from, in any of Captum's target formats. An image with another
                    prediction needs no removal and scores 0.
                    Default: None, which means the model's own prediction
        additional_forward_args (Any, optional): Further arguments of ``forward_func``.
                    Tensors whose first dimension is B are split along with the images.
                    Default: None
        step (float, optional): Share of pixels between two tries, rounded to whole pixels,
                    up to one half. The last try always removes all pixels.
                    Default: 0.01
        search (str, optional): ``"linear"`` tries every share in increasing order.
                    ``"binary"`` needs few forwards, but finds the same share only if the
                    prediction, once changed, does not change back as more pixels are
                    removed.
                    Default: ``"linear"``
        max_examples_per_batch (int, optional): Maximal number of images in one forward.
                    None chooses a number suitable for the device.
                    Default: None
        show_progress (bool, optional): Whether to show a progress bar.
                    Default: False

    Returns:
        *Tensor* (B,): shares from 0 to 1; NaN if the prediction never changes (the baseline
        has the same one).

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes or values do not fit; the message says what was given.

    Examples::

        >>> from captum_reflected import TransformerAttribution
        >>> attributions = TransformerAttribution(model).attribute(images, target=1)
        >>> minimal_deletion(model, images, attributions, step=0.1).shape
        torch.Size([2])
    """
    batch = make_batch(inputs, target, additional_forward_args)
    size, channels, height, width = batch.images.shape
    maps = as_maps(attributions, (size, height, width), channels)
    counts = _counts(height * width, step)
    check_option("search", search, get_args(Search))
    rows = rows_per_forward(max_examples_per_batch, batch.images.device)
    ranks = rank_pixels(maps).to(batch.images.device)

    with preserving_state(batch, gradients=False, forward_func=forward_func) as call:
        removed = resolve_baseline(0.0 if baselines is None else baselines, call.images)
        predicted = torch.cat(
            [
                _predictions(forward_func, call, call.images[index], index)
                for index in torch.arange(size, device=call.images.device).split(rows)
            ]
        )
        original = predicted if call.target is None else call.target[:, 0]
        shares = []
        images = progress(
            range(size), description="minimal deletion", total=size, show=show_progress
        )
        for image in images:
            if predicted[image] != original[image]:
                shares.append(0.0)
                continue
            count = _smallest_count(
                forward_func, call, image, original[image], ranks[image], removed[image], counts,
                search, rows,
            )  # fmt: skip
            shares.append(math.nan if count is None else count / (height * width))
    return torch.tensor(shares, dtype=batch.compute_dtype, device=batch.images.device)


def _smallest_count(
    forward_func: Callable[..., Any],
    call: Batch,
    image: int,
    original: Tensor,
    ranks: Tensor,
    removed: Tensor,
    counts: list[int],
    search: Search,
    rows: int,
) -> int | None:
    """The smallest count at which the prediction changes, as found by the search; None if none."""

    def remove(picture: Tensor, *, place: int) -> Tensor:
        return torch.where(ranks < counts[place], removed, picture)

    def predict(pictures: Tensor) -> Tensor:
        index = torch.full((len(pictures),), image, device=pictures.device)
        return _predictions(forward_func, call, pictures, index)

    found: int | None
    # Searches over indices into the list of counts: with whole numbers, rounding cannot skip a
    # try. The upper end is exclusive.
    _, found = MinParamPerturbation(
        predict,
        remove,
        arg_name="place",
        arg_min=0,
        arg_max=len(counts),
        arg_step=1,
        mode=search,
        correct_fn=lambda predictions: bool((predictions == original).all()),
    ).evaluate(
        call.images[image : image + 1],
        perturbations_per_eval=rows if search == "linear" else 1,
    )
    return None if found is None else counts[found]


def _predictions(
    forward_func: Callable[..., Any], call: Batch, pictures: Tensor, index: Tensor
) -> Tensor:
    """Predicted classes (R,) of perturbed versions of the images of indices (R,)."""
    args, target = call.rows(index)
    output = run_model(forward_func, pictures, args)
    if isinstance(output, Tensor) and (output.dim() != 2 or output.shape[-1] < 2):
        raise ValueError(
            f"forward_func returned shape {tuple(output.shape)}; wanted: logits (B, C) of two "
            "classes or more, of which one is predicted"
        )
    first = torch.zeros(len(pictures), 1, dtype=torch.int64) if target is None else target
    select_target(output, first, len(pictures))  # checks that the output fits
    if not bool(torch.isfinite(output).all()):
        raise ValueError(
            "forward_func returned NaN or infinite values; wanted: logits that predict a class"
        )
    prediction: Tensor = output.argmax(dim=1)
    return prediction


def _counts(pixels: int, step: float) -> list[int]:
    """Pixels removed at each try: one or more, up to all."""
    if isinstance(step, bool) or not isinstance(step, (int, float)):
        raise TypeError(f"step is {step!r}; wanted: a share of pixels above 0, up to 0.5")
    if not 0 < step <= 0.5:
        raise ValueError(f"step is {step}; wanted: a share of pixels above 0, up to 0.5")
    if pixels < 2:
        raise ValueError("inputs has images of one pixel; wanted: two or more to remove in order")
    # A step is at least one pixel.
    tries = min(math.ceil(1 / step), pixels)
    counts = {round(number * max(step, 1 / pixels) * pixels) for number in range(1, tries)}
    return sorted({count for count in counts if 0 < count < pixels} | {pixels})
