"""The forward of many masked versions of an image, for less than a forward each.

A mask that is constant inside each patch passes through the patch projection, which is linear:
a patch seen through r is projected to r times the patch's projection plus 1 - r times that of
the baseline. One projection then serves all masks, and masked images are never made. Where the
answer is read out of the first tokens only, the last block ends with them.

The model's own code runs, on a copy that shares its tensors and has these parts exchanged.
Whether that gives the model's answers is not guessed from its code but tried out: both forwards
answer a few random masks first, and where they differ the fast one is not used. What cannot be
tried out is leaving tokens out; for that, every part of the model has to be known.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import cache
from typing import Any, TypeGuard
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.nn.modules import module as global_hooks
from torch.nn.modules.linear import NonDynamicallyQuantizableLinear

from captum_reflected._captum import run_forward
from captum_reflected.inputs.chunks import in_chunks
from captum_reflected.inputs.request import Batch, default_rows_per_forward
from captum_reflected.masking.module_copies import exchange, tuned
from captum_reflected.masking.precision import Autocast
from captum_reflected.masking.reflection import highest_tokens, reflected_images

Forward = Callable[[Tensor, Tensor], Any]
"""From images (R,), by index, and masks (R, gh, gw) to the model's output for each."""

# Where models have the projection of their patches, and their blocks.
_PLACES = (("patch_embed.proj", "blocks"), ("conv_proj", "encoder.layers"))

# Up to this, a mismatch is rounding. The first is in units of the dtype's eps: in float32 it is
# 1e-3, while pretrained DeiT and every family of the tests stay below 4e-5, and a block left out or
# two blocks swapped make 0.02 to 60. A GPU may convolve in TF32: 0.03, emulated. Bfloat16 makes up
# to 0.35, and is tried on what was found right in float32, so that no wrong block hides in it.
_TOLERANCE, _TOLERANCE_OF_TF32, _TOLERANCE_OF_BF16 = 1e4, 0.1, 1.0
_LARGE = 0.1  # the user is told of a mismatch beyond this
_told: WeakSet[nn.Module] = WeakSet()


# timm and torchvision take seconds to import, and who explains another model needs neither.
@cache
def _known_parts() -> frozenset[type]:
    """All that a model may be made of whose tokens can be left out.

    Nothing here asks how many tokens there are, or where.
    """
    import timm.layers
    from timm.models import deit
    from timm.models import vision_transformer as timm_vit
    from torchvision.models import vision_transformer as torchvision_vit

    classes = {
        nn: (
            "Conv2d Dropout GELU Identity LayerNorm Linear MultiheadAttention ReLU RMSNorm "
            "Sequential SiLU Tanh"
        ),
        timm.layers: (
            "AttentionPoolLatent DropPath GELU GELUTanh GluMlp LayerNorm LayerNormFp32 "
            "LayerScale Mlp PatchEmbed QuickGELU RmsNorm RmsNormFp32 SwiGLU"
        ),
        timm_vit: "Attention Block LayerScale VisionTransformer",
        deit: "VisionTransformerDistilled",
        torchvision_vit: "Encoder EncoderBlock MLPBlock VisionTransformer",
    }
    # Not every version of timm has them all.
    found = (
        getattr(module, name, None) for module, names in classes.items() for name in names.split()
    )
    return frozenset(part for part in found if part is not None) | {NonDynamicallyQuantizableLinear}


@cache
def _passages() -> dict[type, str]:
    """Where all tokens pass, between the embedding of their positions and the blocks."""
    from timm.models.deit import VisionTransformerDistilled
    from timm.models.vision_transformer import VisionTransformer
    from torchvision.models import VisionTransformer as TorchvisionTransformer

    return {
        VisionTransformer: "patch_drop",
        VisionTransformerDistilled: "patch_drop",
        TorchvisionTransformer: "encoder.dropout",
    }


def plain_forward(
    forward_func: Callable[..., Any],
    batch: Batch,
    baselines: Tensor | float,
    *,
    bf16: bool = False,
) -> Forward:
    """The forward of masked images that are made.

    Args:
        forward_func: any function of the images.
        batch: the images, and further arguments.
        baselines: as in :func:`masked_forward`.
        bf16: whether it runs under autocast to bfloat16.
    """

    def forward(image: Tensor, masks: Tensor) -> Any:
        shown = baselines[image] if isinstance(baselines, Tensor) else baselines
        rows = reflected_images(batch.images[image], masks.unsqueeze(1), shown).squeeze(1)
        args, _ = batch.rows(image)
        with torch.autocast(rows.device.type, torch.bfloat16) if bf16 else nullcontext():
            return run_forward(forward_func, rows, args)

    return forward


