"""Compares variants of BalancedRelevance and MaskRegression, to choose between them.

``python tools/variants.py PHOTOS --weights FILE.safetensors`` explains the predicted classes of a
folder of photos by variants of the methods, and prints how they differ from TransformerAttribution
on the same photos. Deletion and insertion (from zero) have fewer steps than in a benchmark. For
choosing only: photos that a variant was chosen on cannot confirm it.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from captum_reflected import TransformerAttribution, score_masks
from captum_reflected.attention.layout import find_positions
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.benchmark.data import open_images
from captum_reflected.errors import UsageError
from captum_reflected.inputs.batch import make_batch, preserving_state
from captum_reflected.masking.components import (
    complementary_halves,
    component_masks,
    regression,
)
from captum_reflected.metrics import evaluate, mean_interval
from captum_reflected.models import load_model
from captum_reflected.relevance.residual_stream import stream_relevances

_PAIRS = 47
_METRICS = {
    "deletion": "Deletion ↓",
    "insertion": "Insertion from zero ↑",
    "average_drop": "Average drop ↓",
    "average_increase": "Average increase ↑",
}


class Parts(NamedTuple):
    """What the maps of one image are made of.

    Attributes:
        layers: (L, J), the relevance of the image tokens at the input of each block.
        masks: (1, 2 K, gh, gw), complementary halves, by falling variance of their components.
        scores: (1, 2 K), the target's probability for each half.
        logits: (1, 2 K), the target's logit for each half.
    """

    layers: Tensor
    masks: Tensor
    scores: Tensor
    logits: Tensor

    def relevance(self, first: int = 0) -> Tensor:
        """The mean over the blocks from one on, in units of its standard deviation."""
        mean = self.layers[first:].mean(dim=0)
        return mean / mean.std()

    def estimates(self, pairs: int, *, logits: bool = False) -> Tensor:
        """The regression on the first pairs of halves, in units of its prior."""
        count = self.masks.shape[1] // 2
        chosen = [*range(pairs), *range(count, count + pairs)]
        scores = self.logits if logits else self.scores
        weights, deviation = regression(self.masks[:, chosen], scores[:, chosen])
        return (weights / deviation)[0]

    def smooth(self, sigma: float) -> Tensor:
        """The relevance, averaged over neighbours by a Gaussian of this width in tokens."""
        rows, columns = self.masks.shape[-2:]
        places = torch.cartesian_prod(torch.arange(rows), torch.arange(columns)).float()
        kernel = (-torch.cdist(places, places).square() / (2 * sigma**2)).exp()
        smoothed = kernel / kernel.sum(dim=1, keepdim=True) @ self.relevance()
        return smoothed / smoothed.std()


VARIANTS: dict[str, Callable[[Parts], Tensor]] = {
    "mean over the blocks (BalancedRelevance)": lambda parts: parts.relevance(),
    "without the first block": lambda parts: parts.relevance(1),
    "last two thirds of the blocks": lambda parts: parts.relevance(len(parts.layers) // 3),
    "positive parts of the blocks": lambda parts: parts.layers.clamp(min=0).mean(dim=0),
    "smoothed over 0.4 tokens": lambda parts: parts.smooth(0.4),
    "smoothed over 0.7 tokens": lambda parts: parts.smooth(0.7),
    "17 pairs, by the prior (MaskRegression, 20)": lambda parts: (
        parts.relevance() + parts.estimates(17)
    ),
    "17 pairs, twice that weight": lambda parts: parts.relevance() + 2 * parts.estimates(17),
    "17 pairs, logits": lambda parts: parts.relevance() + parts.estimates(17, logits=True),
    "17 pairs, smoothed over 0.4 tokens": lambda parts: parts.smooth(0.4) + parts.estimates(17),
    "17 pairs, as a factor": lambda parts: parts.relevance() * parts.estimates(17).exp(),
    "8 pairs": lambda parts: parts.relevance() + parts.estimates(8),
    "47 pairs (MaskRegression, 50)": lambda parts: parts.relevance() + parts.estimates(47),
    "47 pairs alone": lambda parts: parts.estimates(47),
}


def parts_of(model: nn.Module, image: Tensor, target: int) -> tuple[Parts, TokenLayout]:
    """The parts of the maps of an image (1, C, H, W)."""
    with preserving_state(make_batch(image, target, None), gradients=True) as call:
        found = stream_relevances(model, call)
        layout = find_positions(model, call, None, found.map_index)
    tokens = slice(layout.num_prefix_tokens, None)
    features = [nn.functional.layer_norm(z[:, tokens], z.shape[-1:]) for z in found.inputs]
    with torch.no_grad():
        masks = complementary_halves(component_masks(features, layout.grid_size, _PAIRS))
    scores, logits = (
        score_masks(model, image, masks, target, score=score, drop_hidden=True)
        for score in ("probability", "logit")
    )
    return Parts(torch.cat(found.layers)[:, tokens].detach(), masks, scores, logits), layout


def main(arguments: Sequence[str] | None = None) -> int:
    """The command."""
    parser = argparse.ArgumentParser(
        prog="python tools/variants.py", description="Compares variants of the methods."
    )
    parser.add_argument("photos", type=Path, help="a folder of photos for choosing")
    parser.add_argument("--model", default="deit_tiny_patch16_224")
    parser.add_argument("--weights", type=Path, metavar="FILE.safetensors")
    parser.add_argument("--every", type=int, default=10, metavar="N", help="each N-th photo")
    parser.add_argument("--steps", type=int, default=12, metavar="N", help="of each curve")
    given = parser.parse_args(arguments)
    try:
        loaded = load_model(given.model, weights=given.weights)
        photos = open_images(str(given.photos), loaded)
    except UsageError as error:
        print(f"captum-reflected: {error}", file=sys.stderr)
        return 2
    scores: dict[str, list[Tensor]] = {}
    for index in tqdm(range(0, len(photos.files), given.every), disable=None):
        image = loaded.transform(photos.read(index)[0])[None]
        with torch.no_grad():
            target = int(loaded.model(image).argmax())
        parts, layout = parts_of(loaded.model, image, target)
        maps = {
            "TransformerAttribution": TransformerAttribution(loaded.model).attribute(image, target)
        }
        for name, variant in VARIANTS.items():
            grid = variant(parts).view(1, 1, *layout.grid_size)
            maps[name] = nn.functional.interpolate(grid, image.shape[-2:], mode="bilinear")
        for name, heat in maps.items():
            result = evaluate(
                loaded.model,
                image,
                heat,
                target=target,
                insertion_baselines=0.0,
                pixels_per_step=-(-image[0, 0].numel() // given.steps),
            )
            found = torch.stack([getattr(result, metric)[0] for metric in _METRICS])
            scores.setdefault(name, []).append(found)
    base = torch.stack(scores["TransformerAttribution"])
    print(f"{given.model}, {len(base)} photos; difference to TransformerAttribution, in percent\n")
    print(f"| Variant | {' | '.join(_METRICS.values())} |")
    print("| --- |" + " ---: |" * len(_METRICS))
    for name in VARIANTS:
        differences = 100 * (torch.stack(scores[name]) - base)
        cells = [mean_interval(column) for column in differences.T]
        row = " | ".join(f"{cell.mean:+.2f} ± {cell.half_width:.2f}" for cell in cells)
        print(f"| {name} | {row} |")
    return 0


if __name__ == "__main__":
    sys.exit(main())
