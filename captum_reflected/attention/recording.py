"""Records attention maps of any forward call, without touching the model.

A :class:`torch.overrides.TorchFunctionMode` sees every torch function that the forward
calls, in this thread only and only while the mode is entered: no hooks, no patched
modules, no global switch. Fused attention is computed in two visible steps instead
(softmax, then the product with the values), which gives the same output.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from captum_reflected._captum import run_forward
from captum_reflected.attention.mode import AttentionMode, _grad
from captum_reflected.attention.shapes import _has_tokens, check_shapes
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.checks import check_finite
from captum_reflected.inputs.targets import select_target


class _Tap(torch.autograd.Function):
    """Identity whose backward hands over the gradient of the attention map.

    The anchor is a leaf that every tap depends on: its gradient makes autograd run
    through all taps, and through nothing before the first of them.
    """

    @staticmethod
    def forward(ctx: Any, attention: Tensor, anchor: Tensor, use: Callable[..., None]) -> Tensor:
        ctx.save_for_backward(attention)
        ctx.use = use
        return attention.view_as(attention)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor, None]:
        (attention,) = ctx.saved_tensors
        ctx.use(attention, gradient)
        upstream = gradient if ctx.needs_input_grad[0] else None
        return upstream, gradient.new_zeros(()), None


@dataclass(frozen=True)
class Seen:
    """Which of the attention maps that a forward shows belong to the images.

    Maps are numbered from 0 as the forward shows them.

    Attributes:
        count: of all maps.
        layers: for each layer of self-attention, from the first on, its maps.
        pooling: the maps by which the answer is read out of the tokens.
        others: whether maps of the images were left alone, as the layout was given and says so.
        num_tokens: N, of the layers.
        pooled_keys: numbers of keys M of the attention that reads the answer out; empty where
            none does.
    """

    count: int
    layers: tuple[tuple[int, ...], ...]
    pooling: tuple[int, ...]
    others: bool
    num_tokens: int
    pooled_keys: frozenset[int]


@dataclass(frozen=True)
class Recorded:
    """What the attention maps of a forward gave.

    Attributes:
        layers: for each layer of self-attention from ``start_layer`` on, in forward order.
        pooling: for each attention by which the answer is read out of the tokens.
        seen: which of the forward's maps these are.
        read: (N,), the tokens after the last layer that a gradient reached; None where no
            gradient was taken, or none arrived.
        without_gradient: maps of ``seen`` that no gradient reached, and that are left out.
    """

    layers: list[Tensor]
    pooling: list[Tensor]
    seen: Seen
    read: Tensor | None = None
    without_gradient: tuple[int, ...] = ()


class _Map(NamedTuple):
    """An attention map of the forward: its number, its shape, where autograd has it, its layer.

    Layers are counted among the maps of one shape. Maps that do not depend on each other
    (parallel blocks, differential attention) lie side by side in one layer.
    """

    number: int
    shape: tuple[int, ...]
    node: Node | None
    layer: int

    @property
    def is_square(self) -> bool:
        return self.shape[-1] == self.shape[-2]


class _Recording(AttentionMode):
    """One forward, its attention maps of the images numbered and handed on.

    Only maps that depend on the images count: a text encoder that runs in the same
    forward has its own.

    Args:
        batch: the call, inside
            :func:`captum_reflected.inputs.batch.preserving_state` with gradients on.
        start_layer: number of first layers to leave out.
        watch: called with each map and its number in the forward; the model goes on with
            what it returns. The number is ``None`` where activation checkpointing
            repeats, in the backward, what was watched in the forward.
    """

    def __init__(
        self, batch: Batch, start_layer: int, watch: Callable[[Tensor, int | None], Tensor]
    ) -> None:
        super().__init__(self._see)
        self._batch = batch
        self._start_layer = start_layer
        self._watch = watch
        self._maps: list[_Map] = []
        self._source: Node | None = None
        self._count = 0
        self._running = self._unrelated = False

    def _see(self, attention: Tensor) -> Tensor:
        if not self._running:
            return self._watch(attention, None)
        number, self._count = self._count, self._count + 1
        # A map that leads to the source, or to one that does, belongs to the images.
        known = {self._source, *(seen.node for seen in self._maps)}
        if self._source is not None and not _leads_to(attention.grad_fn, known):
            self._unrelated = True
            return attention
        shape = tuple(attention.shape)
        layer = _layer(attention.grad_fn, shape, self._maps)
        self._maps.append(_Map(number, shape, attention.grad_fn, layer))
        if self._maps[-1].is_square and layer < self._start_layer:
            return attention
        return self._watch(attention, number)

    def run(self, forward_func: Callable[..., Any]) -> Any:
        """The output of the forward; the mode has to be on."""
        self._running = True
        # The clone keeps the caller's images out of reach of a forward that works in place.
        images = self._batch.images
        images = (images if images.requires_grad else images.detach().requires_grad_()).clone()
        self._source = images.grad_fn
        output = run_forward(forward_func, images, self._batch.args)
        if self._unrelated and not self._maps:
            # The forward handles its images where autograd does not look (no_grad, NumPy),
            # so which maps are theirs cannot be told: all of them count.
            self._source, self._count = None, 0
            output = run_forward(
                forward_func, self._batch.images.detach().clone(), self._batch.args
            )
        self._running = False
        return output

    def seen(self, num_tokens: int | None) -> Seen:
        """The maps' numbers, by what they do; ``start_layer`` is checked."""
        chosen = _chosen(self._maps, num_tokens)
        check_shapes([seen.shape for seen in chosen], self._batch.size)
        layers: dict[int, tuple[int, ...]] = {}
        for seen in chosen:
            if seen.is_square:
                layers[seen.layer] = (*layers.get(seen.layer, ()), seen.number)
        if self._start_layer >= len(layers):
            raise ValueError(
                f"start_layer is {self._start_layer}; wanted: less than the {len(layers)} "
                "attention layers of this model"
            )
        return Seen(
            self._count,
            tuple(layers.values()),
            tuple(seen.number for seen in chosen if not seen.is_square),
            others=len(chosen) < len(self._maps),
            num_tokens=next(seen.shape[-1] for seen in chosen if seen.is_square),
            pooled_keys=frozenset(seen.shape[-1] for seen in chosen if not seen.is_square),
        )


