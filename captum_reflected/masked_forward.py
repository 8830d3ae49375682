"""The forward of many masked versions of an image, for less than a forward each.

Exact, and only where it is known to be. A mask that is constant inside each patch passes
through the patch projection, which is linear: patch x seen through r, with b where the mask
is 0, is projected to r W x + (1 - r) W b + bias. One projection then serves all masks, and
masked images are never made. Where the answer is read out of the first tokens only, the
last block is computed for them alone.

The model's own code runs, on a copy that shares its tensors and has these two parts
exchanged. Everything that could make that differ from the model itself is looked for first:
hooks, overridden methods, training mode, autocast, a function mode, modules unknown here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping
from typing import Any, TypeGuard, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks

from captum_reflected._autocast import Autocast
from captum_reflected._exchange import exchange, tuned
from captum_reflected.reflection import highest_tokens

_TIMM = "timm.models."
_VIT = _TIMM + "vision_transformer.VisionTransformer"
_TORCHVISION = "torchvision.models.vision_transformer.VisionTransformer"
_DISTILLED = _TIMM + "deit.VisionTransformerDistilled"

# Models that use their images for the patch projection and nothing else: the methods by
# which they do, where the projection is, and where the blocks are.
_FAMILIES = {
    **{
        _TIMM + name: (("forward", "forward_features"), "patch_embed.proj", "blocks")
        for name in (
            "beit.Beit",
            "cait.Cait",
            "eva.Eva",
            "vision_transformer.VisionTransformer",
            "vision_transformer_relpos.VisionTransformerRelPos",
        )
    },
    _TORCHVISION: (
        ("forward", "_process_input"),
        "conv_proj",
        "encoder.layers",
    ),
}
# Where all tokens pass, between the embedding of their positions and the blocks, in models
# whose blocks do not ask how many tokens there are or where.
_PASSAGES = {_VIT: "patch_drop", _TORCHVISION: "encoder.dropout"}
_TORCHVISION_BLOCK = "torchvision.models.vision_transformer.EncoderBlock.forward"

_PATCH_EMBED = "timm.layers.patch_embed.PatchEmbed.forward"

# Modules that treat every token by itself.
_TOKEN_WISE = {
    f"{where}.{name}.forward"
    for where, names in {
        "torch.nn.modules.activation": ("GELU", "SiLU", "ReLU", "Tanh"),
        "torch.nn.modules.dropout": ("Dropout",),
        "torch.nn.modules.linear": ("Identity", "Linear"),
        "torch.nn.modules.normalization": ("LayerNorm", "RMSNorm"),
        "timm.layers.activations": ("GELU", "GELUTanh", "QuickGELU", "Swish"),
        "timm.layers.drop": ("DropPath",),
        "timm.layers.layer_scale": ("LayerScale",),
        "timm.layers.mlp": ("GluMlp", "Mlp", "SwiGLU"),
        "timm.layers.norm": ("LayerNorm", "LayerNormFp32", "RmsNorm", "RmsNormFp32"),
    }.items()
    for name in names
}


class MaskedForward:
    """A model's forward on images seen through masks of their patches.

    Args:
        model: the copy of the model, its projection exchanged.
        projection: what stands there.
        image_shape: (C, H, W).
        passage: what lets through only the tokens that a mask keeps; None where it keeps all.
    """

    def __init__(
        self,
        model: nn.Module,
        projection: _MaskedProjection,
        image_shape: torch.Size,
        passage: _Passage | None = None,
    ) -> None:
        self._model = model
        self._projection = projection
        self._image_shape = image_shape
        self._passage = passage

    def __call__(self, image: Tensor, masks: Tensor) -> Any:
        """What the model says of images (R,), by index, seen through masks (R, gh, gw)."""
        self._projection.image, self._projection.masks = image, masks
        if self._passage is not None:
            self._passage.choose(masks)
        # Nothing reads these pixels. If anything did, the answer would show it.
        unread = masks.new_full((), math.nan).expand(len(masks), *self._image_shape)
        return self._model(unread)


def masked_forward(
    forward_func: Callable[..., Any],
    images: Tensor,
    grid_size: tuple[int, int],
    baselines: Tensor | float,
    *,
    bf16: bool = False,
    keep: int | None = None,
) -> MaskedForward | None:
    """The fast forward of masked images, or ``None`` where it is not known to be exact.

    Args:
        forward_func: the model, or an :class:`Autocast` of it to bfloat16.
        images: (B, C, H, W).
        grid_size: (gh, gw), of the masks.
        baselines: as in :func:`captum_reflected.reflection.reflected_images`.
        bf16: whether the blocks compute in bfloat16.
        keep: how many image tokens, those where its mask is highest, each masked image has;
            the others are not fed to the blocks. None: all.

    Returns:
        MaskedForward or None: its answer is that of ``forward_func`` on the reflected
        images, up to rounding; with ``keep``, on sequences of fewer tokens.
    """
    if not (isinstance(forward_func, nn.Module) and _runs_as_written(forward_func, images)):
        return None
    if _is_in_bf16(forward_func):
        forward_func, bf16 = forward_func.model, True
    if images.dtype != torch.float32 and (bf16 or images.dtype != torch.float64):
        return None
    places = _places(forward_func)
    if places is None:
        return None
    where, blocks_are = places
    convolution = forward_func.get_submodule(where)
    if not _projects_patches(convolution, images, grid_size):
        return None
    projection = _MaskedProjection(cast(nn.Conv2d, convolution), images, baselines)
    parts: dict[str, nn.Module] = {where: projection}
    blocks = dict(forward_func.get_submodule(blocks_are).named_children())
    rows = _rows_read(forward_func)
    num_tokens = grid_size[0] * grid_size[1] if keep is None else keep
    passage = None
    if keep is not None:
        way = _way_through(forward_func, blocks)
        if way is None:
            return None
        passage = parts[way] = _Passage(keep, grid_size)
    for name, block in blocks.items():
        is_last = name == next(reversed(blocks))
        if is_last and rows is not None and _is_plain(block):
            block = _ReadOutBlock(block, rows)
        block = tuned(block, on_cpu=images.device.type == "cpu", bf16=bf16, num_tokens=num_tokens)
        parts[f"{blocks_are}.{name}"] = _InBf16(block, is_last=is_last) if bf16 else block
    return MaskedForward(exchange(forward_func, parts), projection, images.shape[1:], passage)


class _MaskedProjection(nn.Module):
    """In place of the patch projection: the projection of the images, seen through masks."""

    image: Tensor
    masks: Tensor

    def __init__(self, convolution: nn.Conv2d, images: Tensor, baselines: Tensor | float) -> None:
        super().__init__()
        self.eval()
        shown = _project(convolution, images)
        bias = 0.0 if convolution.bias is None else convolution.bias.detach()
        if not isinstance(baselines, Tensor) and baselines == 0:
            self._shown, self._hidden = shown, torch.zeros_like(shown[:1]) + bias
        else:
            if not isinstance(baselines, Tensor):
                baselines = torch.full_like(images[:1], baselines)
            hidden = _project(convolution, baselines)
            self._shown, self._hidden = shown - hidden, hidden + bias

    def forward(self, _: Tensor) -> Tensor:
        """(R, D, gh, gw), as of the convolution."""
        hidden = self._hidden if len(self._hidden) == 1 else self._hidden[self.image]
        tokens = torch.addcmul(hidden, self._shown[self.image], self.masks.unsqueeze(-1))
        return tokens.permute(0, 3, 1, 2)


def _project(convolution: nn.Conv2d, images: Tensor) -> Tensor:
    """(B, gh, gw, D), without the bias."""
    tokens = F.conv2d(images, convolution.weight.detach(), stride=convolution.stride)
    return tokens.permute(0, 2, 3, 1).contiguous()


class _Passage(nn.Module):
    """Lets the prefix tokens through, and of the image tokens those where a mask is highest."""

    _kept: Tensor

    def __init__(self, keep: int, grid_size: tuple[int, int]) -> None:
        super().__init__()
        self.eval()
        self._cells = grid_size[0] * grid_size[1]
        self._keep = min(keep, self._cells)

    def choose(self, masks: Tensor) -> None:
        """Takes the masks (R, gh, gw) of the next forward."""
        self._kept = highest_tokens(masks, self._keep)

    def forward(self, tokens: Tensor) -> Tensor:
        """From (R, p + J, D) to (R, p + keep, D)."""
        prefix, cells = tokens.split((tokens.shape[1] - self._cells, self._cells), dim=1)
        index = self._kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return torch.cat([prefix, cells.gather(1, index)], dim=1)


class _ReadOutBlock(nn.Module):
    """A plain block of timm for the first tokens only, which attend to all.

    Args:
        block: a ``Block`` with ``Attention``.
        rows: how many tokens.
    """

    def __init__(self, block: nn.Module, rows: int) -> None:
        super().__init__()
        self.eval()
        self._block = block
        self._rows = rows
        qkv, width = cast(Any, block).attn.qkv, cast(Any, block).attn.attn_dim
        self._query = _part_of(qkv, slice(None, width))
        self._key_value = _part_of(qkv, slice(width, None))

    def forward(self, tokens: Tensor) -> Tensor:
        """From (B, N, D) to (B, rows, D)."""
        block = cast(Any, self._block)
        normed, read = block.norm1(tokens), tokens[:, : self._rows]
        read = read + block.ls1(self._attend(block.attn, normed))
        return cast(Tensor, read + block.ls2(block.mlp(block.norm2(read))))

    def _attend(self, attention: Any, tokens: Tensor) -> Tensor:
        heads = (attention.num_heads, attention.head_dim)
        first = tokens[:, : self._rows]
        query = self._query(first).unflatten(2, heads).transpose(1, 2)
        key, value = self._key_value(tokens).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(
            attention.q_norm(query), attention.k_norm(key), value
        )
        attended = attention.norm(attended.transpose(1, 2).flatten(2))
        if attention.gate is not None:
            attended = attended * attention.gate(first).sigmoid()
        return cast(Tensor, attention.proj(attended))


def _part_of(linear: nn.Linear, rows: slice) -> nn.Linear:
    """The rows of a linear layer, their memory shared."""
    part = copy.copy(linear)
    part._parameters = {
        name: None if value is None else nn.Parameter(value.detach()[rows], requires_grad=False)
        for name, value in linear._parameters.items()
    }
    return part


class _InBf16(nn.Module):
    """A block that computes in bfloat16; the last one hands on what comes after in float32."""

    def __init__(self, block: nn.Module, *, is_last: bool) -> None:
        super().__init__()
        self.eval()
        self._block = block
        self._is_last = is_last

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """As of the block."""
        # A bias of the attention has to be of the queries' type; rotations need not.
        kwargs = {
            name: value.to(torch.bfloat16) if name.startswith("shared_rel_pos") else value
            for name, value in kwargs.items()
            if value is not None
        }
        output = self._block(tokens.to(torch.bfloat16), *args, **kwargs)
        return output.float() if self._is_last else output


def _is_in_bf16(model: nn.Module) -> TypeGuard[Autocast]:
    return type(model) is Autocast and model.dtype == torch.bfloat16


def _name(module: nn.Module, method: str = "forward") -> str:
    """Where a method of a module was written; empty if it was wrapped."""
    function = getattr(type(module), method, None)
    if hasattr(function, "__wrapped__"):
        return ""
    return f"{getattr(function, '__module__', '')}.{getattr(function, '__qualname__', '')}"


def _runs_as_written(model: nn.Module, images: Tensor) -> bool:
    """Whether nothing but the code of the model's classes decides what it computes."""
    if torch._C._len_torch_function_stack() or torch.is_autocast_enabled(images.device.type):
        return False
    if any(
        getattr(global_hooks, f"_global_{kind}_hooks", None)
        for kind in ("forward", "forward_pre", "backward", "backward_pre")
    ):
        return False
    return not any(
        module.training
        or module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or module._compiled_call_impl is not None
        or isinstance(module, torch.jit.ScriptModule)
        or any(
            callable(value) and hasattr(type(module), name) for name, value in vars(module).items()
        )
        for module in model.modules()
    )


