"""What the tokens of a Vision Transformer stand for."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from captum_reflected._modules import modules_of
from captum_reflected.attention import MAX_PREFIX_TOKENS, UnsupportedModelError

Readout = Literal["class", "distilled", "mean", "class_mean", "all", "attention"]

# A class token and 8 registers; models with more say so.
_MAX_INFERRED_PREFIX_TOKENS = 9

_NEEDED_PREFIX_TOKENS = {"class": 1, "distilled": 2, "class_mean": 1}


@dataclass(frozen=True)
class TokenLayout:
    """Where the image tokens are, and where the model reads its answer.

    Attributes:
        num_prefix_tokens: tokens before the image tokens: class, distillation, registers.
        grid_size: (gh, gw), rows and columns of the image tokens, in raster order.
        readout: the tokens that the classifier sees; their rows of the relevance matrix R,
            weighted by w, are the map. ``"class"``: the first; ``"distilled"``: the mean of
            the first two (DeiT's class and distillation token); ``"mean"``: the mean of
            the image tokens; ``"class_mean"``: the first, and beside it the mean of the
            image tokens (DINOv2's linear classifier); ``"all"``: the mean of all tokens;
            ``"attention"``: attention pooling (SigLIP) or class attention (CaiT), whose
            own relevance gives w; see :func:`captum_reflected.relevance.pooling_weights`.
            ``None``: found in the forward. Attention after the last layer is
            ``"attention"``; else it is what the model states, or the first of the others
            that holds every token which the last layer's relevance reaches.

    Raises:
        ValueError: a number is negative, not whole, or the readout needs tokens that are
            not there.

    Examples::

        >>> TokenLayout(num_prefix_tokens=1, grid_size=(14, 14)).num_tokens
        197
    """

    num_prefix_tokens: int
    grid_size: tuple[int, int]
    readout: Readout | None = None

    def __post_init__(self) -> None:
        """Checks the numbers."""
        if not _is_whole(self.num_prefix_tokens) or self.num_prefix_tokens < 0:
            raise ValueError(
                f"num_prefix_tokens is {self.num_prefix_tokens!r}; wanted: a whole number from 0"
            )
        grid = self.grid_size
        if (
            not isinstance(grid, tuple)
            or len(grid) != 2
            or not all(_is_whole(side) and side > 0 for side in grid)
        ):
            raise ValueError(
                f"grid_size is {grid!r}; wanted: (rows, columns), two whole numbers of 1 or more"
            )
        if self.readout is not None and self.readout not in get_args(Readout):
            raise ValueError(
                f"readout is {self.readout!r}; wanted: None or {', '.join(get_args(Readout))}"
            )
        needed = _NEEDED_PREFIX_TOKENS.get(self.readout or "", 0)
        if self.num_prefix_tokens < needed:
            raise ValueError(
                f'readout "{self.readout}" needs {needed} prefix token(s), and '
                f"num_prefix_tokens is {self.num_prefix_tokens}"
            )

    @property
    def num_image_tokens(self) -> int:
        """J, the number of image tokens."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        """N, prefix and image tokens together."""
        return self.num_prefix_tokens + self.num_image_tokens

    def readout_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights w (N,) of the tokens in the model's answer, summing to one.

        ``None`` counts as ``"class"`` where there is a prefix token, else as ``"mean"``.

        Raises:
            ValueError: the readout is ``"attention"``, whose weights the forward gives.
        """
        readout = self.readout or ("class" if self.num_prefix_tokens else "mean")
        if readout == "attention":
            raise ValueError('the weights of readout "attention" are in the attention maps only')
        weights = torch.zeros(self.num_tokens, dtype=dtype)
        if readout == "all":
            weights[:] = 1
        if readout in ("class", "distilled", "class_mean"):
            weights[: 2 if readout == "distilled" else 1] = 1
        if readout in ("mean", "class_mean"):
            weights[self.num_prefix_tokens :] = 1 / self.num_image_tokens
        return weights / weights.sum()


def resolve_layout(
    told: TokenLayout | None,
    forward_func: Callable[..., Any],
    num_tokens: int,
    image_size: tuple[int, int],
) -> TokenLayout:
    """The token layout: told by the user, else asked of the model, else inferred.

    Args:
        told: the user's layout or ``None``.
        forward_func: asked where it is (or is a method of) a module; any module inside it
            that states its patches (timm, torchvision, transformers, open_clip) answers.
        num_tokens: N, as recorded.
        image_size: (H, W) of the inputs.

    Returns:
        TokenLayout: one whose number of tokens is N. Its readout is the told one.

    Raises:
        ValueError: the told layout does not have N tokens, no grid that the model states
            fits N, or none is stated and nothing fits.
    """
    if told is not None:
        if told.num_tokens != num_tokens:
            raise ValueError(
                f"token_layout has {told.num_prefix_tokens} prefix tokens and a "
                f"{told.grid_size[0]} x {told.grid_size[1]} grid, {told.num_tokens} tokens; "
                f"the attention maps of the model have {num_tokens}"
            )
        return told
    modules = modules_of(forward_func)
    grids = [answer for module in modules for answer in _grids(module, image_size)]
    prefixes = {getattr(module, "num_prefix_tokens", None) for module in modules}
    layout = _fit(grids, prefixes, num_tokens) if grids else _infer(num_tokens, image_size)
    if layout is None and grids:
        sizes = sorted({grid for _, grid in grids})
        stated = " or ".join(f"{rows} x {columns}" for rows, columns in sizes)
        raise ValueError(
            f"the model states a grid of {stated} image tokens, and its attention maps have "
            f"{num_tokens} tokens, as where tokens are dropped (patch dropout in train mode, "
            "masked autoencoders) or merged; wanted: all tokens of the image, as in eval mode, or "
            "token_layout=TokenLayout(num_prefix_tokens, grid_size)"
        )
    if layout is None:
        raise ValueError(
            f"cannot tell which of the model's {num_tokens} tokens stand for which part of the "
            f"{image_size[0]} x {image_size[1]} image; wanted: token_layout=TokenLayout("
            "num_prefix_tokens, grid_size)"
        )
    return layout


def resolve_readout(
    layout: TokenLayout,
    forward_func: Callable[..., Any],
    read: Tensor | None,
    pooled_keys: set[int],
    *,
    is_exact: bool = True,
) -> TokenLayout:
    """The layout with its readout: told, else seen in the forward or asked of the model.

    After the last layer every token stands for itself, so the tokens which the answer is
    read from are those that this layer's relevance reaches. A readout that misses one of
    them is not the model's, whatever the model states; nor is one that the model does not
    state and that reads others.

    Args:
        layout: from :func:`resolve_layout`.
        forward_func: asked where it is (or is a method of) a module.
        read: (N,), true where the answer is read from a token after the last layer. ``None``
            where nothing tells: the readout is then the stated one, else the first that the
            layout allows.
        pooled_keys: numbers of keys M of the attention that reads the answer out; empty
            where none does.
        is_exact: whether ``read`` holds all tokens that are read; float16 loses some.

    Returns:
        TokenLayout: with a readout.

    Raises:
        UnsupportedModelError: the attention reads other tokens, the tokens read are of no
            known readout, or the model pools by maxima.
        ValueError: the readout is told to be ``"attention"`` and none was seen.
    """
    if layout.readout == "attention" and not pooled_keys:
        raise ValueError(
            'the readout is told to be "attention", and forward_func runs no attention '
            "that reads the tokens out after its last layer of self-attention; wanted: another "
            "readout, or None"
        )
    if layout.readout not in (None, "attention"):
        return layout
    if pooled_keys:
        between = range(layout.num_image_tokens + 1, layout.num_tokens)
        if min(pooled_keys) < layout.num_image_tokens or pooled_keys & {*between}:
            raise UnsupportedModelError(
                f"the answer is read by attention out of {sorted(pooled_keys)} tokens; wanted: all "
                f"{layout.num_tokens}, or the {layout.num_image_tokens} that stand for the image"
            )
        return replace(layout, readout="attention")
    allowed: list[Readout] = [
        readout
        for readout in get_args(Readout)
        if readout != "attention"
        and layout.num_prefix_tokens >= _NEEDED_PREFIX_TOKENS.get(readout, 0)
    ]
    stated = stated_readout(forward_func)
    if stated not in allowed:  # a second head, and no token of its own (EfficientFormer)
        stated = None
    if read is None:
        return replace(layout, readout=stated or allowed[0])
    read = read.cpu()
    if stated and not (read & (_weights(layout, stated) == 0)).any():
        return replace(layout, readout=stated)
    # "all" always fits.
    fitting = [name for name in allowed if not (read & (_weights(layout, name) == 0)).any()]
    exact = [name for name in fitting if not ((_weights(layout, name) > 0) & ~read).any()]
    if not exact and is_exact and bool(read.any()):
        raise UnsupportedModelError(
            f"the answer is read out of tokens {_ranges(read)}, and of the model's "
            f"{layout.num_tokens} tokens the first {layout.num_prefix_tokens} would be prefix "
            "tokens; wanted: class and register tokens first, then the image tokens. Say how "
            "to read the answer out with token_layout=TokenLayout(..., readout=...)"
        )
    return replace(layout, readout=(exact or fitting)[0])


def _weights(layout: TokenLayout, readout: Readout) -> Tensor:
    return replace(layout, readout=readout).readout_weights()


def _ranges(read: Tensor) -> str:
    """The places that are true, as in ``0, 4-199``."""
    places = read.nonzero().flatten().tolist()
    starts = [place for place in places if place - 1 not in set(places)]
    ends = [place for place in places if place + 1 not in set(places)]
    return ", ".join(
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(starts, ends, strict=True)
    )


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)


def _fit(
    grids: Sequence[tuple[bool, tuple[int, int]]], prefixes: set[Any], num_tokens: int
) -> TokenLayout | None:
    """Of the stated grids the one that leaves as many prefix tokens as stated, else the fewest.

    Of two of these the one of this image rather than of the model's own size.
    """
    fitting = []
    for is_own, grid in grids:
        prefix = num_tokens - grid[0] * grid[1]
        if 0 <= prefix <= MAX_PREFIX_TOKENS and min(grid) > 0:
            fitting.append((prefix not in prefixes, prefix, is_own, grid))
    if not fitting:
        return None
    _, prefix, _, grid = min(fitting)
    return TokenLayout(prefix, grid)


def _grids(
    module: nn.Module, image_size: tuple[int, int]
) -> Iterator[tuple[bool, tuple[int, int]]]:
    """The token grids that a module states, and whether for its own image size or this one."""
    config = getattr(module, "config", None)  # transformers
    dynamic = getattr(module, "dynamic_feat_size", None)  # timm
    if callable(dynamic):
        rows, columns = dynamic(image_size)
        yield False, (int(rows), int(columns))
    if grid := _pair(getattr(module, "grid_size", None)):  # timm, open_clip
        yield True, grid
    own_size = _pair(getattr(config or module, "image_size", None))
    for owner in (module, config):  # torchvision and timm, transformers
        if patch := _pair(getattr(owner, "patch_size", None)):
            yield False, (image_size[0] // patch[0], image_size[1] // patch[1])
            if own_size:
                yield True, (own_size[0] // patch[0], own_size[1] // patch[1])


def _pair(value: object) -> tuple[int, int] | None:
    """Two whole numbers above 0, of one or of two of them."""
    pair = (value, value) if _is_whole(value) else value
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        first, second = pair
        if _is_whole(first) and _is_whole(second) and first > 0 and second > 0:
            return first, second
    return None


def stated_readout(forward_func: Callable[..., Any]) -> Readout | None:
    """How timm models say that they read their tokens out."""
    for module in modules_of(forward_func):
        pool = getattr(module, "global_pool", None)
        if not isinstance(pool, str):
            continue
        if hasattr(module, "head_dist"):
            return "distilled"
        if "max" in pool:
            raise UnsupportedModelError(
                f"the model reads its tokens out by {pool!r} pooling, in which every channel has "
                "its own token; wanted: a readout with one weight a token. Say which is near "
                "enough with token_layout=TokenLayout(..., readout=...)"
            )
        if pool == "avg":
            return "all" if getattr(module, "pool_include_prefix", False) else "mean"
    return None


def _infer(num_tokens: int, image_size: tuple[int, int]) -> TokenLayout | None:
    """The fewest prefix tokens that leave a grid of square patches of whole pixels.

    Nothing, where before that a square grid fits an image that is not square: the forward
    may resize its images.
    """
    height, width = image_size
    for prefix in range(min(_MAX_INFERRED_PREFIX_TOKENS, num_tokens - 1) + 1):
        image_tokens = num_tokens - prefix
        if height != width and image_tokens > 1 and math.isqrt(image_tokens) ** 2 == image_tokens:
            return None
        for patch in range(1, min(height, width) + 1):
            rows, columns = height // patch, width // patch
            fits = height % patch == 0 and width % patch == 0
            if fits and rows * columns == image_tokens:
                return TokenLayout(prefix, (rows, columns))
    return None
