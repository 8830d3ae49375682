"""Balanced relevance of the tokens at the input of every block.

In a network with residual connections, each block adds to a stream of token activations. The stream
is found in the autograd graph, not by names: a tensor belongs to it if every path from the images
to the output passes through it. The input of a block is the last such tensor before the block's
attention.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge, Node

from captum_reflected.attention.mode import differentiate
from captum_reflected.attention.recording import MapIndex, Recording, select_finite_target
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.checks import check_finite
from captum_reflected.relevance.balanced import check_balanced
from captum_reflected.relevance.balanced_mode import BalancedMode
from captum_reflected.relevance.balanced_nodes import FROZEN, LIVE


@dataclass(frozen=True)
class StreamRelevance:
    """The relevance of all tokens at the inputs of the blocks.

    Attributes:
        layers: one (B, N) for each block with self-attention, in forward order: the sum over
            channels of activation times balanced gradient. Blocks with the same input occur once.
        inputs: the tokens that enter these blocks, (B, N, D) each.
        map_index: which of the forward's attention maps belong to the images.
    """

    layers: list[Tensor]
    inputs: list[Tensor]
    map_index: MapIndex


def stream_relevances(
    forward_func: Callable[..., Any], batch: Batch, num_tokens: int | None = None
) -> StreamRelevance:
    """Runs one forward and one backward from the target.

    Args:
        forward_func: the model, or any function of the images that calls it.
        batch: the call, inside :func:`captum_reflected.inputs.batch.preserving_state` with
            gradients on.
        num_tokens: N, if the caller gave a layout; attention of other tokens is then skipped.

    Returns:
        StreamRelevance: the relevance of each block's input.

    Raises:
        UnsupportedModelError: no usable self-attention was found, no tensor before one of its
            layers carries the whole relevance, or the output has no balanced gradient.
        ValueError: the target does not fit the output, or a result is not finite.
    """
    call = batch.with_source()
    stream = _Stream(call.images)
    with stream, Recording(call, 0, stream.on_map) as recording:
        selected = select_finite_target(recording.run(forward_func), batch)
        map_index = recording.map_index(num_tokens)
        # As many images as tokens: which dimension is which cannot be told.
        is_ambiguous = batch.size == map_index.num_tokens > 1
        if not is_ambiguous:
            check_balanced(stream, [selected])
            inputs = stream.block_inputs(selected, map_index)
            edges = [entry.edge for entry in inputs]
            gradients = differentiate(selected, edges, torch.ones_like(selected), allow_unused=True)
            if any(gradient is None for gradient in gradients):
                raise UnsupportedModelError(
                    "no gradient flows from the output of forward_func to the tokens of every "
                    "layer: an operation on the way has no derivative, as those of quantised "
                    "layers; wanted: a differentiable model, such as the one before quantisation"
                )
    if is_ambiguous:
        return _in_halves(forward_func, batch, num_tokens)
    tokens, gradients = (
        [_images_first(values.to(batch.compute_dtype), batch.size) for values in tensors]
        for tensors in ([entry.value for entry in inputs], gradients)
    )
    layers = [(z * g).sum(dim=-1) for z, g in zip(tokens, gradients, strict=True)]
    check_finite(layers, "activation times balanced gradient")
    return StreamRelevance(layers, tokens, map_index)


def _in_halves(
    forward_func: Callable[..., Any], batch: Batch, num_tokens: int | None
) -> StreamRelevance:
    rows = torch.arange(batch.size, device=batch.images.device)
    halves = [
        stream_relevances(forward_func, batch.select(half), num_tokens)
        for half in rows.tensor_split(2)
    ]
    layers, tokens = (
        [torch.cat(parts) for parts in zip(*tensors, strict=True)]
        for tensors in ([half.layers for half in halves], [half.inputs for half in halves])
    )
    return StreamRelevance(layers, tokens, halves[0].map_index)


def _images_first(tokens: Tensor, images: int) -> Tensor:
    """(B, N, D) from itself or from (N, B, D)."""
    return tokens if len(tokens) == images else tokens.transpose(0, 1)


@dataclass
class _Entry:
    """A tensor of the forward that may be the input of a block.

    Attributes:
        edge: its place in the autograd graph.
        value: its values; they share memory with the tensor.
        version: how often the tensor had been modified in place before it was recorded.
    """

    edge: GradientEdge
    value: Tensor
    version: int


class _Stream(BalancedMode):
    """Balanced gradients, with the tensors that may be the inputs of blocks.

    Args:
        images: the input of the forward.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__([images])
        self._size = len(images)
        self._entries: dict[Node, _Entry] = {}
        # For every attention map, the tensors that all of it was computed from, the last first.
        self._before: dict[int, dict[Node, _Entry]] = {}
        # The tensors that all of the last attention map was computed from, in that order.
        self._cut: list[Node] = []

    def ran(self, output: Any) -> None:
        """Keeps a tensor that may be the input of a block."""
        if isinstance(output, Tensor) and output.dim() == 3 and self._size in output.shape[:2]:
            node = output.grad_fn
            if node is not None and output.output_nr == 0 and node not in self._entries:
                self._entries[node] = _Entry(
                    GradientEdge(node, 0), output.detach(), output._version
                )

    def on_map(self, attention: Tensor, number: int | None) -> Tensor:
        """Has to be called with every attention map; forgets what is not before all of it."""
        if number is not None and attention.grad_fn is not None:
            self._dependence.level([attention])
            tokens = attention.shape[-1]
            nodes = _cut_nodes(attention.grad_fn, self._dependence.levels, FROZEN, self._cut)
            self._cut = nodes
            chain = [
                node
                for node in nodes
                if node in self._entries
                and sorted(self._entries[node].value.shape[:2]) == sorted((self._size, tokens))
            ]
            self._entries = {node: self._entries[node] for node in chain}
            self._before[number] = dict(self._entries)
        return attention

    def block_inputs(self, selected: Tensor, map_index: MapIndex) -> list[_Entry]:
        """The inputs of the blocks, in forward order, each once."""
        assert selected.grad_fn is not None  # the output depends on the images
        cuts = set(_cut_nodes(selected.grad_fn, self._dependence.levels, LIVE))
        found: dict[Node, _Entry] = {}
        for layer, numbers in enumerate(map_index.layers):
            before = self._before[numbers[0]]
            node = next((node for node in before if node in cuts), None)
            if node is None:
                raise UnsupportedModelError(
                    f"there is no tensor of {map_index.num_tokens} tokens before attention layer "
                    f"{layer} that all of the output's relevance passes through; wanted: blocks "
                    "with residual connections, one after the other"
                )
            kept = before[node]
            if kept.value._version != kept.version:
                raise UnsupportedModelError(
                    f"the input of attention layer {layer} is later modified in place; wanted: a "
                    "forward that keeps it, such as x = x + y in place of x += y"
                )
            found[node] = kept
        return list(found.values())


