"""Verifies the assumptions behind a map by running the model.

R is computed from the recorded attention, and the layout maps tokens to parts of the image.
Both are checked. A few forwards of one image, in which every recorded attention map is replaced
by one that mixes no tokens (the identity), detect:

- **Mixing that was not recorded.** Without attention, no token may depend on another. The
  output read from a class token must then be the same for every image, and changing one token
  must not change the keys of any other, in any layer. If the output is pooled over the image
  tokens, no product of two tensors that depend on the image may come before the first recorded
  layer or after the last.
- **The positions of the tokens.** The pixels of one grid cell are changed: the key of this
  cell's token has to change most.
- **Which tokens the output is read from**, if no gradient shows it: those whose change in the
  last layer changes the output.
- **Whether images are the first dimension** of the maps: these forwards have another batch size
  than the recorded call.

The documentation lists what these checks cannot detect ("What is checked, and what is not").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_reflected.attention.evidence import Evidence
from captum_reflected.attention.experiments import comparable_output
from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.recording import MapIndex
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch
from captum_reflected.inputs.outputs import run_model


def check_layout(evidence: Evidence, layout: TokenLayout, given_layout: TokenLayout | None) -> None:
    """Raises if the model contradicts the layout; only warns if the caller gave the layout.

    Raises:
        UnsupportedModelError: the tokens are not where the layout expects them.
    """
    if evidence.problem is not None:
        _warn(
            "the assumptions behind the map could not be checked, because forward_func cannot be "
            f"run with replaced attention: {evidence.problem}. If it runs nothing but a Vision "
            "Transformer, the map is right"
        )
        return
    problem = evidence.misplaced(layout)
    if problem is None:
        return
    if given_layout is not None:
        _warn(
            f"token_layout has {layout.num_prefix_tokens} prefix tokens, but {problem}: the map "
            "is misaligned with the image, unless forward_func moves the image on purpose"
        )
        return
    raise UnsupportedModelError(
        f"the {layout.num_tokens} tokens are not {layout.num_prefix_tokens} prefix tokens and then "
        f"the image in raster order: {problem}; wanted: class and register tokens first, and a "
        "forward_func that does not flip, transpose or crop its images. If another order is "
        "intended, pass token_layout=TokenLayout(num_prefix_tokens, grid_size)"
    )


def warn_of_mixing(
    evidence: Evidence, layout: TokenLayout, map_index: MapIndex, *, is_stated: bool
) -> None:
    """Warns if tokens mix outside the recorded attention.

    Args:
        evidence: results of the trials.
        layout: the token layout with its readout.
        map_index: from the recording.
        is_stated: whether the model or the caller states the readout.
    """
    if evidence.problem is not None or map_index.has_other_tokens:
        return
    found = evidence.mixing(layout, map_index)
    if found is not None:
        amount, where = found
        _warn(
            f"tokens mix outside the recorded attention, {where}: with every recorded map "
            "replaced by one that mixes no tokens, other tokens still change by "
            f"{amount:.2g} of a token's own change, or the output changes by that share of its "
            "size. The map does not include this flow. Look there for attention that is not "
            "softmax over the last dimension (or is hidden in torch.ops), and for convolutions "
            "or linear layers across tokens"
        )
        return
    if layout.readout in ("class", "distilled"):
        return
    before, after = evidence.products
    if before or (after and not map_index.pooling):
        where = f"before {evidence.name(map_index, 0)}"
        if not before:
            where = f"after {evidence.name(map_index, len(map_index.layers) - 1)}"
        _warn(
            f"tokens may mix outside the recorded attention, {where}: there are "
            f"{before or after} matrix product(s) of tensors that depend on the image. If they "
            "are attention that was not recorded, the map does not include it"
        )
        return
    is_known = is_stated or layout.readout == "attention"
    interaction = 0.0 if is_known else evidence.interaction(layout)
    if interaction > 0:
        _warn(
            "after the last recorded attention layer, the output is not a sum over tokens (by "
            f"{interaction:.2g} of its change): either the head is not linear after pooling, and "
            "the map is right, or tokens mix there in attention that was not recorded, and the "
            "map does not include it. In the first case, pass "
            "token_layout=TokenLayout(..., readout=...)"
        )


def warn_of_missing_gradients(
    forward_func: Callable[..., Any],
    call: Batch,
    evidence: Evidence,
    missing: tuple[int, ...],
) -> None:
    """Warns of layers that the output depends on but that no gradient reached."""
    if not missing:
        return

    def output_with(replaced: tuple[int, ...]) -> Tensor | None:
        number = -1

        def observe(attention: Tensor) -> Tensor:
            nonlocal number
            number += 1
            return torch.ones_like(attention) if number in replaced else attention

        with torch.no_grad(), AttentionMode(observe):
            output = run_model(forward_func, call.images, call.args)
        return comparable_output(output, call.target, call.size)

    unchanged, changed = output_with(()), output_with(missing)
    if unchanged is not None and changed is not None and torch.equal(unchanged, changed):
        return  # the attention is computed, but the output does not depend on it
    names = dict.fromkeys(
        evidence.modules[number] if number < len(evidence.modules) else f"map {number}"
        for number in missing
    )
    _warn(
        f"no gradient reached the attention of {', '.join(names)}, as under torch.no_grad() or "
        "behind detach(), although the output depends on it: the map does not include it"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
