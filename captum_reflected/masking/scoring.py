"""Scores masked versions of images; all loops over masks are here."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.baselines import check_baselines
from captum_reflected.inputs.batch import Batch, make_batch, preserving_state
from captum_reflected.inputs.checks import check_finite, check_option, check_positive, check_switch
from captum_reflected.inputs.chunks import default_rows_per_forward, in_chunks
from captum_reflected.inputs.devices import to_device
from captum_reflected.inputs.targets import Score, target_score
from captum_reflected.masking.masked_forward import Forward, masked_forward, plain_forward
from captum_reflected.masking.masked_parts import MaskedForward
from captum_reflected.masking.precision import Precision, bf16_or_none
from captum_reflected.masking.token_dropping import can_drop_tokens


@dataclass(frozen=True)
class Scoring:
    """The checked options of scoring masked images that do not depend on the masks.

    Attributes:
        baselines: the values shown where a mask is 0, a number or (B, C, H, W).
        has_baselines: whether the caller chose these values.
        score: the target's ``"logit"``, or its softmax ``"probability"``.
        rows: maximal number of masked images in one forward.
        drop_hidden: whether to leave tokens whose mask is 0 out of the model's sequence.
        precision: ``"bf16"``, or ``None`` for the model's own precision.
        show_progress: whether to show a progress bar.
        description: label of the progress bar.
    """

    baselines: float | Tensor
    has_baselines: bool
    score: Score
    rows: int
    drop_hidden: bool
    precision: Literal["bf16"] | None
    show_progress: bool
    description: str


def check_scoring(
    forward_func: Callable[..., Any],
    batch: Batch,
    *,
    baselines: Any = None,
    score: Score = "logit",
    perturbations_per_eval: int | None = None,
    drop_hidden: bool = False,
    precision: Precision | None = None,
    show_progress: bool = False,
    description: str = "masked images",
) -> Scoring:
    """Checks everything that can be checked before the model runs.

    Args:
        forward_func: the model.
        batch: the checked call.
        baselines: as in :func:`score_masks`.
        score: as in :func:`score_masks`.
        perturbations_per_eval: as in :func:`score_masks`.
        drop_hidden: as in :func:`score_masks`.
        precision: as in :func:`score_masks`.
        show_progress: as in :func:`score_masks`.
        description: label of the progress bar.

    Returns:
        Scoring: for :func:`score_batch`.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: an argument is out of range.
        UnsupportedModelError: ``drop_hidden`` is set, and the model is not known to support it.
    """
    check_option("score", score, get_args(Score))
    check_switch("drop_hidden", drop_hidden)
    checked_baselines = check_baselines(baselines, batch.images)
    if perturbations_per_eval is None:
        rows = default_rows_per_forward(batch.images.device)
    else:
        rows = check_positive("perturbations_per_eval", perturbations_per_eval) * batch.size
    if drop_hidden and (batch.args or not can_drop_tokens(forward_func, batch.images)):
        raise _cannot_drop_tokens()
    return Scoring(
        checked_baselines,
        baselines is not None,
        score,
        rows,
        drop_hidden,
        bf16_or_none(precision),
        show_progress,
        description,
    )


def score_masks(
    forward_func: Callable[..., Any],
    inputs: Tensor | tuple[Tensor],
    masks: Tensor,
    target: Any = None,
    additional_forward_args: Any = None,
    *,
    baselines: float | Tensor | tuple[float | Tensor] | None = None,
    score: Score = "logit",
    drop_hidden: bool = False,
    precision: Precision | None = None,
    perturbations_per_eval: int | None = None,
    show_progress: bool = False,
) -> Tensor:
    r"""
    Scores masked versions of the inputs with the model.

    Each mask is enlarged to the size of the image by nearest neighbours, and the model receives
    ``inputs * mask + baselines * (1 - mask)``. Any masks can be used: those of this library, random
    ones, or one for each segment of an image. Masks on the grid of the model's patches are the
    fastest: they allow a forward that never computes the masked images. It is used if a comparison
    shows that its outputs equal the model's.

    Args:

        forward_func (Callable): The model, or any function of the images that runs it and
                    returns logits of shape (B, C), or an object with these as its ``logits``.
        inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them.
        masks (Tensor): (B, K, gh, gw), or (K, gh, gw) for the same masks on every image;
                    values from 0 (hidden) to 1 (shown). The grid may be that of the model's
                    patches, or any other up to (H, W).
        target (int, tuple, Tensor or list, optional): Output to score: one index for all
                    images, or one for each. May be None only if the output has one number
                    per image.
                    Default: None
        additional_forward_args (Any, optional): Further arguments of ``forward_func``, a tuple
                    if more than one. Tensors whose first dimension is B are repeated along
                    with the images.
                    Default: None
        baselines (float or Tensor, optional): What a masked pixel shows: a number, or a tensor
                    of the inputs' shape (or with first dimension 1).
                    Default: None, which means 0
        score (str, optional): The target's ``"logit"``, or its softmax ``"probability"``.
                    Default: ``"logit"``
        drop_hidden (bool, optional): Whether to leave image tokens whose mask is 0 out of the
                    model's sequence instead of showing the baseline. The cost falls with the
                    number of tokens. Requires masks on the grid of the patches, and a model that
                    is known to support shorter sequences (timm's or torchvision's
                    VisionTransformer; ViT, DeiT or DINOv2 of transformers), itself or in a
                    function that does nothing but call it.
                    Default: False
        precision (str or torch.dtype, optional): ``"bf16"``, ``"bfloat16"`` or
                    ``torch.bfloat16`` runs the forwards in bfloat16.
                    Default: None, which means the model's own precision
        perturbations_per_eval (int, optional): One forward runs at most this many masked
                    images times B, or fewer if memory runs out. The result does not depend on
                    it.
                    Default: None, which means a number suitable for the device
        show_progress (bool, optional): Whether to show a progress bar.
                    Default: False

    Returns:
        *Tensor* **scores** (B, K), float32 (float64 for float64 inputs).

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes or values do not fit; the message says what was given.
        UnsupportedModelError: ``drop_hidden`` is set, and the model is not known to support it.

    Examples::

        >>> # One score for each hidden segment of an image; here, segments are vertical stripes.
        >>> segments = torch.arange(32).div(8, rounding_mode="floor").expand(32, 32)
        >>> masks = 1 - torch.nn.functional.one_hot(segments).permute(2, 0, 1).float()
        >>> scores = score_masks(model, images, masks, target=281)
    """
    batch = make_batch(inputs, target, additional_forward_args)
    scoring = check_scoring(
        forward_func,
        batch,
        baselines=baselines,
        score=score,
        perturbations_per_eval=perturbations_per_eval,
        drop_hidden=drop_hidden,
        precision=precision,
        show_progress=show_progress,
    )
    checked = _check_masks(masks, batch)
    with preserving_state(batch, gradients=False, forward_func=forward_func) as call:
        return score_batch(forward_func, call, checked, scoring)


def score_batch(
    forward_func: Callable[..., Any], call: Batch, masks: Tensor, scoring: Scoring
) -> Tensor:
    """Like :func:`score_masks`, for a checked call without gradients.

    Args:
        forward_func: the model.
        call: inside :func:`captum_reflected.inputs.batch.preserving_state`.
        masks: (B, K, gh, gw), on the device of the images.
        scoring: from :func:`check_scoring`, for the same call.

    Returns:
        Tensor: (B, K).

    Raises:
        ValueError: a score is not finite; the message names the images.
        UnsupportedModelError: as in :func:`score_masks`.
    """
    device, (size, count) = call.images.device, masks.shape[:2]
    forward = _forward(forward_func, call, masks, scoring)
    order = torch.arange(size * count, device=device)
    scores = masks.new_zeros(size * count, dtype=call.compute_dtype)
    groups = _group_by_shown_tokens(masks, order) if scoring.drop_hidden else [(None, order)]
    for num_shown, rows in groups:
        if isinstance(forward, MaskedForward):
            forward.show(num_shown)

        def score(start: int, stop: int, rows: Tensor = rows) -> Tensor:
            index = rows[start:stop]
            image = index // count
            output = forward(image, masks[image, index % count])
            target = None if call.target is None else call.target[image]
            return target_score(
                output,
                target,
                stop - start,
                scoring.score,
                call.compute_dtype,
                indices=call.indices,
            )

        scores[rows] = in_chunks(
            score,
            len(rows),
            scoring.rows,
            description=scoring.description,
            show_progress=scoring.show_progress,
        )
    scores = scores.reshape(size, count)
    check_finite([scores], "the output of forward_func for its masked versions")
    return scores


def _group_by_shown_tokens(masks: Tensor, order: Tensor) -> Iterable[tuple[int | None, Tensor]]:
    """Groups rows by their number of shown tokens, at least one, so that they can be batched."""
    # All numbers are read at once, since the program waits for the device to get them.
    num_shown = (masks.flatten(0, 1).flatten(1) != 0).sum(dim=1).clamp(min=1).tolist()
    for tokens in sorted(set(num_shown)):
        rows = [row for row, number in enumerate(num_shown) if number == tokens]
        is_all = len(rows) == len(num_shown)
        yield tokens, order if is_all else to_device(torch.tensor(rows), order.device)


def _forward(
    forward_func: Callable[..., Any], call: Batch, masks: Tensor, scoring: Scoring
) -> Forward:
    """The fast forward if its outputs equal the model's, else the plain one."""
    bf16 = scoring.precision == "bf16"
    fast = None
    if not call.args:
        fast = masked_forward(
            forward_func,
            call.images,
            (masks.shape[-2], masks.shape[-1]),
            scoring.baselines,
            bf16=bf16,
            drop_hidden=scoring.drop_hidden,
            forwards=masks.shape[0] * masks.shape[1],
            rows=scoring.rows,
        )
    if scoring.drop_hidden and fast is None:
        raise _cannot_drop_tokens()
    return fast or plain_forward(forward_func, call, scoring.baselines, bf16=bf16)