def _cut_nodes(
    start: Node, levels: Mapping[Node | None, int], least: int, known: Sequence[Node] = ()
) -> list[Node]:
    """The nodes that every path from a node to the inputs passes through, the node first.

    Args:
        start: a node of the autograd graph.
        levels: what the nodes depend on; paths lead through those of ``least`` or more.
        least: the least level.
        known: what was found for another node; what every path from one of these passes through
            comes after it.
    """
    places = {node: place for place, node in enumerate(known)}
    order = count()
    pending: list[tuple[int, int, Node]] = []
    edges: dict[Node, int] = {}
    num_open = 0

    def reach(node: Node) -> None:
        if node not in edges:
            edges[node] = 0
            # Later nodes first: a node has a higher number than those it was computed from.
            heapq.heappush(pending, (-node._sequence_nr(), next(order), node))
        edges[node] += 1

    found: list[Node] = []
    reach(start)
    num_open = 1
    while pending:
        _, _, node = heapq.heappop(pending)
        num_open -= edges.pop(node)
        if num_open == 0:
            if node in places:
                return [*found, *known[places[node] :]]
            found.append(node)
        for parent, _ in node.next_functions:
            if parent is not None and levels.get(parent, 0) >= least:
                reach(parent)
                num_open += 1
    return found
