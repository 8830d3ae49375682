"""Proves, by running the model, what its maps rely on.

R follows the attention that was recorded, and the layout says which token stands for which
part of the image. Neither is taken on trust. A few forwards of one image, in which every
recorded attention map is replaced by one that mixes nothing (the identity), show:

- **Mixing that was not recorded.** Without attention, no token may depend on another. The
  answer of a class token must then be the same whatever the image shows, and a token that is
  changed must leave the keys of all others as they are, in every layer. Where the answer is
  pooled over the image tokens, no product of two tensors that depend on the image may come
  before the first recorded layer or follow the last.
- **Where tokens stand.** Pixels of one cell of the grid are changed: the key of this cell's
  token has to change most.
- **Which tokens are read**, where no gradient tells: those whose change in the last layer
  changes the answer.
- **That images stand first** in the maps: the forwards hold another number of images than
  the call.

What this does not see is listed in the documentation ("What is checked, and what is not").
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_reflected._captum import run_forward
from captum_reflected.attention.evidence import Evidence
from captum_reflected.attention.experiments import answer_of
from captum_reflected.attention.mode import AttentionMode
from captum_reflected.attention.recording import Seen
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.batch import Batch


def check_layout(evidence: Evidence, layout: TokenLayout, told: TokenLayout | None) -> None:
    """Refuses a layout that the model contradicts; warns where it was told by the caller.

    Raises:
        UnsupportedModelError: tokens stand elsewhere.
    """
    if evidence.problem is not None:
        _warn(
            "what the map relies on could not be checked, as forward_func cannot be run that way: "
            f"{evidence.problem}. If it runs nothing but a Vision Transformer, the map is right"
        )
        return
    problem = evidence.misplaced(layout)
    if problem is None:
        return
    if told is not None:
        _warn(
            f"token_layout has {layout.num_prefix_tokens} prefix tokens, but {problem}: the map "
            "lies beside what it shows, unless forward_func moves the image on purpose"
        )
        return
    raise UnsupportedModelError(
        f"the {layout.num_tokens} tokens are not {layout.num_prefix_tokens} prefix tokens and then "
        f"the image in raster order: {problem}; wanted: class and register tokens first, and a "
        "forward_func that does not flip, transpose or crop its images. If the order is another "
        "one on purpose, say so with token_layout=TokenLayout(num_prefix_tokens, grid_size)"
    )


def warn_of_mixing(evidence: Evidence, layout: TokenLayout, seen: Seen, *, is_stated: bool) -> None:
    """Warns where tokens mix outside the attention that was recorded.

    Args:
        evidence: of the model.
        layout: with its readout.
        seen: from the recording.
        is_stated: whether the model or the caller says how the answer is read out.
    """
    if evidence.problem is not None or seen.others:
        return
    found = evidence.mixing(layout, seen)
    if found is not None:
        amount, where = found
        _warn(
            f"tokens mix outside the attention that is recorded, {where}: with every recorded map "
            f"replaced by one that mixes nothing, tokens still change by {amount:.2g} of their own "
            "change, or the answer of its size. The map leaves out what flows there. Look there "
            "for attention that is not softmax over the last dimension (or is hidden in "
            "torch.ops), and for convolutions or linear layers across tokens"
        )
        return
    if layout.readout in ("class", "distilled"):
        return
    before, after = evidence.products
    if before or (after and not seen.pooling):
        where = f"before {evidence.name(seen, 0)}"
        if not before:
            where = f"after {evidence.name(seen, len(seen.layers) - 1)}"
        _warn(
            f"tokens mix outside the attention that is recorded, {where}: {before or after} matrix "
            "product(s) of tensors that depend on the image stand there. If they are attention "
            "that is not seen, the map leaves it out"
        )
        return
    is_known = is_stated or layout.readout == "attention"
    interaction = 0.0 if is_known else evidence.interaction(layout)
    if interaction > 0:
        _warn(
            "after the last recorded attention layer, the answer is no sum over tokens (by "
            f"{interaction:.2g} of its change): either its head is not linear after pooling, and "
            "the map is right, or tokens mix there in attention that is not recorded, and the map "
            "leaves it out. If the former, say so with token_layout=TokenLayout(..., readout=...)"
        )


def warn_of_missing_gradients(
    forward_func: Callable[..., Any],
    call: Batch,
    evidence: Evidence,
    missing: tuple[int, ...],
) -> None:
    """Warns of layers that the answer depends on and that no gradient reached."""
    if not missing:
        return

    def answer(replaced: tuple[int, ...]) -> Tensor | None:
        number = -1

        def observe(attention: Tensor) -> Tensor:
            nonlocal number
            number += 1
            return torch.ones_like(attention) if number in replaced else attention

        with torch.no_grad(), AttentionMode(observe):
            output = run_forward(forward_func, call.images, call.args)
        return answer_of(output, call.target, call.size)

    plain, changed = answer(()), answer(missing)
    if plain is not None and changed is not None and torch.equal(plain, changed):
        return  # computed, but not used
    names = dict.fromkeys(
        evidence.modules[number] if number < len(evidence.modules) else f"map {number}"
        for number in missing
    )
    _warn(
        f"no gradient reached the attention of {', '.join(names)}, as under torch.no_grad() or "
        "behind detach(), although the answer depends on it: the map leaves it out"
    )


def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)