def masked_forward(
    forward_func: Callable[..., Any],
    images: Tensor,
    grid_size: tuple[int, int],
    baselines: Tensor | float,
    *,
    bf16: bool = False,
    keep: int | None = None,
    forwards: int | None = None,
    rows: int | None = None,
) -> Forward | None:
    """The fast forward of masked images, or ``None`` where its answers are not the model's.

    Two random masks of an image go through both forwards. One image is tried for every 200
    forwards to come, which costs 4 rows in 200 (with bfloat16, which is tried after float32, 6),
    and at least one, the last of the batch: a larger share where few forwards are to come.

    Args:
        forward_func: the model, or an :class:`Autocast` of it to bfloat16.
        images: (B, C, H, W).
        grid_size: (gh, gw), of the masks.
        baselines: what stands where a mask is 0: a number, or a tensor shaped like ``images``.
        bf16: whether the blocks compute in bfloat16.
        keep: how many image tokens, those where its mask is highest, each masked image has;
            the others are not fed to the blocks. None: all.
        forwards: how many are to come; None: so many that all images are tried.
        rows: how many a forward may see; None: what suits the device.

    Returns:
        Forward or None: its answers are those of ``forward_func`` on the reflected images, up
        to rounding; with ``keep``, on sequences of fewer tokens.
    """
    if not (isinstance(forward_func, nn.Module) and _runs_as_written(forward_func, images)):
        return None
    model: nn.Module = forward_func
    if _is_in_bf16(model):
        model, bf16 = model.model, True
    if images.dtype != torch.float32 and (bf16 or images.dtype != torch.float64):
        return None
    places = _places(model)
    if places is None or (keep is not None and not can_keep(model, images)):
        return None
    # In float32 for bfloat16, too: the rounding of both together would hide more.
    plain = plain_forward(model, Batch(images, (), None, is_tuple=False), baselines)
    mismatch = math.nan
    with torch.no_grad():
        try:
            projection = _MaskedProjection(
                model.get_submodule(places[0]), images, grid_size, baselines
            )
            trial = _Trial(plain, images, grid_size, forwards, rows)
            for read in dict.fromkeys((_tokens_read(model, places[1]), None)):
                for half in (False, True) if bf16 else (False,):
                    fast = MaskedForward(model, places, projection, read=read, bf16=half, keep=keep)
                    mismatch = trial.mismatch(fast)
                    if not mismatch <= _tolerance(images, bf16=half):
                        break
                else:
                    fast.leave_out_tokens()
                    return fast
        except Exception:
            return None  # whatever it was, the plain forward is there
    if _LARGE < mismatch < math.inf and forward_func not in _told:
        _told.add(forward_func)
        warnings.warn(
            f"a faster forward of masked images was tried on this {type(forward_func).__name__}, "
            f"and its answers are off by {mismatch:.2g} of what a mask changes; the model itself "
            "runs on every masked image instead: the result is right, but takes longer",
            stacklevel=2,
        )
    return None


def _tolerance(images: Tensor, *, bf16: bool) -> float:
    if bf16:
        return _TOLERANCE_OF_BF16
    rounding = _TOLERANCE * torch.finfo(images.dtype).eps
    return rounding if images.device.type == "cpu" else max(rounding, _TOLERANCE_OF_TF32)


