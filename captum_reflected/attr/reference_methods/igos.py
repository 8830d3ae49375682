"""iGOS++."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.attr.reference_methods._shared import Forward, block_outputs
from captum_reflected.inputs.chunks import default_rows_per_forward, in_chunks
from captum_reflected.inputs.outputs import logits_of
from captum_reflected.inputs.random_state import random_state_kept

# The authors' settings: weights of the two regularisers, noise on masked images, the width of the
# bilateral term, and the line search's first and smallest step, decay and demanded decrease.
_SPARSITY, _SMOOTHNESS, _NOISE, _BILATERAL = 1.0, 20.0, 0.2, 0.01
_FIRST_STEP, _LAST_STEP, _DECAY, _DECREASE = 1000.0, 1e-5, 0.2, 1e-4


def optimised_mask_maps(
    forward_func: Forward,
    images: Tensor,
    target: Tensor,
    *,
    iterations: int = 15,
    path_steps: int = 20,
) -> Tensor:
    """iGOS++ (Khorram, Lawson & Li, CHIL 2021): (B, H, W).

    Two masks over the image, 1 at first, blend it with its blurred version. Where the deletion
    mask is low, the image is blurred, and the target's probability has to fall; where the insertion
    mask is low, only there the image is shown, and it has to rise. The product of both has to do
    both, be close to 1 and be smooth where the image is smooth. The probability is the mean along
    a path from the fully perturbed image to the masked one, with noise. The map is 1 minus the
    product.

    Masks have the resolution of the patches; the authors' default is 28 x 28.

    Args:
        forward_func: a differentiable Vision Transformer.
        images: (B, C, H, W).
        target: (B,).
        iterations: steps of gradient descent with line search.
        path_steps: images on a path; a step runs 80 forwards and backwards of them, and at least
            160 more forwards, with the default.
    """
    images = images.detach()
    with random_state_kept(forward_func), torch.no_grad():
        _, layout = block_outputs(forward_func, images)
        maps = []
        for image, index in zip(images, target.tolist(), strict=True):
            objective = _Objective(forward_func, image, index, path_steps)
            masks = image.new_ones((2, *layout.grid_size), dtype=torch.float32)
            for _ in range(iterations):
                gradient = objective.gradient(masks)
                masks = _line_search(objective, masks, gradient)
            maps.append(1 - objective.enlarge(masks.prod(dim=0)))
    return torch.stack(maps)


class _Term(NamedTuple):
    """A mean probability along a path.

    Attributes:
        mask: (H, W).
        shown: what is shown where the mask is 1, (C, H, W).
        hidden: what is shown where it is 0.
        sign: 1 if the probability has to fall, -1 if it has to rise.
    """

    mask: Tensor
    shown: Tensor
    hidden: Tensor
    sign: int


class _Objective:
    """What two masks (2, gh, gw), of deletion and of insertion, minimise."""

    def __init__(self, forward_func: Forward, image: Tensor, target: int, steps: int) -> None:
        self._forward, self._target = forward_func, target
        self._image, self._blurred = image, _blurred(image)
        self._shares = torch.arange(1, steps + 1, device=image.device)[:, None, None] / steps
        self._generator = torch.Generator().manual_seed(0)

    def enlarge(self, mask: Tensor) -> Tensor:
        """A (gh, gw) mask as (H, W)."""
        size = self._image.shape[-2:]
        return F.interpolate(mask[None, None], size, mode="bilinear", align_corners=True)[0, 0]

    def value(self, masks: Tensor) -> float:
        """The objective, with new noise."""
        along = sum(
            float(term.sign * self._along_path(self._probabilities, term).mean()) / 2
            for term in self._terms(masks)
        )
        return along + float(self._regularisation(masks.prod(dim=0)))

    def gradient(self, masks: Tensor) -> Tensor:
        """Its integrated gradient with respect to the masks."""
        with torch.enable_grad():
            leaf = masks.detach().requires_grad_()
            # Has the gradient of the objective, which chunks of paths have computed already.
            surrogate = self._regularisation(leaf.prod(dim=0))
            for term in self._terms(leaf):
                slopes = self._along_path(self._slopes, term)
                slope = (self._shares * slopes).mean(dim=0)
                surrogate = surrogate + term.sign * (slope * term.mask).sum() / 2
            (gradient,) = torch.autograd.grad(surrogate, leaf)
        return gradient

    def _terms(self, masks: Tensor) -> Iterator[_Term]:
        deletion, insertion = (self.enlarge(mask) for mask in masks)
        yield _Term(deletion * insertion, self._image, self._blurred, 1)
        yield _Term(deletion * insertion, self._blurred, self._image, -1)
        yield _Term(deletion, self._image, self._blurred, 1)
        yield _Term(insertion, self._blurred, self._image, -1)

    def _along_path(self, function: Any, term: _Term) -> Tensor:
        """A function of images on the path, one result for each."""
        masks = self._shares * term.mask.detach()
        noise = _NOISE * torch.randn(
            (len(masks), *self._image.shape), generator=self._generator
        ).to(self._image)

        def run(start: int, stop: int) -> Tensor:
            found: Tensor = function(masks[start:stop], term, noise[start:stop])
            return found

        rows = default_rows_per_forward(self._image.device)
        return in_chunks(run, len(masks), rows, description="path", show_progress=False)

    def _probabilities(self, masks: Tensor, term: _Term, noise: Tensor) -> Tensor:
        masks = masks[:, None]
        rows = (term.shown * masks + term.hidden * (1 - masks) + noise).to(noise.dtype)
        logits: Tensor = logits_of(self._forward(rows))
        return logits.float().softmax(dim=-1)[:, self._target]

    def _slopes(self, masks: Tensor, term: _Term, noise: Tensor) -> Tensor:
        leaf = masks.detach().requires_grad_()
        (slopes,) = torch.autograd.grad(self._probabilities(leaf, term, noise).sum(), leaf)
        return slopes

    def _regularisation(self, mask: Tensor) -> Tensor:
        smoothness = (_variation(mask) + _variation(self.enlarge(mask), self._image)) / 2
        return _SPARSITY * (1 - mask).abs().mean() + _SMOOTHNESS * smoothness


def _variation(mask: Tensor, image: Tensor | None = None) -> Tensor:
    """Mean squared difference of neighbours (H, W), less counted at the edges of an image."""
    total = mask.new_zeros(())
    for dim in (-2, -1):
        squares = mask.diff(dim=dim).square()
        if image is not None:
            edges = image.diff(dim=dim).float().square()
            squares = squares * (-edges / _BILATERAL).exp().mean(dim=0)
        total = total + squares.mean()
    return total


def _line_search(objective: _Objective, masks: Tensor, gradient: Tensor) -> Tensor:
    """The masks after the first of ever smaller steps that decreases the objective enough."""
    start = objective.value(masks)
    slope = _DECREASE * float(gradient.square().sum())
    step = _FIRST_STEP
    while True:
        moved = (masks - step * gradient).clamp(0, 1)
        if objective.value(moved) <= start - step * slope or step < _LAST_STEP:
            return moved
        step *= _DECAY


def _blurred(image: Tensor) -> Tensor:
    """The image under a Gaussian of 51 pixels and sigma 50, smaller for an image of fewer."""
    from torchvision.transforms.functional import gaussian_blur

    size = min(51, 2 * min(image.shape[-2:]) - 1)
    blurred: Tensor = gaussian_blur(image, [size, size], [50.0, 50.0])
    return blurred
