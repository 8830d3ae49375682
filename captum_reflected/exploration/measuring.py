"""Everything that the explorer's page shows, computed by the model."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected._captum import joint_progress_bar, progress
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr import ReflectedRelevance, TransformerAttribution
from captum_reflected.attr._base import first_layer
from captum_reflected.attr.methods import METHODS, Method, find_method
from captum_reflected.attr.transformer_attribution import LayerRelevance
from captum_reflected.inputs.batch import Batch, make_batch, preserving_state
from captum_reflected.inputs.checks import check_positive
from captum_reflected.inputs.class_names import find_class_names
from captum_reflected.inputs.logits import class_logits
from captum_reflected.inputs.pictures import picture_scale
from captum_reflected.masking.reflection import Reflection, combine_terms
from captum_reflected.masking.scoring import check_scoring, score_batch
from captum_reflected.metrics.perturbation import blur, rank_pixels
from captum_reflected.relevance.rollout import roll_out_row, roll_out_steps

# RISE's number of steps from the whole image to the empty one, and the other way round.
_STEPS = 28


@dataclass(frozen=True)
class ClassMeasurements:
    """What was measured for one class.

    Attributes:
        index: of the class in the model's output.
        name: of the class.
        logit: of the whole image.
        probability: of the whole image.
        relevance: (J, J), R among the image tokens: ``[i, j]`` is how much j flows into i.
        scores: (J,), the logit of the reflected image of each token.
        output_rows: (L, J), how much of each token has reached the tokens that the output is read
            from after each layer; the last is the map of TransformerAttribution.
        maps: (M, J), the map of each method on the tokens.
        orders: (M, J), the tokens by decreasing value of each map, equal ones in raster order.
        deletion: (M, S + 1), probability while the highest tokens are replaced by 0.
        insertion: (M, S + 1), probability while they are inserted into the blurred image.
    """

    index: int
    name: str
    logit: float
    probability: float
    relevance: Tensor
    scores: Tensor
    output_rows: Tensor
    maps: Tensor
    orders: Tensor
    deletion: Tensor
    insertion: Tensor


@dataclass(frozen=True)
class Measurements:
    r"""What was measured for one image.

    Attributes:
        grid_size: (gh, gw) of the J image tokens.
        picture: (H, W, 3), from 0 to 1.
        blurred: (H, W, 3), the picture that insertion starts from.
        ground: (3,), the colour where a mask is 0.
        methods: titles of the M methods.
        counts: S + 1 numbers of tokens deleted or inserted, from 0 to J.
        classes: the explained class first, then the likeliest others.
        first_layer: number of the first layer of the roll-out, from 0.
        partial: (L, J, J), for the explained class: R after each layer,
            :math:`R_l = (I + E_l) \cdots (I + E_1)`, among the image tokens.
    """

    grid_size: tuple[int, int]
    picture: Tensor
    blurred: Tensor
    ground: Tensor
    methods: tuple[str, ...]
    counts: tuple[int, ...]
    classes: tuple[ClassMeasurements, ...]
    first_layer: int
    partial: Tensor


def measure(
    forward_func: Callable[..., Any],
    image: Tensor,
    target: Any = None,
    *,
    methods: Sequence[str],
    classes: int,
    class_names: Sequence[str] | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    start_layer: int | None = None,
    token_layout: TokenLayout | None = None,
    show_progress: bool = False,
) -> Measurements:
    """Measures everything that the page shows; the arguments are those of :func:`explorer`."""
    found = [find_method(method) for method in methods]
    if not found:
        raise ValueError("methods is empty; wanted: at least one name of a method")
    check_positive("classes", classes)
    call = _one_image(image, target)
    shown = picture_scale(forward_func, call.images, mean, std)
    picture, blurred = shown(call.images)[0], shown(blur(call.images))[0]
    ground = shown(torch.zeros_like(call.images[..., :1, :1]))[0, 0, 0]
    wanted = "logits of shape (1, C), C of 2 or more"
    logits = class_logits(forward_func, call, wanted=wanted)[0].cpu()
    names = find_class_names(forward_func, class_names, len(logits))
    chosen = _chosen_classes(logits, call, classes)
    # The same image once for each class, so that every method runs once.
    images = call.images.expand(len(chosen), -1, -1, -1)
    targets = torch.tensor(chosen, device=images.device)

    options: dict[str, Any] = {"start_layer": start_layer, "token_layout": token_layout}
    attribution = TransformerAttribution(forward_func, **options)
    layers = attribution.layer_relevance(make_batch(images, targets, None))
    layout, rows = layers.layout, _output_rows(layers)
    counts = _token_counts(layout.num_image_tokens)
    masked_images = len(chosen) * (
        layout.num_image_tokens + 2 * _rows_per_curve(len(found), len(counts))
    )
    if show_progress:
        _announce(masked_images, len(chosen), layout.num_image_tokens, len(found))
    own_maps = [
        _token_map(method, forward_func, images, targets, rows, layout.grid_size, options)
        for method in progress(found, description="maps", total=len(found), show=show_progress)
        if not _is_reflected(method)
    ]
    probabilities = logits.softmax(dim=-1)
    with joint_progress_bar(description="masked images", total=masked_images, show=show_progress):
        reflection = ReflectedRelevance(forward_func, **options).reflect(
            images, targets, show_progress=show_progress
        )
        others = iter(own_maps)
        maps = torch.stack(
            [
                _reflected_map(reflection) if _is_reflected(method) else next(others)
                for method in found
            ],
            dim=1,
        )
        ranks = rank_pixels(maps.flatten(0, 1).unsqueeze(1)).view_as(maps)
        curves = {
            keep: _curves(
                forward_func, images, targets, ranks, counts, layout,
                keep=keep, whole=probabilities[chosen], show_progress=show_progress,
            )
            for keep in (False, True)
        }  # fmt: skip
    image_tokens = slice(layout.num_prefix_tokens, None)
    measured = tuple(
        ClassMeasurements(
            index=index,
            name=f"class {index}" if names is None else names[index],
            logit=float(logits[index]),
            probability=float(probabilities[index]),
            relevance=reflection.relevance[place, image_tokens, image_tokens].cpu(),
            scores=reflection.scores[place].cpu(),
            output_rows=rows[place].cpu(),
            maps=maps[place].cpu(),
            orders=ranks[place].argsort(dim=-1).cpu(),
            deletion=curves[False][place].cpu(),
            insertion=curves[True][place].cpu(),
        )
        for place, index in enumerate(chosen)
    )
    return Measurements(
        grid_size=layout.grid_size,
        picture=picture,
        blurred=blurred,
        ground=ground,
        methods=tuple(method.title for method in found),
        counts=tuple(counts),
        classes=measured,
        first_layer=first_layer(start_layer, forward_func),
        partial=torch.cat(
            [
                relevance[:, image_tokens, image_tokens].cpu()
                for relevance in roll_out_steps([layer[:1] for layer in layers.layers])
            ]
        ),
    )


def _one_image(image: Any, target: Any) -> Batch:
    if isinstance(image, Tensor) and image.dim() == 3:
        image = image.unsqueeze(0)
    call = make_batch(image, target, None)
    if call.size != 1:
        raise ValueError(f"image is a batch of {call.size} images; wanted: one, (C, H, W)")
    if call.target is not None and call.target.shape[1] != 1:
        raise ValueError(f"target is {target!r}; wanted: the index of one class, or None")
    return call


def _chosen_classes(logits: Tensor, call: Batch, number: int) -> list[int]:
    """The explained class, and the likeliest others."""
    order = logits.argsort(descending=True, stable=True).tolist()
    if call.target is not None:
        explained = int(call.target)
        if not 0 <= explained < len(order):
            raise ValueError(
                f"target is {explained}; wanted: a class from 0 to {len(order) - 1} of the model"
            )
        order.remove(explained)
        order.insert(0, explained)
    chosen: list[int] = order[:number]
    return chosen


def _announce(masked_images: int, classes: int, tokens: int, methods: int) -> None:
    """Says on standard error what is about to be run."""
    print(
        f"{masked_images:,} masked images will be run: for "
        f"{'1 class' if classes == 1 else f'each of {classes} classes'}, the reflected images of "
        f"{tokens} patches, and deletion and insertion for {methods} "
        f"{'method' if methods == 1 else 'methods'}",
        file=sys.stderr,
    )


def _is_reflected(method: Method) -> bool:
    """Whether it is ReflectedRelevance with its default options, whose parts are shown anyway."""
    return method is METHODS["reflected_relevance"]


def _token_map(
    method: Method,
    forward_func: Callable[..., Any],
    images: Tensor,
    targets: Tensor,
    output_rows: Tensor,
    grid_size: tuple[int, int],
    options: Mapping[str, Any],
) -> Tensor:
    """The map of one method for each class on the image tokens, (C, J)."""
    if method is METHODS["transformer_attribution"]:  # with its default options: is there already
        return output_rows[:, -1]
    if method.attributor is None:  # a map of pixels: the mean of each token's
        heat = method.explain(forward_func, images, targets).detach().unsqueeze(1)
        return F.adaptive_avg_pool2d(heat.to(output_rows), grid_size).flatten(1)
    applicable = {
        name: value for name, value in options.items() if name != "start_layer" or method.rolls_out
    }
    attributor = method.attributor(forward_func, **{**applicable, **dict(method.settings)})
    enlarged = attributor.attribute(images, targets, interpolate_mode="nearest")[:, :1]
    # The pixel in the middle of each token, which has its value.
    maps = F.interpolate(enlarged, size=grid_size, mode="nearest-exact")
    return maps.flatten(1).to(output_rows)


def _reflected_map(reflection: Reflection) -> Tensor:
    """The map of ReflectedRelevance, (C, J)."""
    maps = combine_terms(reflection.scores, reflection.class_relevance)
    has_relevance = reflection.masks.flatten(1).any(-1) | reflection.class_relevance.any(-1)
    return torch.where(has_relevance.unsqueeze(-1), maps, 0)


def _token_counts(tokens: int) -> list[int]:
    steps = min(tokens, _STEPS)
    return [round(step * tokens / steps) for step in range(steps + 1)]


def _rows_per_curve(methods: int, points: int) -> int:
    """Masked images of a class that the deletion, or the insertion, of all methods takes."""
    # The image without any token is the same for all methods; that with all tokens is known.
    return 1 + methods * (points - 2)


def _curves(
    forward_func: Callable[..., Any],
    images: Tensor,
    targets: Tensor,
    ranks: Tensor,
    counts: Sequence[int],
    layout: TokenLayout,
    *,
    keep: bool,
    whole: Tensor,
    show_progress: bool,
) -> Tensor:
    """Probabilities of perturbed images, (C, M, S + 1).

    Args:
        forward_func: the model.
        images: (C, channels, H, W), the image once for each class.
        targets: (C,).
        ranks: (C, M, J), the place of each token in each map.
        counts: S + 1 numbers of the highest tokens.
        layout: of the tokens.
        keep: True to insert the highest tokens into the blurred image, False to replace them by 0.
        whole: (C,), the probabilities of the whole image.
        show_progress: whether to show a progress bar.
    """
    size, methods, tokens = ranks.shape
    inner = ranks.new_tensor(counts[1:-1])
    is_highest = ranks.unsqueeze(2) < inner[:, None]
    shown = (is_highest if keep else ~is_highest).reshape(size, -1, tokens)
    shown = torch.cat([shown.new_zeros(size, 1, tokens), shown], dim=1)
    masks = shown.to(images.dtype).reshape(size, -1, *layout.grid_size)
    batch = make_batch(images, targets, None)
    scoring = check_scoring(
        forward_func,
        batch,
        baselines=blur(images) if keep else 0.0,
        score="probability",
        show_progress=show_progress,
        description="insertion" if keep else "deletion",
    )
    with preserving_state(batch, gradients=False, forward_func=forward_func) as call:
        scores = score_batch(forward_func, call, masks, scoring)
    empty = scores[:, None, :1].expand(-1, methods, -1)
    full = whole.to(scores)[:, None, None].expand(-1, methods, 1)
    between = scores[:, 1:].reshape(size, methods, -1)
    ends = (empty, full) if keep else (full, empty)
    return torch.cat([ends[0], between, ends[1]], dim=-1)


def _output_rows(layers: LayerRelevance) -> Tensor:
    """How much of each image token has reached the output's tokens after each layer, (C, L, J)."""
    first = layers.layout.num_prefix_tokens
    rows = [
        roll_out_row(layers.layers[: last + 1], layers.readout)[:, first:]
        for last in range(len(layers.layers))
    ]
    return torch.stack(rows, dim=1)