def _places(model: nn.Module) -> tuple[str, str] | None:
    """Where a known model has its projection and its blocks."""
    for family, (methods, projection, blocks) in _FAMILIES.items():
        if all(_name(model, method) == f"{family}.{method}" for method in methods):
            embedding = getattr(model, "patch_embed", None)
            is_known = embedding is None or _name(embedding) == _PATCH_EMBED
            return (projection, blocks) if is_known else None
    return None


def blocks_of(model: nn.Module) -> list[nn.Module]:
    """The blocks of a known model, in forward order; none of one that is not known."""
    places = _places(model)
    return [] if places is None else list(model.get_submodule(places[1]).children())


def can_keep(forward_func: Callable[..., Any], images: Tensor) -> bool:
    """Whether some tokens of a model's sequences can be left out: known, and nothing interferes."""
    if not (isinstance(forward_func, nn.Module) and _runs_as_written(forward_func, images)):
        return False
    if _is_in_bf16(forward_func):
        forward_func = forward_func.model
    places = _places(forward_func)
    if places is None:
        return False
    blocks = dict(forward_func.get_submodule(places[1]).named_children())
    return _way_through(forward_func, blocks) is not None


def _way_through(model: nn.Module, blocks: Mapping[str, nn.Module]) -> str | None:
    """Where tokens can be left out of a model's sequences."""
    for family, way in _PASSAGES.items():
        if _name(model) != f"{family}.forward":
            continue
        is_known = all(
            _is_plain(block) if family == _VIT else _name(block) == _TORCHVISION_BLOCK
            for block in blocks.values()
        )
        return way if is_known and _is_token_wise(model.get_submodule(way)) else None
    return None


