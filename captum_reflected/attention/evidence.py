"""What a model shows of itself in forwards whose attention mixes nothing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_reflected.attention.recording import Seen
from captum_reflected.attention.tokens import TokenLayout


@dataclass(frozen=True)
class Trial:
    """One of the forwards: what is other in it than in the plain one.

    Attributes:
        cells: the cells of the grid whose pixels are changed.
        layer: where tokens take from other tokens, counted from 0.
        moved: token to the token that it takes from.
        alone: whether it is asked if the change of one token stays its own.
    """

    cells: tuple[int, ...] = ()
    layer: int = 0
    moved: Mapping[int, int] = field(default_factory=dict)
    alone: bool = False


@dataclass(frozen=True)
class Evidence:
    """What a model showed of itself for one shape of images.

    Attributes:
        modules: for every attention map of the forward, the module that ran.
        problem: why nothing else is known; None where it is.
        rows: what was tried, the plain forward first.
        keys: (layers, rows, N), how far each token's key changed.
        answers: (rows, C), as a share of their size, less the plain one; None where the
            forward returns no numbers to look at.
        products: of two tensors that depend on the image, before the first recorded layer and
            after the last.
        rounding: what counts as no change, as in ``_ROUNDING``.
    """

    modules: tuple[str, ...]
    problem: str | None
    rows: tuple[Trial, ...]
    keys: Tensor
    answers: Tensor | None
    products: tuple[int, int]
    rounding: tuple[float, float, float]

    def read(self, layout: TokenLayout) -> Tensor | None:
        """(N,): the tokens that the answer is read from; None where that does not show."""
        if self.answers is None or self.problem is not None:
            return None
        read = torch.zeros(layout.num_tokens, dtype=torch.bool)
        last = self.keys.shape[0] - 1
        for row, change in zip(self.rows, self.answers, strict=True):
            if row.layer == last and row.moved and float(change.abs().amax()) > self.rounding[1]:
                read[list(row.moved)] = True
        # The image tokens are tried in two halves; a token left over is as its neighbours,
        image = slice(layout.num_prefix_tokens, None)
        read[image] = read[image].any()
        # except for the few that are changed alone, if what one of J changes can be seen.
        visible = 10 * self.rounding[1] * layout.num_image_tokens
        if float(self.answers.abs().amax()) > visible:
            for row, keys, change in zip(self.rows, self.keys[0], self.answers, strict=True):
                if len(row.cells) == 1 and float(keys.amax()) > self.rounding[0]:
                    is_read = float(change.abs().amax()) > self.rounding[1]
                    read[layout.num_prefix_tokens + row.cells[0]] &= is_read
        return read

    def misplaced(self, layout: TokenLayout) -> str | None:
        """Which cell's token stands elsewhere, in words; None if none does."""
        width = layout.grid_size[1]
        total = self.keys.sum(dim=0)
        for row, change in zip(self.rows, total, strict=True):
            if len(row.cells) != 1 or float(change.amax()) <= self.rounding[0]:
                continue
            (cell,) = row.cells
            token = int(change.argmax()) - layout.num_prefix_tokens
            down, across = token // width - cell // width, token % width - cell % width
            # Patches that overlap, as of a convolutional stem, may favour a neighbour.
            overlaps = int((change > self.rounding[2] * change.amax()).sum()) > 1
            if token < 0 or max(abs(down), abs(across)) > overlaps:
                return (
                    f"changing the pixels in row {cell // width}, column {cell % width} of "
                    f"the {layout.grid_size[0]} x {width} grid changes token "
                    f"{token + layout.num_prefix_tokens} most, where token "
                    f"{cell + layout.num_prefix_tokens} is expected"
                )
        return None

    def mixing(self, layout: TokenLayout, seen: Seen) -> tuple[float, str] | None:
        """What mixes beside the recorded attention: how much, and where; None if nothing does."""
        leak = self._leak(layout)
        inside = self._mixing_between_layers(layout)
        if inside is not None:
            share, layer = inside
            if layer == 0:
                return max(share, leak), f"before {self.name(seen, 0)}"
            where = f"between {self.name(seen, layer - 1)} and {self.name(seen, layer)}"
            return max(share, leak), where
        if leak > self.rounding[1]:
            return leak, f"after {self.name(seen, len(seen.layers) - 1)}"
        return None

    def interaction(self, layout: TokenLayout) -> float:
        """How far the answer is from a sum over image tokens, as a share of its change.

        Half of the tokens are changed, the other half, and all: after the last layer, and, if
        no stem carries pixels to other tokens, from the image on.
        """
        if self.answers is None or self.problem is not None:
            return 0.0
        last = self.keys.shape[0] - 1
        after = [r.layer == last and len(r.moved) > 1 for r in self.rows]
        pixels = [len(r.cells) > 1 for r in self.rows]
        trials = [after, pixels] if self._stem_is_local(layout) else [after]
        found = [0.0]
        for trial in trials:
            if sum(trial) == 3:
                first, second, both = self.answers[trial]
                change = float(torch.stack([first, second, both]).abs().amax())
                excess = float((both - first - second).abs().amax())
                if excess > self.rounding[1] / 10 and excess > 2 * self.rounding[2] * change:
                    found.append(excess / change)
        return max(found)

    def _stem_is_local(self, layout: TokenLayout) -> bool:
        """Whether the pixels of a cell change no other token before the first layer."""
        for row, change in zip(self.rows, self.keys[0], strict=True):
            if len(row.cells) == 1:
                others = torch.ones_like(change, dtype=torch.bool)
                others[layout.num_prefix_tokens + row.cells[0]] = False
                if bool((change[others] > self.rounding[0]).any()):
                    return False
        return True

    def _leak(self, layout: TokenLayout) -> float:
        """How far an answer that may not depend on image tokens does, as a share of its size."""
        if self.answers is None:
            return 0.0
        reads_prefix = layout.readout in ("class", "distilled")
        counted = [
            change.abs().amax()
            for row, change in zip(self.rows, self.answers, strict=True)
            if (reads_prefix and row.cells)
            or (row.alone and (reads_prefix or layout.readout == "attention"))
        ]
        return float(torch.stack(counted).amax()) if counted else 0.0

    def _mixing_between_layers(self, layout: TokenLayout) -> tuple[float, int] | None:
        """The share by which keys of unchanged tokens change, and the first layer where."""
        tolerance, _, share = self.rounding
        prefix = layout.num_prefix_tokens
        for layer, changes in enumerate(self.keys):
            for index, row in enumerate(self.rows):
                if len(row.cells) != 1 and not row.alone:
                    continue
                change = changes[index]
                if layer == 0:
                    # Pixels reach other image tokens through a stem, but never the prefix.
                    others = torch.zeros_like(change, dtype=torch.bool)
                    others[:prefix] = True
                else:
                    others = self.keys[0, index] <= tolerance
                    others[list(row.moved)] = False
                    others[[prefix + cell for cell in row.cells]] = False
                rest = float(change[others].amax()) if bool(others.any()) else 0.0
                most = float(change[~others].amax()) if bool((~others).any()) else 0.0
                if rest > tolerance and rest > share * most:
                    return rest / max(most, rest), layer
        return None

    def name(self, seen: Seen, layer: int) -> str:
        """An attention layer, by its number and module."""
        return f"attention layer {layer} ({self.modules[seen.layers[layer][0]]})"