def _cannot_drop_tokens() -> UnsupportedModelError:
    return UnsupportedModelError(
        "drop_hidden is True, and forward_func is not known to support sequences of fewer tokens; "
        "wanted: a VisionTransformer of timm or torchvision, or a classifier of transformers (ViT, "
        "DeiT, DINOv2), itself or in a function that does nothing but call it, in eval mode, "
        "without hooks, autocast or additional_forward_args; images of the model's native size, "
        "and masks on the grid of its patches; or drop_hidden=False"
    )


def _check_masks(masks: Any, batch: Batch) -> Tensor:
    wanted = f"(B, K, gh, gw) or (K, gh, gw), B being {batch.size}"
    if not isinstance(masks, Tensor):
        raise TypeError(f"masks is a {type(masks).__name__}; wanted: a tensor {wanted}")
    if not masks.is_floating_point():
        raise TypeError(f"masks has dtype {masks.dtype}; wanted: floating point, from 0 to 1")
    shape = tuple(masks.shape)
    height, width = batch.image_size
    if (
        masks.dim() not in (3, 4)
        or 0 in shape
        or (masks.dim() == 4 and shape[0] != batch.size)
        or shape[-2] > height
        or shape[-1] > width
    ):
        raise ValueError(
            f"masks has shape {shape}; wanted: {wanted}, at least one mask, and a grid of at most "
            f"{height} x {width}"
        )
    if not bool(((masks >= 0) & (masks <= 1)).all()):
        raise ValueError("masks holds values outside of 0 to 1, or NaN; wanted: from 0 to 1")
    checked: Tensor = masks.detach().to(batch.images.device, batch.compute_dtype)
    return checked.expand(batch.size, *shape[-3:])