def _projects_patches(convolution: nn.Module, images: Tensor, grid_size: tuple[int, int]) -> bool:
    """Whether a module maps each patch of the images by itself, one a cell of the grid."""
    return (
        type(convolution) is nn.Conv2d
        and type(convolution.weight) is nn.Parameter
        and convolution.kernel_size == convolution.stride
        and convolution.padding in ((0, 0), "valid")
        and convolution.dilation == (1, 1)
        and convolution.groups == 1
        and convolution.in_channels == images.shape[1]
        and convolution.weight.dtype == images.dtype
        and convolution.weight.device == images.device
        and all(
            cells * side == size
            for cells, side, size in zip(
                grid_size, convolution.kernel_size, images.shape[-2:], strict=True
            )
        )
    )


def _rows_read(model: nn.Module) -> int | None:
    """How many of the first tokens the head reads after the blocks; ``None``: all, or unknown."""
    if not _is_token_wise(getattr(model, "norm", None)):
        return None
    if _name(model, "forward_head") == f"{_DISTILLED}.forward_head":
        return 2
    reads_first = (
        all(_name(model, method) == f"{_VIT}.{method}" for method in ("forward_head", "pool"))
        and getattr(model, "global_pool", None) == "token"
        and getattr(model, "attn_pool", None) is None
    )
    return 1 if reads_first else None


def _is_token_wise(module: nn.Module | None) -> bool:
    return module is not None and all(_name(part) in _TOKEN_WISE for part in module.modules())


def _is_plain(block: nn.Module) -> bool:
    """Whether a block is timm's plain one, of parts that :class:`_ReadOutBlock` knows."""
    attention = getattr(block, "attn", None)
    return (
        _name(block) == f"{_TIMM}vision_transformer.Block.forward"
        and attention is not None
        and _name(attention) == "timm.layers.attention.Attention.forward"
        and type(attention.qkv) is nn.Linear
        and all(_is_token_wise(part) for part in attention.children())
        and all(_is_token_wise(part) for name, part in block.named_children() if name != "attn")
    )
