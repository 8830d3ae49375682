"""Records the attention maps of any forward call, without changing the model.

A :class:`torch.overrides.TorchFunctionMode` intercepts every torch function that the forward
calls, in this thread only and only while the mode is active. It needs no hooks, no patched
modules and no global switch. Fused attention is computed in two separate steps instead
(softmax, then the product with the values), which gives the same output.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import Node

from captum_reflected.attention.mode import AttentionMode, differentiate
from captum_reflected.attention.shapes import check_shapes, has_tokens
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.checks import check_finite
from captum_reflected.inputs.outputs import run_model
from captum_reflected.inputs.targets import select_target


class _Tap(torch.autograd.Function):
    """Identity whose backward passes the gradient of the attention map to a callback.

    Every tap depends on a leaf tensor, the anchor. Differentiating by the anchors makes
    autograd run back through all taps, but no further than the first of them.
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
class MapIndex:
    """Which attention maps of a forward belong to the images, and what each is for.

    Maps are numbered from 0 in the order in which the forward computes them.

    Attributes:
        count: number of all maps, including those that do not belong to the images.
        layers: for each layer of self-attention, from the first on, the numbers of its maps.
        pooling: the numbers of the maps that pool the tokens into the output.
        has_other_tokens: whether self-attention of the images among other numbers of tokens was
            skipped, because the given layout says which model to explain.
        num_tokens: N, the number of tokens in the layers.
        pooling_keys: the number of keys M of each map in ``pooling``.
    """

    count: int
    layers: tuple[tuple[int, ...], ...]
    pooling: tuple[int, ...]
    has_other_tokens: bool
    num_tokens: int
    pooling_keys: tuple[int, ...]


@dataclass(frozen=True)
class Recorded:
    """The tensors recorded from the attention maps of a forward.

    Attributes:
        layers: one tensor for each layer of self-attention from ``start_layer`` on, in forward
            order.
        pooling: one tensor for each attention that pools the tokens into the output.
        map_index: which of the forward's maps these are.
        tokens_read: (N,), true for the tokens after the last layer that a gradient reached; None
            if no gradient was computed, or none arrived.
        without_gradient: numbers of the maps that no gradient reached; they are left out.
    """

    layers: list[Tensor]
    pooling: list[Tensor]
    map_index: MapIndex
    tokens_read: Tensor | None = None
    without_gradient: tuple[int, ...] = ()


class _Map(NamedTuple):
    """An attention map of the forward: its number, shape, autograd node and layer.

    Layers are counted separately for each shape. Maps that do not depend on each other
    (parallel blocks, differential attention) belong to the same layer.
    """

    number: int
    shape: tuple[int, ...]
    node: Node | None
    layer: int

    @property
    def is_square(self) -> bool:
        return self.shape[-1] == self.shape[-2]