class MaskedForward:
    """A model's forward on images seen through masks of their patches, on a copy of the model.

    Args:
        model: left as it is.
        places: of the projection and of the blocks.
        projection: what stands in place of the model's.
        read: how many of the first tokens the last block ends with; None: all.
        bf16: whether the blocks compute in bfloat16.
        keep: how many image tokens to feed to the blocks, from :meth:`leave_out_tokens` on.
    """

    def __init__(
        self,
        model: nn.Module,
        places: tuple[str, str],
        projection: _MaskedProjection,
        *,
        read: int | None,
        bf16: bool,
        keep: int | None,
    ) -> None:
        where, blocks_are = places
        self._projection, self._keep = projection, keep
        self._passage: _Passage | None = None
        parts: dict[str, nn.Module] = {where: projection}
        if keep is not None:
            self._passage = parts[_passages()[type(model)]] = _Passage(projection.cells)
        blocks = _children(model, blocks_are)
        for name, block in blocks.items():
            is_last = name == next(reversed(blocks))
            if is_last and read is not None:
                block = _ReadOutBlock(block, read)
            block = tuned(
                block,
                on_cpu=projection.images.device.type == "cpu",
                bf16=bf16,
                num_tokens=projection.cells if keep is None else keep,
            )
            parts[f"{blocks_are}.{name}"] = _InBf16(block, is_last=is_last) if bf16 else block
        self._model = exchange(model, parts)

    def __call__(self, image: Tensor, masks: Tensor) -> Any:
        """What the model says of images (R,), by index, seen through masks (R, gh, gw)."""
        self._projection.image, self._projection.masks = image, masks
        if self._passage is not None:
            self._passage.choose(masks)
        # Nothing should read these pixels. If anything does, the answer shows it.
        unread = masks.new_full((), math.nan).expand(len(masks), *self._projection.images.shape[1:])
        return self._model(unread)

    def leave_out_tokens(self) -> None:
        """All but ``keep``, which is tried out with all of them."""
        if self._passage is not None and self._keep is not None:
            self._passage.keep = min(self._keep, self._passage.keep)


class _MaskedProjection(nn.Module):
    """In place of the patch projection: what it makes of the images, seen through masks.

    Args:
        project: the projection.
        images, grid_size, baselines: as in :func:`masked_forward`.
    """

    image: Tensor
    masks: Tensor

    def __init__(
        self,
        project: nn.Module,
        images: Tensor,
        grid_size: tuple[int, int],
        baselines: Tensor | float,
    ) -> None:
        super().__init__()
        self.eval()
        if not isinstance(baselines, Tensor):
            baselines = torch.full_like(images[:1], baselines)
        shown, hidden = (
            project(every).permute(0, 2, 3, 1).contiguous() for every in (images, baselines)
        )
        if shown.shape[1:3] != grid_size:
            raise ValueError("patches are not projected on this grid")
        self.images, self.cells = images, grid_size[0] * grid_size[1]
        self._hidden, self._difference = hidden, shown - hidden

    def forward(self, _: Tensor) -> Tensor:
        """(R, D, gh, gw), as of the projection."""
        hidden = self._hidden if len(self._hidden) == 1 else self._hidden[self.image]
        tokens = torch.addcmul(hidden, self._difference[self.image], self.masks.unsqueeze(-1))
        return tokens.permute(0, 3, 1, 2)


class _Passage(nn.Module):
    """Lets the prefix tokens through, and of the image tokens those where a mask is highest.

    Attributes:
        keep: how many of these; all, to begin with.
    """

    _kept: Tensor

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.eval()
        self._cells = self.keep = cells

    def choose(self, masks: Tensor) -> None:
        """Takes the masks (R, gh, gw) of the next forward."""
        self._kept = highest_tokens(masks, self.keep)

    def forward(self, tokens: Tensor) -> Tensor:
        """From (R, p + J, D) to (R, p + keep, D)."""
        prefix, cells = tokens.split((tokens.shape[1] - self._cells, self._cells), dim=1)
        index = self._kept.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return torch.cat([prefix, cells.gather(1, index)], dim=1)


class _ReadOutBlock(nn.Module):
    """A ``Block`` of timm that ends with the first tokens, which have attended to all.

    Args:
        block: all parts of it are used.
        read: how many tokens.
    """

    def __init__(self, block: nn.Module, read: int) -> None:
        super().__init__()
        self.eval()
        self._block = block
        self._read = read

    def forward(self, tokens: Tensor) -> Tensor:
        """From (B, N, D) to (B, read, D)."""
        block: Any = self._block
        attended = block.attn(block.norm1(tokens))[:, : self._read]
        read: Tensor = tokens[:, : self._read] + block.drop_path1(block.ls1(attended))
        read = read + block.drop_path2(block.ls2(block.mlp(block.norm2(read))))
        return read


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


