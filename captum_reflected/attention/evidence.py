"""Results of forwards in which attention mixes no tokens, and what they imply for the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import update_wrapper
from typing import Any, Concatenate, NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor

from captum_reflected.attention.recording import MapIndex
from captum_reflected.attention.tokens import TokenLayout


class Tolerances(NamedTuple):
    """The largest changes that count as rounding.

    Attributes:
        keys: for a token's key, in the logarithm of a probability.
        outputs: for the model's output, as a share of its size.
        relative: for any value, as a share of the largest change.
    """

    keys: float
    outputs: float
    relative: float


@dataclass(frozen=True)
class Trial:
    """One forward: how it differs from the unchanged forward.

    Attributes:
        cells: grid cells whose pixels are replaced.
        layer: the layer in which tokens are redirected, counted from 0.
        redirected: maps a token to the token that it attends to instead of itself.
        is_isolated: whether exactly one token is redirected, to test that no other token changes.
    """

    cells: tuple[int, ...] = ()
    layer: int = 0
    redirected: Mapping[int, int] = field(default_factory=dict)
    is_isolated: bool = False


_Result = TypeVar("_Result")
_Arguments = ParamSpec("_Arguments")


def _once(
    method: Callable[Concatenate[Evidence, _Arguments], _Result],
) -> Callable[Concatenate[Evidence, _Arguments], _Result]:
    """Remembers what a method returns: the same evidence is asked again at every call."""

    def answer(self: Evidence, /, *args: _Arguments.args, **kwargs: _Arguments.kwargs) -> _Result:
        key = method.__name__, args, tuple(sorted(kwargs.items()))
        if key not in self.answers:
            self.answers[key] = method(self, *args, **kwargs)
        known: _Result = self.answers[key]
        return known

    update_wrapper(answer, method)
    return answer


@dataclass(frozen=True)
class Evidence:
    """What the trials show about a model, for one shape of images.

    Attributes:
        modules: for every attention map of the forward, the module that was running.
        problem: why the trials could not be run; None if they were.
        trials: the trials, the unchanged forward first.
        keys: (layers, trials, N), how far each token's key changed.
        outputs: (trials, C), the model's outputs minus the unchanged one, as a share of its
            size; None if the forward returns no usable tensor.
        products: number of products of two tensors that depend on the image, before the first
            recorded layer and after the last.
        tolerances: which changes count as rounding.
        answers: what the methods have returned before.
    """

    modules: tuple[str, ...]
    problem: str | None
    trials: tuple[Trial, ...]
    keys: Tensor
    outputs: Tensor | None
    products: tuple[int, int]
    tolerances: Tolerances
    answers: dict[Any, Any] = field(default_factory=dict, repr=False, compare=False)

    @_once
    def tokens_read(self, layout: TokenLayout) -> Tensor | None:
        """(N,): the tokens that the output is read from; None if the trials do not show it."""
        if self.outputs is None or self.problem is not None:
            return None
        is_read = torch.zeros(layout.num_tokens, dtype=torch.bool)
        last = self.keys.shape[0] - 1
        tolerance = self.tolerances.outputs
        for trial, change in zip(self.trials, self.outputs, strict=True):
            if trial.layer == last and trial.redirected and float(change.abs().amax()) > tolerance:
                is_read[list(trial.redirected)] = True
        # Image tokens are only redirected in two halves, so treat them all alike at first,
        image = slice(layout.num_prefix_tokens, None)
        is_read[image] = is_read[image].any()
        # then exclude single tokens, if the effect of one out of J tokens is large enough to see.
        visible = 10 * tolerance * layout.num_image_tokens
        if float(self.outputs.abs().amax()) > visible:
            for trial, keys, change in zip(self.trials, self.keys[0], self.outputs, strict=True):
                if len(trial.cells) == 1 and float(keys.amax()) > self.tolerances.keys:
                    token = layout.num_prefix_tokens + trial.cells[0]
                    is_read[token] &= float(change.abs().amax()) > tolerance
        return is_read

    @_once
    def misplaced(self, layout: TokenLayout) -> str | None:
        """Describes a grid cell whose token is not where the layout expects it; None if none is."""
        width = layout.grid_size[1]
        total = self.keys.sum(dim=0)
        for trial, change in zip(self.trials, total, strict=True):
            if len(trial.cells) != 1 or float(change.amax()) <= self.tolerances.keys:
                continue
            (cell,) = trial.cells
            token = int(change.argmax()) - layout.num_prefix_tokens
            down, across = token // width - cell // width, token % width - cell % width
            # With overlapping patches (a convolutional stem), a neighbour may change most.
            overlaps = int((change > self.tolerances.relative * change.amax()).sum()) > 1
            if token < 0 or max(abs(down), abs(across)) > overlaps:
                return (
                    f"changing the pixels in row {cell // width}, column {cell % width} of "
                    f"the {layout.grid_size[0]} x {width} grid changes token "
                    f"{token + layout.num_prefix_tokens} most, where token "
                    f"{cell + layout.num_prefix_tokens} is expected"
                )
        return None

    @_once
    def mixing(self, layout: TokenLayout, map_index: MapIndex) -> tuple[float, str] | None:
        """Token mixing outside the recorded attention: how much, and where; None if none."""
        leak = self._leak(layout)
        between_layers = self._mixing_between_layers(layout)
        if between_layers is not None:
            share, layer = between_layers
            if layer == 0:
                return max(share, leak), f"before {self.name(map_index, 0)}"
            before, after = self.name(map_index, layer - 1), self.name(map_index, layer)
            return max(share, leak), f"between {before} and {after}"
        if leak > self.tolerances.outputs:
            return leak, f"after {self.name(map_index, len(map_index.layers) - 1)}"
        return None

    @_once
    def interaction(self, layout: TokenLayout) -> float:
        """How far the output is from a sum over image tokens, as a share of its change.

        Compares three trials: one half of the tokens changed, the other half, and all of them.
        The tokens are changed after the last layer and, if the stem carries no pixels to other
        tokens, also through the image.
        """
        if self.outputs is None or self.problem is not None:
            return 0.0
        last = self.keys.shape[0] - 1
        after = [trial.layer == last and len(trial.redirected) > 1 for trial in self.trials]
        pixels = [len(trial.cells) > 1 for trial in self.trials]
        selections = [after, pixels] if self._stem_is_local(layout) else [after]
        found = [0.0]
        for selection in selections:
            if sum(selection) == 3:
                first, second, both = self.outputs[selection]
                change = float(torch.stack([first, second, both]).abs().amax())
                excess = float((both - first - second).abs().amax())
                is_visible = excess > self.tolerances.outputs / 10
                if is_visible and excess > 2 * self.tolerances.relative * change:
                    found.append(excess / change)
        return max(found)

    def _stem_is_local(self, layout: TokenLayout) -> bool:
        """Whether the pixels of a cell change no other token before the first layer."""
        for trial, change in zip(self.trials, self.keys[0], strict=True):
            if len(trial.cells) == 1:
                others = torch.ones_like(change, dtype=torch.bool)
                others[layout.num_prefix_tokens + trial.cells[0]] = False
                if bool((change[others] > self.tolerances.keys).any()):
                    return False
        return True

    def _leak(self, layout: TokenLayout) -> float:
        """The change of an output that must not depend on image tokens, as a share of its size."""
        if self.outputs is None:
            return 0.0
        reads_prefix = layout.readout in ("class", "distilled")
        changes = [
            change.abs().amax()
            for trial, change in zip(self.trials, self.outputs, strict=True)
            if (reads_prefix and trial.cells)
            or (trial.is_isolated and (reads_prefix or layout.readout == "attention"))
        ]
        return float(torch.stack(changes).amax()) if changes else 0.0

    def _mixing_between_layers(self, layout: TokenLayout) -> tuple[float, int] | None:
        """Relative change of the keys of unchanged tokens, and the first layer that shows it."""
        tolerance, _, share = self.tolerances
        prefix = layout.num_prefix_tokens
        for layer, changes in enumerate(self.keys):
            for index, trial in enumerate(self.trials):
                if len(trial.cells) != 1 and not trial.is_isolated:
                    continue
                change = changes[index]
                if layer == 0:
                    # A stem may carry pixels to other image tokens, but never to the prefix.
                    others = torch.zeros_like(change, dtype=torch.bool)
                    others[:prefix] = True
                else:
                    others = self.keys[0, index] <= tolerance
                    others[list(trial.redirected)] = False
                    others[[prefix + cell for cell in trial.cells]] = False
                rest = float(change[others].amax()) if bool(others.any()) else 0.0
                most = float(change[~others].amax()) if bool((~others).any()) else 0.0
                if rest > tolerance and rest > share * most:
                    return rest / max(most, rest), layer
        return None

    def name(self, map_index: MapIndex, layer: int) -> str:
        """An attention layer, by its number and module."""
        return f"attention layer {layer} ({self.modules[map_index.layers[layer][0]]})"
