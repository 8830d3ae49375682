"""Metric-Driven Attributions."""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_reflected.attr.reference_methods._shared import (
    Forward,
    block_outputs,
    probabilities,
)
from captum_reflected.attr.transformer_attribution import TransformerAttribution
from captum_reflected.inputs.random_state import random_state_kept

Curve = npt.NDArray[np.float64]

# The authors' settings: the most candidates of a step, the share of the probability at which the
# insertion ends, and the smallest and largest blur with the probability that it has to reach.
_CANDIDATES, _RECOVERED, _BLURS, _BLURRED = 28, 0.9, range(31, 104, 2), 0.01
# Added to the steps of the fitted curve, which are 0 where it is flat.
_TRIFLE = 1e-6


def metric_driven_maps(forward_func: Forward, images: Tensor, target: Tensor) -> Tensor:
    """MDA (Walker, Jha & Ewetz, *Metric-Driven Attributions*, ICLR 2025): (B, H, W).

    A greedy search orders the patches. Those that restore nine tenths of the target's probability
    soonest, inserted into the blurred image, come first. The others are inserted into a zero image
    such that the probability stays lowest, and the last of them is the next to be deleted. The
    magnitudes are the steps of a convex curve, fitted to the mean of the order's deletion and
    insertion curves, with more weight on early patches.

    Every step tries the next 28 patches of a given map; the authors take bidirectional attention
    for it, and TransformerAttribution stands in here. The maps are constant in every patch, so that
    they keep the order.

    Args:
        forward_func: a timm VisionTransformer.
        images: (B, C, H, W).
        target: (B,).
    """
    images = images.detach()
    with random_state_kept(forward_func), torch.no_grad():
        _, layout = block_outputs(forward_func, images)
        guide = TransformerAttribution(forward_func).attribute(images, target)[:, 0]
        guides = F.adaptive_avg_pool2d(guide, layout.grid_size).flatten(1)
        values = [
            _magnitudes(_Perturbed(forward_func, image, index, layout.grid_size), guide.cpu())
            for image, index, guide in zip(images, target.tolist(), guides, strict=True)
        ]
    grids = torch.stack(values).to(images.device).reshape(-1, 1, *layout.grid_size)
    return F.interpolate(grids, images.shape[-2:]).squeeze(1)


class _Perturbed:
    """The target's probabilities for an image of which some patches are shown.

    Args:
        forward_func: the model.
        image: (C, H, W).
        target: the index of the target.
        grid_size: (gh, gw), rows and columns of patches.
    """

    def __init__(
        self, forward_func: Forward, image: Tensor, target: int, grid_size: tuple[int, int]
    ) -> None:
        self._forward, self._image, self._target = forward_func, image, target
        self._grid_size = grid_size
        self.num_patches = grid_size[0] * grid_size[1]
        self.pixels_per_patch = image[0].numel() / self.num_patches
        self.zero = torch.zeros_like(image)
        self.whole = self._score(image[None]).item()
        self.blurred, self.lowest_blurred = self._enough_blur()

    def scores(self, fill: Tensor, shown: Tensor) -> Tensor:
        """Probabilities (R,), given which patches are shown, (R, J), and what hides the others."""
        grids = shown.reshape(-1, 1, *self._grid_size).float().to(fill.device)
        masks = F.interpolate(grids, fill.shape[-2:])
        return self._score(torch.where(masks > 0, self._image, fill))

    def _score(self, rows: Tensor) -> Tensor:
        return probabilities(self._forward, rows, self._target).cpu()

    def _enough_blur(self) -> tuple[Tensor, float]:
        for size in _BLURS:
            blurred = _blurred(self._image, size)
            score = self._score(blurred[None]).item()
            if score <= _BLURRED:
                break
        return blurred, score


