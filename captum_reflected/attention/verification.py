"""Proves, by running the model, what its maps rely on.

R follows the attention that was recorded, and the layout says which token stands for which
part of the image. Neither is taken on trust. A few forwards of one image, in which every
recorded attention map is replaced by one that mixes nothing (the identity), show:

- **Mixing that was not recorded.** Without attention, no token may depend on another. The
  answer of a class token must then be the same whatever the image shows, and a token that is
  changed must leave the keys of all others as they are, in every layer. Where the answer is
  pooled over the image tokens, no product of two tensors that depend on the image may come
  before the first recorded layer or follow the last.
- **Where tokens stand.** Pixels of one cell of the grid are changed: the key of this cell's
  token has to change most.
- **Which tokens are read**, where no gradient tells: those whose change in the last layer
  changes the answer.
- **That images stand first** in the maps: the forwards hold another number of images than
  the call.

What this does not see is listed in the documentation ("What is checked, and what is not").
"""

from __future__ import annotations

import math
import warnings
import weakref
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from captum_reflected._captum import run_forward
from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.recording import Seen
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.modules import modules_of, running_module, tensors_in
from captum_reflected.inputs.random_state import DrawWatch, is_quiet
from captum_reflected.inputs.targets import select_target

# Probabilities below say nothing of the keys: they are masked, or lost to rounding.
_LEAST_PROBABILITY = 1e-30
_MOST_QUERIES = 8
# What rounding makes of a key (in the logarithm of a probability), and of an answer (as a share
# of its size), and what share of the largest change counts as one.
_ROUNDING = {torch.float64: (1e-8, 1e-9, 1e-7), torch.float32: (2e-5, 2e-5, 1e-3)}
_ROUNDING_OF_HALF_TYPES = (0.3, 0.05, 0.1)


@dataclass(frozen=True)
class _Row:
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
    rows: tuple[_Row, ...]
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


def examine(
    forward_func: Callable[..., Any],
    call: Batch,
    layout: TokenLayout,
    seen: Seen,
    read: Tensor | None,
) -> Evidence:
    """What the model shows of itself; remembered for a model and a shape of images.

    Args:
        forward_func: as it was recorded.
        call: as it was recorded; its first image is run again.
        layout: its readout may be open.
        seen: from the recording.
        read: (N,), the tokens that the answer is read from, where that is known.

    Returns:
        Evidence: the same object where nothing has changed since.

    Raises:
        UnsupportedModelError: images are not the first dimension of the attention maps.
    """
    wants_read = read is None
    pools = read is None or bool(read[layout.num_prefix_tokens :].any())
    anchor, key = _identity(forward_func)
    target = call.target[0].tolist() if call.target is not None and call.target.shape[1] > 1 else 0
    key += (
        tuple(call.images.shape[1:]),
        call.images.dtype,
        layout.num_prefix_tokens,
        layout.grid_size,
        seen,
        wants_read,
        pools,
        str(target),
    )
    try:
        known = _known.setdefault(anchor, {})
    except TypeError:  # has no weak reference
        known = {}
    if key not in known:
        rows = _rows(layout, len(seen.layers), wants_read=wants_read, pools=pools)
        known[key] = _run(forward_func, call, layout, seen, rows)
    return known[key]


_known: weakref.WeakKeyDictionary[Any, dict[Any, Evidence]] = weakref.WeakKeyDictionary()


def _identity(forward_func: Callable[..., Any]) -> tuple[Any, tuple[Any, ...]]:
    """What to remember a forward by, weakly, and what must not have changed since."""
    modules = modules_of(forward_func)
    function = getattr(forward_func, "__func__", forward_func)
    parts = tuple((id(module), type(module), module.training) for module in modules)
    code = getattr(function, "__code__", None)
    return (modules[0] if modules else forward_func), (id(code), parts)


