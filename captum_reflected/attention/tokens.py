"""The token layout of a Vision Transformer: what each token represents."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from captum_reflected.attention.shapes import MAX_PREFIX_TOKENS
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.modules import modules_of

Readout = Literal["class", "distilled", "mean", "class_mean", "all", "attention"]

# A class token and 8 registers; models with more state their number.
_MAX_INFERRED_PREFIX_TOKENS = 9

_NEEDED_PREFIX_TOKENS = {"class": 1, "distilled": 2, "class_mean": 1}


@dataclass(frozen=True)
class TokenLayout:
    """The positions of the image tokens, and the tokens that the output is read from.

    Attributes:
        num_prefix_tokens: number of tokens before the image tokens: class token, distillation
            token, registers.
        grid_size: (gh, gw), rows and columns of the image tokens, in raster order.
        readout: the tokens that the classification head receives. The map is the average of
            their rows of the relevance matrix R, weighted by w. ``"class"``: the first token;
            ``"distilled"``: the mean of the first two (DeiT's class and distillation token);
            ``"mean"``: the mean of the image tokens; ``"class_mean"``: the first token
            concatenated with the mean of the image tokens (DINOv2's linear classifier);
            ``"all"``: the mean of all tokens; ``"attention"``: attention pooling (SigLIP) or
            class attention (CaiT), whose own relevance gives w; see
            :func:`captum_reflected.relevance.rollout.pooling_weights`. ``None``: inferred from
            the forward. If attention pools the tokens after the last layer, it is
            ``"attention"``; otherwise the readout that the model states, or the first of the
            others that includes every token which the last layer's relevance reaches.

    Raises:
        ValueError: a number is negative or not whole, or the readout needs more prefix tokens
            than there are.

    Examples::

        >>> TokenLayout(num_prefix_tokens=1, grid_size=(14, 14)).num_tokens
        197
    """

    num_prefix_tokens: int
    grid_size: tuple[int, int]
    readout: Readout | None = None

    def __post_init__(self) -> None:
        """Checks the attributes."""
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
                f"num_prefix_tokens is {self.num_prefix_tokens}; wanted: {needed} or more, which "
                f'readout "{self.readout}" needs'
            )

    @property
    def num_image_tokens(self) -> int:
        """J, the number of image tokens."""
        return self.grid_size[0] * self.grid_size[1]

    @property
    def num_tokens(self) -> int:
        """N, the number of prefix and image tokens together."""
        return self.num_prefix_tokens + self.num_image_tokens

    def readout_weights(self, dtype: torch.dtype = torch.float32) -> Tensor:
        """Weights w (N,) of the tokens in the model's output, summing to one.

        A readout of ``None`` counts as ``"class"`` if there is a prefix token, else as
        ``"mean"``.

        Raises:
            ValueError: the readout is ``"attention"``, whose weights depend on the forward.
        """
        readout = self.readout or ("class" if self.num_prefix_tokens else "mean")
        if readout == "attention":
            raise ValueError(
                'readout is "attention", whose weights depend on the attention maps; wanted: '
                "another readout"
            )
        weights = torch.zeros(self.num_tokens, dtype=dtype)
        if readout == "all":
            weights[:] = 1
        if readout in ("class", "distilled", "class_mean"):
            weights[: 2 if readout == "distilled" else 1] = 1
        if readout in ("mean", "class_mean"):
            weights[self.num_prefix_tokens :] = 1 / self.num_image_tokens
        return weights / weights.sum()


def resolve_layout(
    given_layout: TokenLayout | None,
    forward_func: Callable[..., Any],
    num_tokens: int,
    image_size: tuple[int, int],
) -> TokenLayout:
    """The token layout: given by the user, else read from the model's attributes, else inferred.

    Args:
        given_layout: the user's layout or ``None``.
        forward_func: if it is a module or contains modules, their patch and grid attributes
            (timm, torchvision, transformers, open_clip) are read.
        num_tokens: N, as recorded.
        image_size: (H, W) of the inputs.

    Returns:
        TokenLayout: a layout of N tokens. Its readout is the given one, or None.

    Raises:
        ValueError: the given layout does not have N tokens, no grid that the model states
            fits N, or the model states none and no layout can be inferred.
    """
    if given_layout is not None:
        if given_layout.num_tokens != num_tokens:
            rows, columns = given_layout.grid_size
            raise ValueError(
                f"token_layout has {given_layout.num_prefix_tokens} prefix tokens and a "
                f"{rows} x {columns} grid, {given_layout.num_tokens} tokens; the attention maps "
                f"of the model have {num_tokens}; wanted: a layout of that many tokens, or None"
            )
        return given_layout
    modules = modules_of(forward_func)
    grids = [grid for module in modules for grid in _stated_grids(module, image_size)]
    prefixes = {getattr(module, "num_prefix_tokens", None) for module in modules}
    layout = _best_fit(grids, prefixes, num_tokens) if grids else _infer(num_tokens, image_size)
    if layout is None and grids:
        sizes = sorted({grid for _, grid in grids})
        stated = " or ".join(f"{rows} x {columns}" for rows, columns in sizes)
        raise ValueError(
            f"the model states a grid of {stated} image tokens, and its attention maps have "
            f"{num_tokens} tokens, possibly because tokens are dropped (patch dropout in train "
            "mode, masked autoencoders) or merged; wanted: all tokens of the image, as in eval "
            "mode, or token_layout=TokenLayout(num_prefix_tokens, grid_size)"
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
    tokens_read: Tensor | None,
    pooled_keys: AbstractSet[int],
    *,
    is_exact: bool = True,
) -> TokenLayout:
    """The layout with its readout: given by the user, else found in the forward or the model.

    Tokens do not mix after the last layer, so the output is read from exactly those tokens that
    this layer's relevance reaches. A readout that lacks one of them is wrong, even if the model
    states it. A readout that the model does not state is also wrong if it includes other tokens.

    Args:
        layout: from :func:`resolve_layout`.
        forward_func: if it is a module or contains modules, their pooling attributes are read.
        tokens_read: (N,), true for the tokens that the output is read from after the last layer.
            ``None`` if not known: the readout is then the stated one, or the first that the
            layout allows.
        pooled_keys: numbers of keys M of attention pooling; empty if there is none.
        is_exact: whether ``tokens_read`` is complete; in float16, some tokens are lost.

    Returns:
        TokenLayout: with a readout.

    Raises:
        UnsupportedModelError: attention pooling reads other tokens, no known readout fits the
            tokens read, or the model uses max pooling.
        ValueError: the given readout is ``"attention"`` and there is no attention pooling.
    """
    if layout.readout == "attention" and not pooled_keys:
        raise ValueError(
            'readout is "attention", and forward_func runs no attention that pools the tokens '
            "after its last layer of self-attention; wanted: another readout, or None"
        )
    if layout.readout not in (None, "attention"):
        return layout
    if pooled_keys:
        between = range(layout.num_image_tokens + 1, layout.num_tokens)
        if min(pooled_keys) < layout.num_image_tokens or pooled_keys & {*between}:
            raise UnsupportedModelError(
                f"attention pools {sorted(pooled_keys)} tokens into the output; wanted: all "
                f"{layout.num_tokens}, or the {layout.num_image_tokens} image tokens"
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
    if tokens_read is None:
        return replace(layout, readout=stated or allowed[0])
    is_read = tokens_read.cpu()
    if stated and not (is_read & (_weights(layout, stated) == 0)).any():
        return replace(layout, readout=stated)
    # Never empty, since "all" always fits.
    fitting = [name for name in allowed if not (is_read & (_weights(layout, name) == 0)).any()]
    exact = [name for name in fitting if not ((_weights(layout, name) > 0) & ~is_read).any()]
    if not exact and is_exact and bool(is_read.any()):
        raise UnsupportedModelError(
            f"the output is read from tokens {_format_ranges(is_read)}, and of the model's "
            f"{layout.num_tokens} tokens the first {layout.num_prefix_tokens} would be prefix "
            "tokens; wanted: class and register tokens first, then the image tokens. Otherwise "
            "pass the readout with token_layout=TokenLayout(..., readout=...)"
        )
    return replace(layout, readout=(exact or fitting)[0])


def _weights(layout: TokenLayout, readout: Readout) -> Tensor:
    return replace(layout, readout=readout).readout_weights()


def _format_ranges(mask: Tensor) -> str:
    """The indices of the true values, such as ``0, 4-199``."""
    indices = mask.nonzero().flatten().tolist()
    starts = [index for index in indices if index - 1 not in set(indices)]
    ends = [index for index in indices if index + 1 not in set(indices)]
    return ", ".join(
        str(first) if first == last else f"{first}-{last}"
        for first, last in zip(starts, ends, strict=True)
    )


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)


def _best_fit(
    grids: Sequence[tuple[bool, tuple[int, int]]], prefixes: set[Any], num_tokens: int
) -> TokenLayout | None:
    """The best of the stated grids; None if none fits the number of tokens.

    Prefers a grid that leaves the stated number of prefix tokens, then the fewest prefix tokens,
    then the grid of this image size over that of the model's native size.
    """
    fitting = []
    for is_native, grid in grids:
        prefix = num_tokens - grid[0] * grid[1]
        if 0 <= prefix <= MAX_PREFIX_TOKENS and min(grid) > 0:
            fitting.append((prefix not in prefixes, prefix, is_native, grid))
    if not fitting:
        return None
    _, prefix, _, grid = min(fitting)
    return TokenLayout(prefix, grid)


def _stated_grids(
    module: nn.Module, image_size: tuple[int, int]
) -> Iterator[tuple[bool, tuple[int, int]]]:
    """The token grids that a module states, each with whether it is for the native image size."""
    config = getattr(module, "config", None)  # transformers
    dynamic = getattr(module, "dynamic_feat_size", None)  # timm
    if callable(dynamic):
        rows, columns = dynamic(image_size)
        yield False, (int(rows), int(columns))
    if grid := _pair(getattr(module, "grid_size", None)):  # timm, open_clip
        yield True, grid
    native_size = _pair(getattr(config or module, "image_size", None))
    for owner in (module, config):  # torchvision and timm, transformers
        if patch := _pair(getattr(owner, "patch_size", None)):
            yield False, (image_size[0] // patch[0], image_size[1] // patch[1])
            if native_size:
                yield True, (native_size[0] // patch[0], native_size[1] // patch[1])


def _pair(value: object) -> tuple[int, int] | None:
    """Two positive integers from one integer or a pair of them; None for anything else."""
    pair = (value, value) if _is_whole(value) else value
    if isinstance(pair, (tuple, list)) and len(pair) == 2:
        first, second = pair
        if _is_whole(first) and _is_whole(second) and first > 0 and second > 0:
            return first, second
    return None


def stated_readout(forward_func: Callable[..., Any]) -> Readout | None:
    """The readout that a timm model states by its pooling attributes; None if it states none."""
    for module in modules_of(forward_func):
        pool = getattr(module, "global_pool", None)
        if not isinstance(pool, str):
            continue
        if hasattr(module, "head_dist"):
            return "distilled"
        if "max" in pool:
            raise UnsupportedModelError(
                f"the model reads its tokens out by {pool!r} pooling, in which every channel may "
                "come from another token; wanted: a readout with one weight per token. If one is "
                "close enough, pass it with token_layout=TokenLayout(..., readout=...)"
            )
        if pool == "avg":
            return "all" if getattr(module, "pool_include_prefix", False) else "mean"
    return None


def _infer(num_tokens: int, image_size: tuple[int, int]) -> TokenLayout | None:
    """Infers the layout with the fewest prefix tokens whose patches are squares of whole pixels.

    None if a square token grid would fit a non-square image with fewer prefix tokens: the
    forward may resize its images then.
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
