"""Runs a model with its recorded attention replaced by attention that mixes no tokens."""

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

from captum_reflected.attention.evidence import Evidence, Tolerances, Trial
from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.recording import MapIndex
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.modules import modules_of, running_module, tensors_in
from captum_reflected.inputs.outputs import run_model
from captum_reflected.inputs.random_state import DrawWatch, is_quiet
from captum_reflected.inputs.targets import select_target

# Smaller probabilities carry no information about the keys: they are masked, or lost to rounding.
_LEAST_PROBABILITY = 1e-30
_MOST_QUERIES = 8
_TOLERANCES = {
    torch.float64: Tolerances(keys=1e-8, outputs=1e-9, relative=1e-7),
    torch.float32: Tolerances(keys=2e-5, outputs=2e-5, relative=1e-3),
}
_TOLERANCES_OF_HALF_TYPES = Tolerances(keys=0.3, outputs=0.05, relative=0.1)


def examine(
    forward_func: Callable[..., Any],
    call: Batch,
    layout: TokenLayout,
    map_index: MapIndex,
    tokens_read: Tensor | None,
) -> Evidence:
    """Runs the trials on a model, or returns the cached result for this model and image shape.

    Args:
        forward_func: the function whose attention was recorded.
        call: the call that was recorded; only its first image is run again.
        layout: the token layout; its readout may be None.
        map_index: from the recording.
        tokens_read: (N,), the tokens that the output is read from; None if not known.

    Returns:
        Evidence: the same object as before if nothing has changed.

    Raises:
        UnsupportedModelError: images are not the first dimension of the attention maps.
    """
    needs_readout = tokens_read is None
    pools = tokens_read is None or bool(tokens_read[layout.num_prefix_tokens :].any())
    anchor, key = _identity(forward_func)
    target = call.target[0].tolist() if call.target is not None and call.target.shape[1] > 1 else 0
    key += (
        tuple(call.images.shape[1:]),
        call.images.dtype,
        layout.num_prefix_tokens,
        layout.grid_size,
        map_index,
        needs_readout,
        pools,
        str(target),
    )
    try:
        cached = _cache.setdefault(anchor, {})
    except TypeError:  # the object does not support weak references
        cached = {}
    if key not in cached:
        trials = _make_trials(
            layout, len(map_index.layers), needs_readout=needs_readout, pools=pools
        )
        cached[key] = _run(forward_func, call, layout, map_index, trials)
    return cached[key]


_cache: weakref.WeakKeyDictionary[Any, dict[Any, Evidence]] = weakref.WeakKeyDictionary()


def _identity(forward_func: Callable[..., Any]) -> tuple[Any, tuple[Any, ...]]:
    """The object that a cache entry belongs to (held weakly), and the key that must still match."""
    modules = modules_of(forward_func)
    function = getattr(forward_func, "__func__", forward_func)
    parts = tuple((id(module), type(module), module.training) for module in modules)
    code = getattr(function, "__code__", None)
    return (modules[0] if modules else forward_func), (id(code), parts)


