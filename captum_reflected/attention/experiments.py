"""Runs a model with recorded attention replaced by attention that mixes nothing."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from itertools import chain
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from captum_reflected._captum import run_forward
from captum_reflected.attention.evidence import Evidence, Trial
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


def _rows(layout: TokenLayout, layers: int, *, wants_read: bool, pools: bool) -> tuple[Trial, ...]:
    prefix, tokens = layout.num_prefix_tokens, layout.num_image_tokens
    rows, columns = layout.grid_size
    cells = sorted({0, columns - 1, tokens - 1, rows // 2 * columns + columns // 2})
    found = [Trial(), *(Trial((cell,)) for cell in cells)]
    if tokens < 2 or layout.num_tokens < 3:  # of two keys, either may be the one that changed
        return (Trial(),)

    def neighbour(token: int) -> int:
        return prefix + (token - prefix + 1) % tokens

    token = prefix + tokens // 3
    found.append(Trial(moved={token: neighbour(token)}, alone=True))
    last = layers - 1
    if pools:
        every = range(tokens)
        for part in (every[::2], every[1::2], every):
            found.append(Trial(tuple(part)))
            found.append(Trial(layer=last, moved={prefix + n: neighbour(prefix + n) for n in part}))
    if wants_read:
        found += [Trial(layer=last, moved={token: prefix}) for token in range(prefix)]
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

    def __init__(self, layout: TokenLayout, seen: Seen, rows: tuple[Trial, ...]) -> None:
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
    rows: tuple[Trial, ...],
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
        answers.append(answer_of(output, target, 1))

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


def _changed_images(image: Tensor, rows: tuple[Trial, ...], grid_size: tuple[int, int]) -> Tensor:
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


def answer_of(output: Any, target: Tensor | None, count: int) -> Tensor | None:
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
