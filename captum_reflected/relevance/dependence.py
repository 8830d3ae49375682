"""What each tensor of a forward depends on, read from the autograd graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from torch import Tensor
from torch.autograd.graph import Node

CONSTANT = 0
"""The level of nodes that do not depend on the inputs: parameters, masks, numbers."""


class Dependence:
    """Assigns a level to every node of an autograd graph, while a forward is building it.

    Args:
        sources: the inputs of the forward and their levels; each has a ``grad_fn``.
        level_of: the level of a node, from the node, its parents and their levels. Called once for
            each node, after its parents, and only if a parent is not constant.
        leaf_level: the level of a leaf tensor that requires a gradient and is not a source.
    """

    def __init__(
        self,
        sources: Iterable[tuple[Tensor, int]],
        level_of: Callable[[Node, Sequence[Node | None], Sequence[int]], int],
        leaf_level: Callable[[Tensor], int] = lambda _: CONSTANT,
    ) -> None:
        # Keeps references to the nodes, so that the same node is always the same Python object.
        self.levels: dict[Node | None, int] = {None: CONSTANT}
        self.levels.update((source.grad_fn, level) for source, level in sources)
        self._level_of = level_of
        self._leaf_level = leaf_level

    def level(self, tensors: Iterable[Tensor]) -> int:
        """The highest level of the tensors."""
        found: list[Node | None] = []
        highest = CONSTANT
        for tensor in tensors:
            if tensor.grad_fn is None and tensor.requires_grad:
                highest = max(highest, self._leaf_level(tensor))
            # Empty tensors carry no relevance; checkpointing makes one to save its inputs.
            elif tensor.numel():
                found.append(tensor.grad_fn)
        pending = list(found)
        while pending:
            node = pending[-1]
            if node is None or node in self.levels:
                pending.pop()
                continue
            if isinstance(leaf := getattr(node, "variable", None), Tensor):
                self.levels[node] = self._leaf_level(leaf)
                continue
            parents = [parent for parent, _ in node.next_functions]
            if unknown := [parent for parent in parents if parent not in self.levels]:
                pending += unknown
                continue
            levels = [self.levels[parent] for parent in parents]
            is_constant = max(levels, default=CONSTANT) == CONSTANT
            self.levels[node] = CONSTANT if is_constant else self._level_of(node, parents, levels)
        return max([highest, *(self.levels[node] for node in found)])


def operation_of(node: Node) -> str:
    """The operation of a node: ``Cat`` of ``CatBackward0``, ``Copy`` of ``CopyBackwards``."""
    return node.name().rpartition("::")[2].partition("Backward")[0]


# Operations that only move or select values, by :func:`operation_of`.
MOVES = frozenset(
    """
    Alias Amax AsStrided Cat Clone ConstantPadNd Copy CopySlices Diagonal Expand Flip Gather
    Index IndexPut IndexSelect MaskedFill Max Permute Repeat ReshapeAlias Roll Scatter Select Slice
    Sort Split SplitWithSizes Squeeze Stack T ToCopy Topk Transpose Tril Triu Unbind Unfold
    UnsafeSplit UnsafeView Unsqueeze View Where Zero
    """.split()  # noqa: SIM905
)