def attention_relevances(
    forward_func: Callable[..., Any],
    batch: Batch,
    relevance: Callable[[Tensor, Tensor], Tensor],
    start_layer: int = 0,
    num_tokens: int | None = None,
    *,
    last_only: bool = False,
) -> Recorded:
    """One forward and one backward from the target; what each layer's attention gives.

    Maps and gradients are used as the backward reaches them and let go of, so that the
    gradients of two layers are never held at once.

    Args:
        forward_func: the model, or any function of the images that calls it.
        batch: the call, inside
            :func:`captum_reflected.inputs.batch.preserving_state` with gradients on.
        relevance: from attention map and gradient, both (B, h, Q, M), to (B, Q, M), or to
            (B, h, Q, M, ...) with the heads kept.
        start_layer: number of first layers to leave out.
        num_tokens: N where it is told; maps of other tokens are then left alone. If no
            map has so many tokens, it counts as not told.
        last_only: whether all layers of self-attention but the last are left out.

    Returns:
        Recorded: what ``relevance`` gives, (B, N, N) for each layer of self-attention and
        (B, Q, M) for each attention pooling, Q queries over M keys.

    Raises:
        UnsupportedModelError: no usable self-attention was seen.
        ValueError: ``start_layer`` is not below the number of layers, the output does not
            depend on the attention, or what ``relevance`` gives is not finite.
    """
    found: dict[int, Tensor] = {}
    anchors: dict[int, Tensor] = {}
    last: tuple[int, ...] = ()
    read: Tensor | None = None

    def tap(attention: Tensor, number: int | None) -> Tensor:
        anchor = torch.zeros((), device=attention.device, requires_grad=True)
        if number is None:
            repeated: Tensor = _Tap.apply(attention, anchor, lambda *_: None)
            return repeated

        def use(probabilities: Tensor, gradient: Tensor) -> None:
            nonlocal read
            if number in last:  # rows of tokens that nobody reads have no gradient at all
                reached = (gradient != 0).any(dim=3).flatten(0, 1).any(dim=0)
                read = reached if read is None else read | reached
            found[number] = relevance(
                probabilities.to(batch.compute_dtype), gradient.to(batch.compute_dtype)
            )

        anchors[number] = anchor
        tapped: Tensor = _Tap.apply(attention, anchor, use)
        return tapped

    # The mode stays on during the backward: activation checkpointing runs the forward
    # again there, and has to meet the same operations.
    with _Recording(batch, start_layer, tap) as recording:
        output = recording.run(forward_func)
        selected = _explained(output, batch)
        seen = recording.seen(num_tokens)
        last = seen.layers[-1]
        layers = seen.layers[-1:] if last_only else seen.layers[start_layer:]
        numbers = (*chain(*layers), *seen.pooling)
        if selected.requires_grad:
            wanted = [anchors[number] for number in numbers]
            _grad(selected, wanted, torch.ones_like(selected), allow_unused=True)
    missing = tuple(number for number in numbers if number not in found)
    if all(number in missing for number in chain(*layers)):
        raise ValueError(
            "no gradient flows from forward_func's output to its attention maps; wanted: a "
            "differentiable forward, without torch.no_grad(), detach(), argmax or reentrant "
            "checkpointing inside it"
        )
    recorded = _recorded(found, layers, seen, "attention times gradient", missing)
    return replace(recorded, read=read)