def _magnitudes(perturbed: _Perturbed, guide: Tensor) -> Tensor:
    """The value of every patch (J,), float32."""
    count = perturbed.num_patches
    by_guide = guide.argsort(descending=True, stable=True).tolist()
    enough = _RECOVERED * abs(perturbed.whole - perturbed.lowest_blurred)
    first, inserted = _greedy(
        perturbed,
        perturbed.blurred,
        by_guide,
        highest=True,
        ends=lambda score: score - perturbed.lowest_blurred >= enough,
    )
    rest = [patch for patch in reversed(by_guide) if patch not in first]
    least, shown = _greedy(perturbed, perturbed.zero, rest, highest=False)
    order = first + least[::-1]

    # What the search has not scored: the insertion of the later patches and the deletion of the
    # earlier ones.
    step = torch.full((count,), count, dtype=torch.long)
    step[order] = torch.arange(count)
    ranks, steps = step[None], torch.arange(1, count + 1)[:, None]
    later = perturbed.scores(perturbed.blurred, ranks < steps[len(first) :])
    earlier = perturbed.scores(perturbed.zero, ranks >= steps[: len(first)])
    insertion = [perturbed.lowest_blurred, *inserted, *later.tolist()]
    # After the deletion of the first patches and of k others, those of `least` but k are shown.
    nothing = float(perturbed.scores(perturbed.zero, torch.zeros(1, count, dtype=torch.bool)))
    kept = [nothing, *shown]  # by the number of shown patches
    deletion = [perturbed.whole, *earlier.tolist(), *kept[: len(least)][::-1]]

    risen = np.maximum.accumulate(_normalised(insertion, perturbed.lowest_blurred, perturbed.whole))
    fallen = np.minimum.accumulate(_normalised(deletion, nothing, perturbed.whole))
    drops = _convex_fit(1 - (risen + 1 - fallen) / 2)
    drops = drops[:-1] - drops[1:]
    later_patches = np.arange(count - 1, -1, -1) / count
    # Without the trifle, patches where the curve is flat would lose their order.
    weights = (drops + _TRIFLE) * (1 / perturbed.pixels_per_patch + later_patches)
    values = torch.zeros(count)
    values[order] = torch.from_numpy(weights).float()
    return values


def _greedy(
    perturbed: _Perturbed,
    fill: Tensor,
    candidates: list[int],
    *,
    highest: bool,
    ends: Callable[[float], bool] = lambda score: False,
) -> tuple[list[int], list[float]]:
    """Inserts the candidates one by one, always the best of the next few.

    Returns:
        tuple[list[int], list[float]]: the patches in their order, and the score after each.
    """
    window = min(2 * math.isqrt(perturbed.num_patches), _CANDIDATES)
    left, chosen, scores = list(candidates), [], []
    shown = torch.zeros(perturbed.num_patches, dtype=torch.bool)
    while left:
        tried = torch.tensor(left[:window])
        trial = shown.repeat(len(tried), 1)
        trial[torch.arange(len(tried)), tried] = True
        found = perturbed.scores(fill, trial)
        best = int(found.argmax() if highest else found.argmin())
        patch = left.pop(best)
        shown[patch] = True
        chosen.append(patch)
        scores.append(float(found[best]))
        if ends(scores[-1]):
            break
    return chosen, scores


def _normalised(scores: list[float], low: float, high: float) -> Curve:
    span = max(abs(high - low), 1e-30)  # a probability may not depend on the image
    return np.clip((np.array(scores) - low) / span, 0, 1)


def _convex_fit(curve: Curve) -> Curve:
    """The nearest convex, decreasing curve with the same ends, by least squares; from (n + 1,)."""
    from scipy.optimize import nnls

    first, last = curve[0], curve[-1]
    if first <= last:
        return np.full_like(curve, last)
    # These curves are the mixtures of lines that fall from 1 to 0 at step 1, 2, ..., n.
    count = len(curve) - 1
    hinges = np.clip(1 - np.arange(count + 1)[:, None] / np.arange(1, count + 1), 0, None)
    # Shares that minimise |hinges @ shares - y| with a sum of 1 minimise |(hinges - y) @ shares|,
    # and so does, up to its length, the solution without that condition if the sum is one more row.
    y = (curve - last) / (first - last)
    rows = np.vstack([hinges - y[:, None], np.ones(count)])
    shares, _ = nnls(rows, np.append(np.zeros(count + 1), 1.0), maxiter=30 * count)
    fitted: Curve = last + (first - last) * (hinges @ (shares / shares.sum()))
    return fitted


def _blurred(image: Tensor, size: int) -> Tensor:
    """A (C, H, W) image blurred by a square kernel of this odd size and sigma, zeros outside."""
    from scipy.ndimage import gaussian_filter1d

    impulse = np.zeros(size)
    impulse[size // 2] = 1
    # As published: the Gaussian is reflected at the kernel's edges, so that it sums to 1.
    line = torch.from_numpy(gaussian_filter1d(impulse, size)).to(image)
    rows = F.conv2d(image[:, None], line.reshape(1, 1, 1, -1), padding=(0, size // 2))
    return F.conv2d(rows, line.reshape(1, 1, -1, 1), padding=(size // 2, 0))[:, 0]
