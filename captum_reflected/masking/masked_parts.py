"""A copy of a model that applies masks to the projected patches of its images."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from captum_reflected.inputs.outputs import logits_of
from captum_reflected.masking.model_structure import named_children_of
from captum_reflected.masking.module_copies import exchange, tuned
from captum_reflected.masking.token_dropping import selection_place


class MaskedForward:
    """The forward of masked images, on a copy of the model.

    Args:
        model: the model; it is not changed.
        places: dotted names of the patch projection and of the blocks.
        projection: replaces the model's patch projection.
        read: number of first tokens that the last block computes; None: all.
        bf16: whether the blocks compute in bfloat16.
        drop_hidden: whether tokens can be left out; see :meth:`show`.
    """

    def __init__(
        self,
        model: nn.Module,
        places: tuple[str, str],
        projection: MaskedProjection,
        *,
        read: int | None,
        bf16: bool,
        drop_hidden: bool,
    ) -> None:
        projection_name, blocks_name = places
        self._projection = projection
        self._selection: _TokenSelection | None = None
        parts: dict[str, nn.Module] = {projection_name: projection}
        if drop_hidden:
            self._selection = _TokenSelection(projection.cells)
            place = selection_place(model)
            assert place is not None  # drop_hidden is for models whose tokens can be left out
            parts[place] = self._selection
        blocks = named_children_of(model, blocks_name)
        for name, block in blocks.items():
            is_last = name == next(reversed(blocks))
            if is_last and read is not None:
                block = _ReadOutBlock(block, read)
            block = tuned(
                block,
                on_cpu=projection.images.device.type == "cpu",
                bf16=bf16,
                num_tokens=projection.cells,
            )
            parts[f"{blocks_name}.{name}"] = _InBf16(block, is_last=is_last) if bf16 else block
        self._model = exchange(model, parts)

    def __call__(self, image: Tensor, masks: Tensor) -> Any:
        """The model's output for the images of these indices (R,) under masks (R, gh, gw)."""
        self._projection.image, self._projection.masks = image, masks
        if self._selection is not None:
            self._selection.choose(masks)
        # No module should read these pixels. If one does, the output becomes NaN.
        dummy = masks.new_full((), math.nan).expand(len(masks), *self._projection.images.shape[1:])
        return logits_of(self._model(dummy))

    def show(self, tokens: int | None) -> None:
        """Sets how many image tokens, those with the highest mask values, are kept; None: all."""
        if self._selection is not None:
            self._selection.num_kept = self._projection.cells if tokens is None else tokens


class MaskedProjection(nn.Module):
    """Replaces the patch projection: applies masks to the projected images and baselines.

    Args:
        project: the model's patch projection.
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
            project(pixels).permute(0, 2, 3, 1).contiguous() for pixels in (images, baselines)
        )
        if shown.shape[1:3] != grid_size:
            raise ValueError("patches are not projected on this grid")
        self.images, self.cells = images, grid_size[0] * grid_size[1]
        self._hidden, self._difference = hidden, shown - hidden
        self.weight = project.weight  # the models of transformers look at its dtype

    def forward(self, _: Tensor) -> Tensor:
        """(R, D, gh, gw), like the output of the projection."""
        hidden = self._hidden if len(self._hidden) == 1 else self._hidden[self.image]
        tokens = torch.addcmul(hidden, self._difference[self.image], self.masks.unsqueeze(-1))
        return tokens.permute(0, 3, 1, 2)


class _TokenSelection(nn.Module):
    """Keeps the prefix tokens and the image tokens with the highest mask values.

    Attributes:
        num_kept: number of image tokens to keep; initially all.
    """

    _chosen: Tensor

    def __init__(self, cells: int) -> None:
        super().__init__()
        self.eval()
        self._cells = self.num_kept = cells

    def choose(self, masks: Tensor) -> None:
        """Selects the tokens for the next forward by its masks (R, gh, gw)."""
        order = masks.flatten(1).argsort(dim=1, descending=True, stable=True)
        # In this order, so that a test run on random masks also shows whether the order matters.
        self._chosen = order[:, : self.num_kept]

    def forward(self, tokens: Tensor) -> Tensor:
        """From (R, p + J, D) to (R, p + num_kept, D)."""
        prefix, cells = tokens.split((tokens.shape[1] - self._cells, self._cells), dim=1)
        index = self._chosen.unsqueeze(-1).expand(-1, -1, tokens.shape[-1])
        return torch.cat([prefix, cells.gather(1, index)], dim=1)


class _ReadOutBlock(nn.Module):
    """A ``Block`` of timm that computes only the first tokens; they attend to all tokens.

    Args:
        block: the block whose submodules are used.
        read: number of tokens to compute.
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
    """A block that computes in bfloat16; the last one returns float32 for the layers after it."""

    def __init__(self, block: nn.Module, *, is_last: bool) -> None:
        super().__init__()
        self.eval()
        self._block = block
        self._is_last = is_last

    def forward(self, tokens: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Runs the block with its own arguments."""
        # An attention bias has to have the dtype of the queries; rotary embeddings need not.
        kwargs = {
            name: value.to(torch.bfloat16) if name.startswith("shared_rel_pos") else value
            for name, value in kwargs.items()
            if value is not None
        }
        output = self._block(tokens.to(torch.bfloat16), *args, **kwargs)
        if isinstance(output, tuple):  # of one, in old versions of transformers
            (tokens,) = output
            return (tokens.float() if self._is_last else tokens,)
        return output.float() if self._is_last else output