def _rows(layout: TokenLayout, layers: int, *, wants_read: bool, pools: bool) -> tuple[_Row, ...]:
    prefix, tokens = layout.num_prefix_tokens, layout.num_image_tokens
    rows, columns = layout.grid_size
    cells = sorted({0, columns - 1, tokens - 1, rows // 2 * columns + columns // 2})
    found = [_Row(), *(_Row((cell,)) for cell in cells)]
    if tokens < 2 or layout.num_tokens < 3:  # of two keys, either may be the one that changed
        return (_Row(),)

    def neighbour(token: int) -> int:
        return prefix + (token - prefix + 1) % tokens

    token = prefix + tokens // 3
    found.append(_Row(moved={token: neighbour(token)}, alone=True))
    last = layers - 1
    if pools:
        every = range(tokens)
        for part in (every[::2], every[1::2], every):
            found.append(_Row(tuple(part)))
            found.append(_Row(layer=last, moved={prefix + n: neighbour(prefix + n) for n in part}))
    if wants_read:
        found += [_Row(layer=last, moved={token: prefix}) for token in range(prefix)]
    return tuple(found)


class _Products(TorchDispatchMode):
    """Counts matrix products of two tensors that both depend on the image, as attention has.

    Args:
        images: what the forward starts from.

    Attributes:
        before: how many come before the first recorded map, but for those of its own layer.
        count: how many follow the last recorded map.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dependent = WeakTensorKeyDictionary()
        self._dependent[images] = True
        self.before = self.count = 0

    def meet(self, number: int, seen: Seen) -> None:
        """Before a recorded map is replaced."""
        if number == seen.layers[0][0]:
            self.before = max(self.count - len(seen.layers[0]), 0)
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs everything as it is; follows what depends on the image."""
        output = func(*args, **(kwargs or {}))
        if any(tensor in self._dependent for tensor in tensors_in((args, kwargs))):
            made = list(tensors_in(output))
            for tensor in made:
                self._dependent[tensor] = True
            name = func.overloadpacket.__name__
            factors = [t for t in tensors_in(args) if t in self._dependent]
            if name in ("bmm", "mm", "mv", "dot", "mul"):
                pass
            elif name in ("addmm", "baddbmm", "addbmm"):
                factors = [t for t in tensors_in(args[1:]) if t in self._dependent]
            elif not name.startswith(("_scaled_dot_product", "_efficient", "_flash")):
                return output
            # An elementwise product is one of matrices only where each factor is repeated.
            repeats = made[0].numel() > max((t.numel() for t in factors), default=0)
            self.count += len(factors) > 1 and (name != "mul" or repeats)
        return output


class _Unmixed(AttentionMode):
    """Forwards in which recorded attention mixes nothing; keeps how far keys change."""

    def __init__(self, layout: TokenLayout, seen: Seen, rows: tuple[_Row, ...]) -> None:
        super().__init__(self._see)
        self._layer_of = {n: layer for layer, maps in enumerate(seen.layers) for n in maps}
        self._seen = seen
        self._rows = rows
        self._layout = layout
        prefix, tokens = layout.num_prefix_tokens, layout.num_image_tokens
        changed = {token for row in rows if row.alone for token in chain(*row.moved.items())}
        changed |= {prefix + row.cells[0] for row in rows if len(row.cells) == 1}
        calm = [n for n in range(prefix, prefix + tokens) if n not in changed]
        calm = calm or list(range(layout.num_tokens))
        self._queries = calm[:: -(-len(calm) // _MOST_QUERIES)]
        moved = {token for row in rows if row.alone for token in row.moved}
        self._reading = next(n for n in reversed(range(layout.num_tokens)) if n not in moved)
        self._plain: dict[int, Tensor] = {}
        self._row = self._number = 0
        self.products: _Products | None = None
        self.modules: list[str] = []
        self.keys = torch.zeros(len(seen.layers), len(rows), layout.num_tokens)
        self.dtype = torch.float64

    def start(self, row: int) -> None:
        """Before the forward of a row, by its number."""
        self._row, self._number = row, 0

    @property
    def is_complete(self) -> bool:
        """Whether the forward showed as many maps as when it was recorded."""
        return self._number == self._seen.count

    def _see(self, attention: Tensor) -> Tensor:
        number, self._number = self._number, self._number + 1
        if self._row == 0:
            self.modules.append(running_module())
        layer = self._layer_of.get(number)
        if layer is None and number not in self._seen.pooling:
            return attention
        if attention.shape[0] != 1:
            raise UnsupportedModelError(
                f"the attention maps of forward_func have the shape {tuple(attention.shape)} for "
                "1 image; wanted: (1, h, N, N), images before heads"
            )
        queries, keys = attention.shape[-2:]
        if layer is not None:
            if self.products is not None:
                self.products.meet(number, self._seen)
            self._compare(number, layer, attention)
            taken = torch.arange(queries)
            row = self._rows[self._row]
            if row.moved and row.layer == layer:
                taken[list(row.moved)] = torch.tensor(list(row.moved.values()))
        elif keys > self._layout.num_tokens:  # the queries are keys, too, and come first
            taken = torch.arange(queries)
        else:
            taken = torch.full((queries,), self._reading - (self._layout.num_tokens - keys))
        mixing = torch.zeros(queries, keys, dtype=attention.dtype)
        mixing.scatter_(-1, taken[:, None], 1)
        return mixing.to(attention.device).expand_as(attention).contiguous()

    def _compare(self, number: int, layer: int, attention: Tensor) -> None:
        """Keeps how far each key is from that of the plain row, where queries are as they were."""
        kind = attention.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.dtype = min(self.dtype, dtype or attention.dtype, key=lambda d: torch.finfo(d).bits)
        given = attention[0, :, self._queries].detach()
        given = given.to(torch.promote_types(given.dtype, torch.float32))
        plain = self._plain.setdefault(number, given)
        log_ratio = given.log() - plain.log()
        known = (given > _LEAST_PROBABILITY) & (plain > _LEAST_PROBABILITY)
        log_ratio = torch.where(known, log_ratio, math.nan)
        # The normalisation moves all probabilities of a query alike; most keys do not change.
        log_ratio = log_ratio - log_ratio.nanmedian(dim=-1, keepdim=True).values
        change = log_ratio.abs().flatten(0, 1).nanmedian(dim=0).values.nan_to_num(0.0).cpu()
        keys = self.keys[layer, self._row]
        self.keys[layer, self._row] = torch.maximum(keys, change.to(keys.dtype))


def _run(
    forward_func: Callable[..., Any],
    call: Batch,
    layout: TokenLayout,
    seen: Seen,
    rows: tuple[_Row, ...],
) -> Evidence:
    mode = _Unmixed(layout, seen, rows)
    images = _changed_images(call.images[0], rows, layout.grid_size)
    answers: list[Tensor | None] = []
    problem: str | None = None
    products = (0, 0)
    watch = DrawWatch()

    # One image at a time: least memory, and in a call of several another number of images,
    # which shows where they stand in the maps.
    args, target = call.rows(torch.zeros(1, dtype=torch.int64, device=images.device))

    def forward(index: int, shown: Tensor) -> None:
        nonlocal problem
        mode.start(index)
        with torch.no_grad(), mode:
            output = run_forward(forward_func, shown, args)
        if not mode.is_complete:
            problem = "it does not run the same attention each time"
        answers.append(_answer(output, target, 1))

    try:
        first = images[:1].clone()
        mode.products = _Products(first)
        with nullcontext() if is_quiet(forward_func) else watch, mode.products:
            forward(0, first)
        products, mode.products = (mode.products.before, mode.products.count), None
        for index in range(1, len(rows)):
            watch.restore()  # random numbers have to be the same in every row
            forward(index, images[index : index + 1])
    except UnsupportedModelError:
        raise
    except Exception as error:
        said = str(error).strip().partition("\n")[0]
        problem = f"with one image repeated it raises {type(error).__name__}: {said}"
    if problem is not None:
        keys = torch.zeros(len(seen.layers), 0, layout.num_tokens)
        return Evidence(tuple(mode.modules), problem, (), keys, None, (0, 0), (0.0, 0.0, 0.0))
    rounding = _ROUNDING.get(mode.dtype, _ROUNDING_OF_HALF_TYPES)
    return Evidence(
        tuple(mode.modules), None, rows, mode.keys, _differences(answers), products, rounding
    )


def _changed_images(image: Tensor, rows: tuple[_Row, ...], grid_size: tuple[int, int]) -> Tensor:
    """(rows, C, H, W): noise of the image's own range in the cell of each row."""
    images = image.repeat(len(rows), 1, 1, 1)
    low, high = image.amin(), image.amax()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(image.shape, generator=generator).to(image)
    noise = low + noise * torch.where(high > low, high - low, 1)
    for index, row in enumerate(rows):
        for cell in row.cells:
            down, across = (
                slice(place * side // count, (place + 1) * side // count)
                for place, side, count in zip(
                    divmod(cell, grid_size[1]), image.shape[-2:], grid_size, strict=True
                )
            )
            images[index, :, down, across] = noise[:, down, across]
    return images


def _answer(output: Any, target: Tensor | None, count: int) -> Tensor | None:
    """(rows, C): all numbers of an answer, of one with more dimensions the target's."""
    if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != count:
        return None
    if output.dim() > 2:
        if target is None:
            return None
        output = select_target(output, target, count)
    output = output.detach().reshape(count, -1)
    answer: Tensor = output.to(torch.promote_types(output.dtype, torch.float32)).cpu()
    return answer


def _differences(answers: list[Tensor | None]) -> Tensor | None:
    known = [answer for answer in answers if answer is not None]
    if len(known) < len(answers):
        return None
    every = torch.cat(known)
    size = every.abs().amax()
    return (every - every[:1]) / torch.where(size > 0, size, 1)


def check_layout(evidence: Evidence, layout: TokenLayout, told: TokenLayout | None) -> None:
    """Refuses a layout that the model contradicts; warns where it was told by the caller.

    Raises:
        UnsupportedModelError: tokens stand elsewhere.
    """
    if evidence.problem is not None:
        _warn(
            "what the map relies on could not be checked, as forward_func cannot be run that way: "
            f"{evidence.problem}. If it runs nothing but a Vision Transformer, the map is right"
        )
        return
    problem = evidence.misplaced(layout)
    if problem is None:
        return
    if told is not None:
        _warn(
            f"token_layout has {layout.num_prefix_tokens} prefix tokens, but {problem}: the map "
            "lies beside what it shows, unless forward_func moves the image on purpose"
        )
        return
    raise UnsupportedModelError(
        f"the {layout.num_tokens} tokens are not {layout.num_prefix_tokens} prefix tokens and then "
        f"the image in raster order: {problem}; wanted: class and register tokens first, and a "
        "forward_func that does not flip, transpose or crop its images. If the order is another "
        "one on purpose, say so with token_layout=TokenLayout(num_prefix_tokens, grid_size)"
    )


def warn_of_mixing(evidence: Evidence, layout: TokenLayout, seen: Seen, *, is_stated: bool) -> None:
    """Warns where tokens mix outside the attention that was recorded.

    Args:
        evidence: of the model.
        layout: with its readout.
        seen: from the recording.
        is_stated: whether the model or the caller says how the answer is read out.
    """
    if evidence.problem is not None or seen.others:
        return
    found = evidence.mixing(layout, seen)
    if found is not None:
        amount, where = found
        _warn(
            f"tokens mix outside the attention that is recorded, {where}: with every recorded map "
            f"replaced by one that mixes nothing, tokens still change by {amount:.2g} of their own "
            "change, or the answer of its size. The map leaves out what flows there. Look there "
            "for attention that is not softmax over the last dimension (or is hidden in "
            "torch.ops), and for convolutions or linear layers across tokens"
        )
        return
    if layout.readout in ("class", "distilled"):
        return
    before, after = evidence.products
    if before or (after and not seen.pooling):
        where = f"before {evidence.name(seen, 0)}"
        if not before:
            where = f"after {evidence.name(seen, len(seen.layers) - 1)}"
        _warn(
            f"tokens mix outside the attention that is recorded, {where}: {before or after} matrix "
            "product(s) of tensors that depend on the image stand there. If they are attention "
            "that is not seen, the map leaves it out"
        )
        return
    is_known = is_stated or layout.readout == "attention"
    interaction = 0.0 if is_known else evidence.interaction(layout)
    if interaction > 0:
        _warn(
            "after the last recorded attention layer, the answer is no sum over tokens (by "
            f"{interaction:.2g} of its change): either its head is not linear after pooling, and "
            "the map is right, or tokens mix there in attention that is not recorded, and the map "
            "leaves it out. If the former, say so with token_layout=TokenLayout(..., readout=...)"
        )


def warn_of_missing_gradients(
    forward_func: Callable[..., Any],
    call: Batch,
    evidence: Evidence,
    missing: tuple[int, ...],
) -> None:
    """Warns of layers that the answer depends on and that no gradient reached."""
    if not missing:
        return

    def answer(replaced: tuple[int, ...]) -> Tensor | None:
        number = -1

        def observe(attention: Tensor) -> Tensor:
            nonlocal number
            number += 1
            return torch.ones_like(attention) if number in replaced else attention

        with torch.no_grad(), AttentionMode(observe):
            output = run_forward(forward_func, call.images, call.args)
        return _answer(output, call.target, call.size)

    plain, changed = answer(()), answer(missing)
    if plain is not None and changed is not None and torch.equal(plain, changed):
        return  # computed, but not used
    names = dict.fromkeys(
        evidence.modules[number] if number < len(evidence.modules) else f"map {number}"
        for number in missing
    )
    _warn(
        f"no gradient reached the attention of {', '.join(names)}, as under torch.no_grad() or "
        "behind detach(), although the answer depends on it: the map leaves it out"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