def attention_maps(
    forward_func: Callable[..., Any],
    batch: Batch,
    start_layer: int = 0,
    num_tokens: int | None = None,
) -> Recorded:
    """One forward; the attention of each layer, averaged over its heads.

    Args:
        forward_func: as in :func:`attention_relevances`, but it need not be differentiable.
        batch: as in :func:`attention_relevances`, with gradients on: the graph tells which
            maps belong to the images, and is let go of with the forward. Its target is
            checked where there is one.
        start_layer: as in :func:`attention_relevances`.
        num_tokens: as in :func:`attention_relevances`.

    Returns:
        Recorded: as in :func:`attention_relevances`, without a graph.

    Raises:
        UnsupportedModelError: no usable self-attention was seen.
        ValueError: ``start_layer`` is not below the number of layers, the target does not
            fit, or the attention is not finite.
    """
    found: dict[int, Tensor] = {}

    def keep(attention: Tensor, number: int | None) -> Tensor:
        if number is not None:
            found[number] = attention.detach().to(batch.compute_dtype).mean(dim=1)
        return attention

    with _Recording(batch, start_layer, keep) as recording:
        output = recording.run(forward_func)
    if batch.target is not None:
        _explained(output, batch)
    seen = recording.seen(num_tokens)
    return _recorded(found, seen.layers[start_layer:], seen, "the attention of forward_func")


def _recorded(
    found: dict[int, Tensor],
    layers: Sequence[Sequence[int]],
    seen: Seen,
    what: str,
    missing: tuple[int, ...] = (),
) -> Recorded:
    """What was found of each layer, checked; layers of which nothing was found are left out."""
    collected = [[found[number] for number in layer if number in found] for layer in layers]
    maps = [_side_by_side(layer) for layer in collected if layer]
    pooling = [found[number] for number in seen.pooling if number in found]
    check_finite([*maps, *pooling], what)
    return Recorded(maps, pooling, seen, without_gradient=missing)


def _explained(output: Any, batch: Batch) -> Tensor:
    """The number of each image that is explained, (B,), checked."""
    selected = select_target(output, batch.target, batch.size)
    if not bool(torch.isfinite(selected).all()):
        raise ValueError(
            f"forward_func returned a target value that is not finite: {selected.tolist()}"
        )
    return selected


def _leads_to(node: Node | None, goals: AbstractSet[Node | None]) -> bool:
    """Whether the graph behind a node holds one of the goals."""
    stack, seen = [node], set()
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        if node in goals:
            return True
        seen.add(node)
        stack.extend(following for following, _ in node.next_functions)
    return False


def _layer(node: Node | None, shape: tuple[int, ...], before: Sequence[_Map]) -> int:
    """The layer of a map: that of the last map of its shape if it does not depend on it."""
    same = [seen for seen in before if seen.shape == shape]
    if not same:
        return 0
    last = same[-1].layer
    nodes = {seen.node for seen in same if seen.layer == last}
    if None in nodes or _leads_to(node, nodes):
        return last + 1
    before_last = {seen.node for seen in same if seen.layer == last - 1}
    if before_last and not _leads_to(node, before_last):
        raise UnsupportedModelError(
            f"forward_func runs several models side by side, with attention maps of shape {shape} "
            "each; wanted: one Vision Transformer. Explain them one by one"
        )
    return last


def _side_by_side(maps: Sequence[Tensor]) -> Tensor:
    """Maps side by side are heads of one layer: (B, h, N, N) joined, (B, N, N) averaged."""
    return torch.cat(list(maps), dim=1) if maps[0].dim() > 3 else torch.stack(list(maps)).mean(0)


def _chosen(maps: Sequence[_Map], num_tokens: int | None) -> Sequence[_Map]:
    """The maps of the model to explain: those of N tokens where N is given and any are."""
    if num_tokens is None or not any(
        seen.is_square and seen.shape[-1] == num_tokens for seen in maps
    ):
        return maps
    return [seen for seen in maps if _has_tokens(seen.shape, num_tokens)]