class Recording(AttentionMode):
    """Runs one forward, numbers the attention maps of the images, and passes them to a callback.

    Only maps that depend on the images count; a text encoder in the same forward, for instance,
    has attention maps of its own.

    Args:
        batch: the call, inside
            :func:`captum_reflected.inputs.batch.preserving_state` with gradients on.
        start_layer: number of first layers to leave out.
        on_map: called with each map and its number in the forward; the model continues with
            its return value. The number is ``None`` if activation checkpointing recomputes the
            map during the backward.
    """

    def __init__(
        self, batch: Batch, start_layer: int, on_map: Callable[[Tensor, int | None], Tensor]
    ) -> None:
        super().__init__(self._record)
        self._batch = batch
        self._start_layer = start_layer
        self._on_map = on_map
        self._maps: list[_Map] = []
        self._source: Node | None = None
        self._count = 0
        self._running = self._has_unrelated_maps = False

    def _record(self, attention: Tensor) -> Tensor:
        if not self._running:
            return self._on_map(attention, None)
        number, self._count = self._count, self._count + 1
        # A map belongs to the images if it depends on them, or on another map that does.
        image_nodes = {self._source, *(earlier.node for earlier in self._maps)}
        if self._source is not None and not _depends_on_any(attention.grad_fn, image_nodes):
            self._has_unrelated_maps = True
            return attention
        shape = tuple(attention.shape)
        layer = _layer_of(attention.grad_fn, shape, self._maps)
        self._maps.append(_Map(number, shape, attention.grad_fn, layer))
        if self._maps[-1].is_square and layer < self._start_layer:
            return attention
        return self._on_map(attention, number)

    def run(self, forward_func: Callable[..., Any]) -> Any:
        """Runs the forward and returns its output; the mode has to be active."""
        self._running = True
        # The clone protects the caller's images from a forward that works in place.
        images = self._batch.images
        images = (images if images.requires_grad else images.detach().requires_grad_()).clone()
        self._source = images.grad_fn
        output = run_model(forward_func, images, self._batch.args)
        if self._has_unrelated_maps and not self._maps:
            # The forward processes its images outside of autograd (no_grad, NumPy). It is then
            # unknown which maps depend on them, so all maps count.
            self._source, self._count = None, 0
            output = run_model(forward_func, self._batch.images.detach().clone(), self._batch.args)
        self._running = False
        return output

    def map_index(self, num_tokens: int | None) -> MapIndex:
        """The numbers of the maps by their purpose; also checks ``start_layer``."""
        chosen = _maps_to_explain(self._maps, num_tokens)
        check_shapes([item.shape for item in chosen], self._batch.size)
        square = [item for item in chosen if item.is_square]
        pooling = [item for item in chosen if not item.is_square]
        layers: dict[int, tuple[int, ...]] = {}
        for item in square:
            layers[item.layer] = (*layers.get(item.layer, ()), item.number)
        if self._start_layer >= len(layers):
            raise ValueError(
                f"start_layer is {self._start_layer}; wanted: less than the {len(layers)} "
                "attention layers of this model"
            )
        return MapIndex(
            self._count,
            tuple(layers.values()),
            tuple(item.number for item in pooling),
            has_other_tokens=len(square) < sum(item.is_square for item in self._maps),
            num_tokens=square[0].shape[-1],
            pooling_keys=tuple(item.shape[-1] for item in pooling),
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
    """Runs one forward and one backward from the target; returns each layer's relevance.

    Maps and gradients are used as soon as the backward reaches them and then freed, so the
    gradients of two layers are never in memory at once.

    Args:
        forward_func: the model, or any function of the images that calls it.
        batch: the call, inside
            :func:`captum_reflected.inputs.batch.preserving_state` with gradients on.
        relevance: a function from attention map and gradient, both (B, h, Q, M), to (B, Q, M),
            or to (B, h, Q, M, ...) with the heads kept.
        start_layer: number of first layers to leave out.
        num_tokens: N, if the caller gave a layout; maps of other tokens are then skipped. If no
            map has this many tokens, the number is ignored.
        last_only: whether to leave out all layers of self-attention except the last.

    Returns:
        Recorded: the results of ``relevance``, (B, N, N) for each layer of self-attention and
        (B, Q, M) for each attention pooling, Q queries over M keys.

    Raises:
        UnsupportedModelError: no usable self-attention was found.
        ValueError: ``start_layer`` is not below the number of layers, the output does not
            depend on the attention, or the result of ``relevance`` is not finite.
    """
    found: dict[int, Tensor] = {}
    anchors: dict[int, Tensor] = {}
    last: tuple[int, ...] = ()
    tokens_read: Tensor | None = None

    def tap(attention: Tensor, number: int | None) -> Tensor:
        anchor = torch.zeros((), device=attention.device, requires_grad=True)
        if number is None:
            repeated: Tensor = _Tap.apply(attention, anchor, lambda *_: None)
            return repeated

        def use(probabilities: Tensor, gradient: Tensor) -> None:
            nonlocal tokens_read
            if number in last:  # tokens that the output is not read from have zero gradient rows
                reached = (gradient != 0).any(dim=3).flatten(0, 1).any(dim=0)
                tokens_read = reached if tokens_read is None else tokens_read | reached
            found[number] = relevance(
                probabilities.to(batch.compute_dtype), gradient.to(batch.compute_dtype)
            )

        anchors[number] = anchor
        tapped: Tensor = _Tap.apply(attention, anchor, use)
        return tapped

    # The mode stays active during the backward, where activation checkpointing runs the forward
    # again and has to execute the same operations.
    with Recording(batch, start_layer, tap) as recording:
        output = recording.run(forward_func)
        selected = select_finite_target(output, batch)
        map_index = recording.map_index(num_tokens)
        last = map_index.layers[-1]
        layers = map_index.layers[-1:] if last_only else map_index.layers[start_layer:]
        numbers = (*chain(*layers), *map_index.pooling)
        if selected.requires_grad:
            wanted = [anchors[number] for number in numbers]
            differentiate(selected, wanted, torch.ones_like(selected), allow_unused=True)
    missing = tuple(number for number in numbers if number not in found)
    if all(number in missing for number in chain(*layers)):
        raise ValueError(
            "no gradient flows from forward_func's output to its attention maps; wanted: a "
            "differentiable forward, without torch.no_grad(), detach(), argmax or reentrant "
            "checkpointing inside it"
        )
    recorded = _collect(found, layers, map_index, "attention times gradient", missing)
    return replace(recorded, tokens_read=tokens_read)


def attention_maps(
    forward_func: Callable[..., Any],
    batch: Batch,
    start_layer: int = 0,
    num_tokens: int | None = None,
) -> Recorded:
    """Runs one forward; returns the attention of each layer, averaged over its heads.

    Args:
        forward_func: as in :func:`attention_relevances`, but it need not be differentiable.
        batch: as in :func:`attention_relevances`, with gradients on: the autograd graph shows
            which maps belong to the images, and is freed after the forward. If there is a
            target, it is checked.
        start_layer: as in :func:`attention_relevances`.
        num_tokens: as in :func:`attention_relevances`.

    Returns:
        Recorded: as in :func:`attention_relevances`, without a graph.

    Raises:
        UnsupportedModelError: no usable self-attention was found.
        ValueError: ``start_layer`` is not below the number of layers, the target does not
            fit the output, or the attention is not finite.
    """
    found: dict[int, Tensor] = {}

    def keep(attention: Tensor, number: int | None) -> Tensor:
        if number is not None:
            found[number] = attention.detach().to(batch.compute_dtype).mean(dim=1)
        return attention

    with Recording(batch, start_layer, keep) as recording:
        output = recording.run(forward_func)
    if batch.target is not None:
        select_finite_target(output, batch)
    index = recording.map_index(num_tokens)
    return _collect(found, index.layers[start_layer:], index, "the attention of forward_func")


def _collect(
    found: dict[int, Tensor],
    layers: Sequence[Sequence[int]],
    map_index: MapIndex,
    description: str,
    missing: tuple[int, ...] = (),
) -> Recorded:
    """Combines the results of each layer and checks them; leaves out layers without results."""
    collected = [[found[number] for number in layer if number in found] for layer in layers]
    maps = [_merge_parallel_maps(layer) for layer in collected if layer]
    pooling = [found[number] for number in map_index.pooling if number in found]
    check_finite([*maps, *pooling], description)
    return Recorded(maps, pooling, map_index, without_gradient=missing)


def select_finite_target(output: Any, batch: Batch) -> Tensor:
    """The target output of each image, (B,); raises if one is not finite."""
    selected = select_target(output, batch.target, batch.size, indices=batch.indices)
    if not bool(torch.isfinite(selected).all()):
        raise ValueError(
            f"forward_func returned a target value that is not finite: {selected.tolist()}; "
            "wanted: finite numbers"
        )
    return selected


def _depends_on_any(node: Node | None, ancestors: AbstractSet[Node | None]) -> bool:
    """Whether a node of the autograd graph is, or depends on, one of the ancestors."""
    visited: set[Node] = set()
    # The latest first: what is looked for is mostly among the last that were computed.
    pending: list[tuple[int, int, Node]] = []

    def reach(found: Node | None) -> None:
        if found is not None and found not in visited:
            visited.add(found)
            heapq.heappush(pending, (-found._sequence_nr(), len(visited), found))

    reach(node)
    while pending:
        _, _, latest = heapq.heappop(pending)
        if latest in ancestors:
            return True
        for parent, _ in latest.next_functions:
            reach(parent)
    return False


def _layer_of(node: Node | None, shape: tuple[int, ...], earlier_maps: Sequence[_Map]) -> int:
    """The layer of a map: the last layer of its shape, or the next one if it depends on that."""
    same_shape = [item for item in earlier_maps if item.shape == shape]
    if not same_shape:
        return 0
    last = same_shape[-1].layer
    last_nodes = {item.node for item in same_shape if item.layer == last}
    if None in last_nodes or _depends_on_any(node, last_nodes):
        return last + 1
    nodes_before = {item.node for item in same_shape if item.layer == last - 1}
    if nodes_before and not _depends_on_any(node, nodes_before):
        raise UnsupportedModelError(
            f"forward_func runs several models side by side, with attention maps of shape {shape} "
            "each; wanted: one Vision Transformer. Explain them one by one"
        )
    return last


def _merge_parallel_maps(maps: Sequence[Tensor]) -> Tensor:
    """Treats parallel maps as heads of one layer: joins (B, h, N, N), averages (B, N, N)."""
    return torch.cat(list(maps), dim=1) if maps[0].dim() > 3 else torch.stack(list(maps)).mean(0)


def _maps_to_explain(maps: Sequence[_Map], num_tokens: int | None) -> Sequence[_Map]:
    """The maps of N tokens; all maps if N is not given or no map has N tokens."""
    if num_tokens is None or not any(
        item.is_square and item.shape[-1] == num_tokens for item in maps
    ):
        return maps
    return [item for item in maps if has_tokens(item.shape, num_tokens)]