class _Trial:
    """What a model says of two random masks of an image, for some of the images.

    Args:
        plain: the model's forward.
        images, grid_size, forwards, rows: as in :func:`masked_forward`.
    """

    def __init__(
        self,
        plain: Forward,
        images: Tensor,
        grid_size: tuple[int, int],
        forwards: int | None,
        rows: int | None,
    ) -> None:
        count = len(images)
        if forwards is not None:
            count = min(max(round(forwards / 200), 1), count)
        # The last image first: a forward that is right for the first one only has to be found out.
        index = torch.linspace(len(images) - 1, 0, count).round().long().repeat_interleave(2)
        masks = torch.rand(len(index), *grid_size, generator=torch.Generator().manual_seed(0)) ** 3
        masks[1::2] = 1 - masks[1::2]  # one dark, one bright: the more they change, the better
        self._image, self._masks = index.to(images.device), masks.to(images)
        self._rows = rows or default_rows_per_forward(images.device)
        self._expected = self._answers(plain)

    def mismatch(self, fast: Forward) -> float:
        """How far the fast forward is off.

        Returns:
            float: the largest difference in any output, in units of what the other mask of an
            image changes, root mean square over outputs. To that, 0.001 of the outputs is
            added, for models that masks change nothing for.
        """
        expected, given = self._expected, self._answers(fast)
        if (given.shape, given.dtype) != (expected.shape, expected.dtype):
            return math.inf
        expected, given = (
            every.double().reshape(-1, 2, every[0].numel()) for every in (expected, given)
        )
        change = (expected[:, 0] - expected[:, 1]).square().mean(dim=-1).sqrt()
        unit = change + 1e-3 * expected.abs().amax(dim=(1, 2))
        return float(((given - expected).abs().amax(dim=(1, 2)) / unit).max())

    def _answers(self, forward: Forward) -> Tensor:
        def run(start: int, stop: int) -> Tensor:
            output = forward(self._image[start:stop], self._masks[start:stop])
            if not isinstance(output, Tensor) or len(output) != stop - start:
                raise TypeError("there is no output for each image")
            return output

        return in_chunks(run, len(self._image), self._rows, description="", show_progress=False)


def _is_in_bf16(model: nn.Module) -> TypeGuard[Autocast]:
    return type(model) is Autocast and model.dtype == torch.bfloat16


def _runs_as_written(model: nn.Module, images: Tensor) -> bool:
    """Whether nothing but the code of the model's classes decides what it computes."""
    try:
        return not (
            torch._C._len_torch_function_stack()
            or torch.is_autocast_enabled(images.device.type)
            or global_hooks._global_forward_hooks
            or global_hooks._global_forward_pre_hooks
            or global_hooks._global_backward_hooks
            or global_hooks._global_backward_pre_hooks
            or any(_is_interfered_with(module) for module in model.modules())
        )
    except AttributeError:  # a version of torch that keeps one of these elsewhere
        return False


def _is_interfered_with(module: nn.Module) -> bool:
    return bool(
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
    )


def _places(model: nn.Module) -> tuple[str, str] | None:
    """Where a model has the projection of its patches, and where its blocks."""
    for projection, blocks in _PLACES:
        with suppress(AttributeError):
            model.get_submodule(blocks)
            project = model.get_submodule(projection)
            if isinstance(project, nn.Conv2d) and project.kernel_size == project.stride:
                return projection, blocks
    return None


def _children(model: nn.Module, where: str) -> dict[str, nn.Module]:
    """The children of a module by name, also those that are there twice."""
    children = model.get_submodule(where)._modules.items()
    return {name: child for name, child in children if child is not None}


def _tokens_read(model: nn.Module, blocks: str) -> int | None:
    """How many of the first tokens the answer may be read out of; ``None``: of all."""
    if getattr(model, "global_pool", None) != "token":
        return None
    from timm.models.vision_transformer import Block

    last = next(reversed(_children(model, blocks).values()), None)
    return getattr(model, "num_prefix_tokens", None) if type(last) is Block else None


def blocks_of(model: Any) -> list[nn.Module]:
    """The blocks of a model in forward order; none where they are not found."""
    places = _places(model) if isinstance(model, nn.Module) else None
    return [] if places is None else list(_children(model, places[1]).values())


def can_keep(forward_func: Callable[..., Any], images: Tensor) -> bool:
    """Whether some tokens of a model's sequences can be left out: every part of it is known."""
    if not (isinstance(forward_func, nn.Module) and _runs_as_written(forward_func, images)):
        return False
    model = forward_func.model if _is_in_bf16(forward_func) else forward_func
    if type(model) not in _passages():
        return False
    blocks = blocks_of(model)
    return (
        len(set(blocks)) == len(blocks)
        and type(model.get_submodule(_passages()[type(model)])) in (nn.Identity, nn.Dropout)
        and all(type(module) in _known_parts() for module in model.modules())
    )