def _make_trials(
    layout: TokenLayout, layers: int, *, needs_readout: bool, pools: bool
) -> tuple[Trial, ...]:
    prefix, tokens = layout.num_prefix_tokens, layout.num_image_tokens
    rows, columns = layout.grid_size
    cells = sorted({0, columns - 1, tokens - 1, rows // 2 * columns + columns // 2})
    if tokens < 2 or layout.num_tokens < 3:  # with two keys, either may be the one that changed
        return (Trial(),)
    trials = [Trial(), *(Trial((cell,)) for cell in cells)]

    def neighbour(token: int) -> int:
        return prefix + (token - prefix + 1) % tokens

    token = prefix + tokens // 3
    trials.append(Trial(redirected={token: neighbour(token)}, is_isolated=True))
    last = layers - 1
    if pools:
        every = range(tokens)
        for part in (every[::2], every[1::2], every):
            trials.append(Trial(tuple(part)))
            redirected = {prefix + n: neighbour(prefix + n) for n in part}
            trials.append(Trial(layer=last, redirected=redirected))
    if needs_readout:
        trials += [Trial(layer=last, redirected={token: prefix}) for token in range(prefix)]
    return tuple(trials)


class _ProductCounter(TorchDispatchMode):
    """Counts matrix products of two tensors that both depend on the image, as in attention.

    Args:
        images: the input of the forward.

    Attributes:
        before: number of products before the first recorded map, without those of its own layer.
        count: number of products since the last recorded map.
    """

    def __init__(self, images: Tensor) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._dependent = WeakTensorKeyDictionary()
        self._dependent[images] = True
        self.before = self.count = 0

    def on_recorded_map(self, number: int, map_index: MapIndex) -> None:
        """Has to be called before a recorded map is replaced."""
        if number == map_index.layers[0][0]:
            self.before = max(self.count - len(map_index.layers[0]), 0)
        self.count = 0

    def __torch_dispatch__(
        self,
        func: Any,
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Runs the operation unchanged and tracks which tensors depend on the image."""
        output = func(*args, **(kwargs or {}))
        if any(tensor in self._dependent for tensor in tensors_in((args, kwargs))):
            outputs = list(tensors_in(output))
            for tensor in outputs:
                self._dependent[tensor] = True
            name = func.overloadpacket.__name__
            factors = [t for t in tensors_in(args) if t in self._dependent]
            if name in ("bmm", "mm", "mv", "dot", "mul"):
                pass
            elif name in ("addmm", "baddbmm", "addbmm"):
                factors = [t for t in tensors_in(args[1:]) if t in self._dependent]
            elif not name.startswith(("_scaled_dot_product", "_efficient", "_flash")):
                return output
            # An elementwise product acts as a matrix product only if it broadcasts both factors.
            repeats = outputs[0].numel() > max((t.numel() for t in factors), default=0)
            self.count += len(factors) > 1 and (name != "mul" or repeats)
        return output


class _TrialMode(AttentionMode):
    """Replaces recorded attention with attention that mixes no tokens; measures changes of keys."""

    def __init__(self, layout: TokenLayout, map_index: MapIndex, trials: tuple[Trial, ...]) -> None:
        super().__init__(self._replace)
        self._layer_of = {n: layer for layer, maps in enumerate(map_index.layers) for n in maps}
        self._map_index = map_index
        self._trials = trials
        self._layout = layout
        prefix, tokens = layout.num_prefix_tokens, layout.num_image_tokens
        isolated = [trial for trial in trials if trial.is_isolated]
        changed = {token for trial in isolated for token in chain(*trial.redirected.items())}
        changed |= {prefix + trial.cells[0] for trial in trials if len(trial.cells) == 1}
        unchanged = [n for n in range(prefix, prefix + tokens) if n not in changed]
        unchanged = unchanged or list(range(layout.num_tokens))
        self._queries = unchanged[:: -(-len(unchanged) // _MOST_QUERIES)]
        redirected = {token for trial in isolated for token in trial.redirected}
        self._pooled_token = next(
            n for n in reversed(range(layout.num_tokens)) if n not in redirected
        )
        self._unchanged_maps: dict[int, Tensor] = {}
        self._trial = self._number = 0
        self.products: _ProductCounter | None = None
        self.modules: list[str] = []
        self.keys = torch.zeros(len(map_index.layers), len(trials), layout.num_tokens)
        self.dtype = torch.float64

    def start(self, trial: int) -> None:
        """Has to be called before the forward of a trial, with the trial's number."""
        self._trial, self._number = trial, 0

    @property
    def is_complete(self) -> bool:
        """Whether the forward computed as many attention maps as when it was recorded."""
        return self._number == self._map_index.count

    def _replace(self, attention: Tensor) -> Tensor:
        number, self._number = self._number, self._number + 1
        if self._trial == 0:
            self.modules.append(running_module())
        layer = self._layer_of.get(number)
        if layer is None and number not in self._map_index.pooling:
            return attention
        if attention.shape[0] != 1:
            raise UnsupportedModelError(
                f"the attention maps of forward_func have the shape {tuple(attention.shape)} for "
                "1 image; wanted: (1, h, N, N), images before heads"
            )
        queries, keys = attention.shape[-2:]
        if layer is not None:
            if self.products is not None:
                self.products.on_recorded_map(number, self._map_index)
            self._measure_keys(number, layer, attention)
            attended = torch.arange(queries)
            trial = self._trials[self._trial]
            if trial.redirected and trial.layer == layer:
                attended[list(trial.redirected)] = torch.tensor(list(trial.redirected.values()))
        elif keys > self._layout.num_tokens:  # class attention: the first keys are the queries
            attended = torch.arange(queries)
        else:
            token = self._pooled_token - (self._layout.num_tokens - keys)
            attended = torch.full((queries,), token)
        one_hot = torch.zeros(queries, keys, dtype=attention.dtype)
        one_hot.scatter_(-1, attended[:, None], 1)
        return one_hot.to(attention.device).expand_as(attention).contiguous()

    def _measure_keys(self, number: int, layer: int, attention: Tensor) -> None:
        """Stores how far each key is from the unchanged forward's, seen by unchanged queries."""
        kind = attention.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None
        self.dtype = min(self.dtype, dtype or attention.dtype, key=lambda d: torch.finfo(d).bits)
        current = attention[0, :, self._queries].detach()
        current = current.to(torch.promote_types(current.dtype, torch.float32))
        unchanged = self._unchanged_maps.setdefault(number, current)
        log_ratio = current.log() - unchanged.log()
        is_usable = (current > _LEAST_PROBABILITY) & (unchanged > _LEAST_PROBABILITY)
        log_ratio = torch.where(is_usable, log_ratio, math.nan)
        # Normalisation shifts all log probabilities of a query by the same amount. Most keys do
        # not change, so the median is that shift.
        log_ratio = log_ratio - log_ratio.nanmedian(dim=-1, keepdim=True).values
        change = log_ratio.abs().flatten(0, 1).nanmedian(dim=0).values.nan_to_num(0.0).cpu()
        keys = self.keys[layer, self._trial]
        self.keys[layer, self._trial] = torch.maximum(keys, change.to(keys.dtype))


def _run(
    forward_func: Callable[..., Any],
    call: Batch,
    layout: TokenLayout,
    map_index: MapIndex,
    trials: tuple[Trial, ...],
) -> Evidence:
    mode = _TrialMode(layout, map_index, trials)
    images = _trial_images(call.images[0], trials, layout.grid_size)
    outputs: list[Tensor | None] = []
    problem: str | None = None
    products = (0, 0)
    watch = DrawWatch()

    # One image at a time takes the least memory. If the recorded call had several images, the
    # other batch size also shows whether images are the first dimension of the maps.
    args, target = call.rows(torch.zeros(1, dtype=torch.int64, device=images.device))

    def forward(trial: int, image: Tensor) -> None:
        nonlocal problem
        mode.start(trial)
        with torch.no_grad(), mode:
            output = run_model(forward_func, image, args)
        if not mode.is_complete:
            problem = "it does not run the same attention each time"
        outputs.append(comparable_output(output, target, 1))

    try:
        first = images[:1].clone()
        mode.products = _ProductCounter(first)
        with nullcontext() if is_quiet(forward_func) else watch, mode.products:
            forward(0, first)
        products, mode.products = (mode.products.before, mode.products.count), None
        for index in range(1, len(trials)):
            watch.restore()  # every trial has to draw the same random numbers
            forward(index, images[index : index + 1])
    except UnsupportedModelError:
        raise
    except Exception as error:
        message = str(error).strip().partition("\n")[0]
        problem = f"with one image repeated it raises {type(error).__name__}: {message}"
    if problem is not None:
        keys = torch.zeros(len(map_index.layers), 0, layout.num_tokens)
        none = Tolerances(0.0, 0.0, 0.0)
        return Evidence(tuple(mode.modules), problem, (), keys, None, (0, 0), none)
    tolerances = _TOLERANCES.get(mode.dtype, _TOLERANCES_OF_HALF_TYPES)
    return Evidence(
        tuple(mode.modules), None, trials, mode.keys, _differences(outputs), products, tolerances
    )


def _trial_images(image: Tensor, trials: tuple[Trial, ...], grid_size: tuple[int, int]) -> Tensor:
    """(trials, C, H, W): the image, with noise of its own value range in each trial's cells."""
    images = image.repeat(len(trials), 1, 1, 1)
    low, high = image.amin(), image.amax()
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(image.shape, generator=generator).to(image)
    noise = low + noise * torch.where(high > low, high - low, 1)
    for index, trial in enumerate(trials):
        for cell in trial.cells:
            down, across = (
                slice(place * side // count, (place + 1) * side // count)
                for place, side, count in zip(
                    divmod(cell, grid_size[1]), image.shape[-2:], grid_size, strict=True
                )
            )
            images[index, :, down, across] = noise[:, down, across]
    return images


def comparable_output(output: Any, target: Tensor | None, count: int) -> Tensor | None:
    """An output as (count, C) on the CPU; of one with more than two dimensions, the target's value.

    None if the output is not a tensor with one row per image.
    """
    if not isinstance(output, Tensor) or output.dim() == 0 or output.shape[0] != count:
        return None
    if output.dim() > 2:
        if target is None:
            return None
        output = select_target(output, target, count)
    output = output.detach().reshape(count, -1)
    comparable: Tensor = output.to(torch.promote_types(output.dtype, torch.float32)).cpu()
    return comparable


def _differences(outputs: list[Tensor | None]) -> Tensor | None:
    """Differences to the first output, as a share of the largest value; None if one is missing."""
    present = [output for output in outputs if output is not None]
    if len(present) < len(outputs):
        return None
    stacked = torch.cat(present)
    size = stacked.abs().amax()
    return (stacked - stacked[:1]) / torch.where(size > 0, size, 1)
