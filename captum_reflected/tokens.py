"""What the tokens of a Vision Transformer stand for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeGuard, get_args

import torch
from torch import Tensor, nn

from captum_reflected.attention import UnsupportedModelError

Readout = Literal["class", "distilled", "mean"]

# More prefix tokens than any published model has (one class token and 16 registers);
# beyond it a guess would be a guess.
_MAX_PREFIX_TOKENS = 17


@dataclass(frozen=True)
class TokenLayout:
    """Where the image tokens are, and where the model reads its answer.

    Attributes:
        num_prefix_tokens: tokens before the image tokens: class, distillation, registers.
        grid_size: (gh, gw), rows and columns of the image tokens, in raster order.
        readout: the tokens that the classifier sees. ``"class"``: the first;
            ``"distilled"``: the mean of the first two (DeiT's class and distillation
            token); ``"mean"``: the mean of the image tokens. ``None``: ``"class"``
            where there is a prefix token, else ``"mean"``.

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
        if self.readout is None:
            object.__setattr__(self, "readout", "class" if self.num_prefix_tokens else "mean")
        if self.readout not in get_args(Readout):
            raise ValueError(
                f"readout is {self.readout!r}; wanted: None or {', '.join(get_args(Readout))}"
            )
        needed = {"class": 1, "distilled": 2, "mean": 0}[self.readout or "mean"]
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

    def readout_weights(self) -> Tensor:
        """Weights (N,) of the tokens in the model's answer, summing to one."""
        weights = torch.zeros(self.num_tokens)
        if self.readout == "mean":
            weights[self.num_prefix_tokens :] = 1 / self.num_image_tokens
        else:
            tokens = 2 if self.readout == "distilled" else 1
            weights[:tokens] = 1 / tokens
        return weights


def resolve_layout(
    told: TokenLayout | None,
    forward_func: Callable[..., Any],
    num_tokens: int,
    image_size: tuple[int, int],
) -> TokenLayout:
    """The token layout: told by the user, else asked of the model, else inferred.

    Args:
        told: the user's layout or ``None``.
        forward_func: asked where it is (or is a method of) a module; modules inside it
            that know their tokens (timm, torchvision) answer.
        num_tokens: N, as recorded.
        image_size: (H, W) of the inputs.

    Returns:
        TokenLayout: one whose number of tokens is N.

    Raises:
        ValueError: the told layout does not have N tokens, or nothing fits N.
    """
    if told is not None:
        if told.num_tokens != num_tokens:
            raise ValueError(
                f"token_layout has {told.num_prefix_tokens} prefix tokens and a "
                f"{told.grid_size[0]} x {told.grid_size[1]} grid, {told.num_tokens} tokens; "
                f"the attention maps of the model have {num_tokens}"
            )
        return told
    for layout in _answers(forward_func, image_size):
        if layout.num_tokens == num_tokens:
            return layout
    inferred = _infer(num_tokens, image_size)
    if inferred is None:
        raise ValueError(
            f"cannot tell which of the model's {num_tokens} tokens stand for which part of the "
            f"{image_size[0]} x {image_size[1]} image; wanted: token_layout=TokenLayout("
            "num_prefix_tokens, grid_size)"
        )
    return inferred


def _is_whole(number: object) -> TypeGuard[int]:
    return isinstance(number, int) and not isinstance(number, bool)


def _modules(forward_func: Callable[..., Any]) -> Iterator[nn.Module]:
    owner = forward_func
    if not isinstance(owner, nn.Module):
        owner = getattr(forward_func, "__self__", None)  # type: ignore[assignment]
    return owner.modules() if isinstance(owner, nn.Module) else iter(())


def _answers(
    forward_func: Callable[..., Any], image_size: tuple[int, int]
) -> Iterator[TokenLayout]:
    """The layouts that the modules inside ``forward_func`` state, by attribute."""
    for module in _modules(forward_func):
        embed = getattr(module, "patch_embed", None)
        prefix = getattr(module, "num_prefix_tokens", None)
        if embed is not None and _is_whole(prefix):  # timm
            readout = _timm_readout(module)
            # A wrapper may resize the image first, so the embedding's own grid counts too.
            for grid in (_feature_size(embed, image_size), getattr(embed, "grid_size", None)):
                if grid is not None:
                    yield TokenLayout(prefix, (int(grid[0]), int(grid[1])), readout)
        patch = getattr(module, "patch_size", None)
        if _is_whole(patch) and isinstance(getattr(module, "class_token", None), Tensor):
            yield TokenLayout(1, (image_size[0] // patch, image_size[1] // patch))  # torchvision


def _feature_size(embed: nn.Module, image_size: tuple[int, int]) -> tuple[int, int] | None:
    size = getattr(embed, "dynamic_feat_size", None)
    return None if size is None else size(image_size)


def _timm_readout(module: nn.Module) -> Readout | None:
    if hasattr(module, "head_dist"):
        return "distilled"
    pool = getattr(module, "global_pool", "token")
    if pool == "avg" and not getattr(module, "pool_include_prefix", False):
        return "mean"
    if pool in ("token", ""):
        return None
    raise UnsupportedModelError(
        f"the model reads its tokens out by {pool!r} pooling; known are 'token' and 'avg'. "
        "Say which tokens to read with token_layout=TokenLayout(..., readout=...)"
    )


def _infer(num_tokens: int, image_size: tuple[int, int]) -> TokenLayout | None:
    """The fewest prefix tokens that leave a grid of square patches of whole pixels."""
    height, width = image_size
    for prefix in range(min(_MAX_PREFIX_TOKENS, num_tokens - 1) + 1):
        for patch in range(1, min(height, width) + 1):
            rows, columns = height // patch, width // patch
            fits = height % patch == 0 and width % patch == 0
            if fits and prefix + rows * columns == num_tokens:
                return TokenLayout(prefix, (rows, columns))
    return None
