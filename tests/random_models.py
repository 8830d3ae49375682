"""Vision Transformers drawn at random, each of which can also spell its attention out.

A :class:`Plan` holds all choices; ``build(plan)`` makes the same model each time. With a list
as ``record``, every attention of the model computes its probabilities in plain arithmetic and
appends them to the list, whatever operations the model uses otherwise.

Most choices are what ordinary models make. ``Plan.odd`` names what is out of the ordinary.
"""

from __future__ import annotations

import functools
import math
import types
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention as TimmAttention
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import TokenLayout

OWN, TIMM, TORCHVISION = FAMILIES = ("own", "timm", "torchvision")
CLASSES = 5


@dataclass(frozen=True)
class Plan:
    """All that decides a model and how it is explained; its repr reproduces both."""

    family: str = OWN
    seed: int = 0
    dtype: str = "float64"
    batch: int = 2
    image: tuple[int, int] = (16, 16)
    patch: tuple[int, int] = (4, 4)
    depth: int = 3
    width: int = 16
    heads: int = 2
    class_token: bool = True
    registers: int = 0
    readout: str = "class"
    head: str = "linear"  # or "hidden", "norm"
    attention: str = "fused"
    norm: str = "pre"  # or "post"
    norm_first: bool = False  # a LayerNorm before the blocks
    qk_norm: bool = False
    gated: bool = False
    layer_scale: bool = False
    dropout: float = 0.0
    frozen: bool = False
    tokens_first: bool = False  # (N, B, D) inside
    wrap: str = "module"
    told: str = "nothing"  # or "layout", "layout and readout"
    stated: bool = True  # whether the model has attributes that say where its tokens are
    baseline: float = 0.0
    rows: int | None = None  # perturbations_per_eval
    odd: tuple[str, ...] = ()
    where: int | None = None  # the one layer that is odd; None: every layer, or the last

    @property
    def grid(self):
        return self.image[0] // self.patch[0], self.image[1] // self.patch[1]

    @property
    def num_image_tokens(self):
        return self.grid[0] * self.grid[1]

    @property
    def is_square(self):
        return self.image[0] == self.image[1] and self.patch[0] == self.patch[1]

    @property
    def specials(self):
        """Names of the tokens that are not of the image, in the usual order."""
        return [
            *(["class"] if self.class_token else []),
            *(["distilled"] if self.readout == "distilled" else []),
            *(f"register {n}" for n in range(self.registers)),
        ]

    @property
    def shows_readout(self):
        """Whether a method without gradients can know where the answer is read."""
        return (
            self.told == "layout and readout"
            or self.readout in ("attention", "class" if self.specials else "mean")
            or (self.family == TIMM and self.readout != "class_mean")
        )

    def layout(self):
        """What the user tells, if anything."""
        if self.told == "nothing":
            return None
        readout = self.readout if self.told == "layout and readout" else None
        return TokenLayout(len(self.specials), self.grid, readout)


# -- what is out of the ordinary ---------------------------------------------------------

# Name: (families, what no two of which go together).
ODDITIES = {
    # Attention in other operations than softmax or scaled_dot_product_attention.
    "exp and sum": ((OWN, TIMM), "attention"),
    "log_softmax and exp": ((OWN, TIMM), "attention"),
    "softmax over rows, transposed": ((OWN, TIMM), "attention"),
    "aten.softmax": ((OWN, TIMM), "attention"),
    "aten._softmax": ((OWN, TIMM), "attention"),
    "aten.scaled_dot_product_attention": ((OWN, TIMM), "attention"),
    "torch.special.softmax": ((OWN, TIMM), "attention"),
    "softmin of negative scores": ((OWN, TIMM), "attention"),
    "scripted softmax": ((OWN, TIMM), "attention"),
    "sigmoid attention": ((OWN, TIMM), "attention"),
    "softmax with a sink": ((OWN, TIMM), "attention"),
    # Its maps in other forms.
    "heads one by one": ((OWN, TIMM), "attention"),
    "queries in chunks": ((OWN, TIMM), "attention"),
    "images and heads in one dimension": ((OWN, TIMM), "attention"),
    "heads before images": ((OWN, TIMM), "attention"),
    "talking heads": ((OWN, TIMM), "attention"),
    "padding mask": ((OWN,), "attention"),
    "fully masked row": ((OWN,), "attention"),
    # Where the tokens stand.
    "class token last": ((OWN,), "tokens"),
    "registers before the class token": ((OWN,), "tokens"),
    "registers after the patches": ((OWN,), "tokens"),
    "patches column by column": ((OWN,), "tokens"),
    "grid neither told nor stated": ((OWN,), "tokens"),
    "image flipped left to right": (FAMILIES, "tokens"),
    "image upside down": (FAMILIES, "tokens"),
    "image transposed": (FAMILIES, "tokens"),
    "image resized": (FAMILIES, "tokens"),
    "two views averaged": (FAMILIES, "tokens"),
    # Where the answer is read.
    "read from a register": ((OWN,), "readout"),
    "weighted mean of the patches": ((OWN,), "readout"),
    "maximum over the patches": ((OWN, TIMM), "readout"),
    "read otherwise than stated": ((TIMM,), "readout"),
    "readout neither told nor stated": ((OWN,), "readout"),
    # What mixes tokens beside attention.
    "linear over tokens between blocks": (FAMILIES, "mixing"),
    "linear over tokens after the blocks": (FAMILIES, "mixing"),
    "convolution between blocks": (FAMILIES, "mixing"),
    "mean added between blocks": (FAMILIES, "mixing"),
    "mean added after the blocks": (FAMILIES, "mixing"),
    "softmax over channels": (FAMILIES, "mixing"),
    "softmax of features a head": (FAMILIES, "mixing"),
    "LayerNorm over tokens": (FAMILIES, "mixing"),
    # The graph.
    "first block under no_grad": (FAMILIES, "graph"),
    "embedding under no_grad": (FAMILIES, "graph"),
    "detached between blocks": (FAMILIES, "graph"),
    "checkpointed": (FAMILIES, "graph"),
    "checkpointed, reentrant": (FAMILIES, "graph"),
    # Blocks used more than once.
    "last block is the first": (FAMILIES, "blocks"),
    "all blocks repeated": (FAMILIES, "blocks"),
    "blocks looped over twice": (FAMILIES, "blocks"),
    # Parts exchanged, hooks.
    "Linear in drop_path": ((TIMM,), "parts"),
    "LayerNorm in proj_drop": ((TIMM,), "parts"),
    "Linear in attn_drop": ((TIMM,), "parts"),
    "other scale": ((TIMM,), "parts"),
    "Linear in dropout": ((TORCHVISION,), "parts"),
    "low-rank adapter": ((TIMM,), "parts"),
    "spectral norm": (FAMILIES, "parts"),
    "nonlinear patch embedding": (FAMILIES, "parts"),
    "overlapping patches": (FAMILIES, "parts"),
    "hook changes a block's output": (FAMILIES, "parts"),
    "hook changes a block's input": (FAMILIES, "parts"),
    "hook on the patch projection": (FAMILIES, "parts"),
    "forward of a block replaced": (FAMILIES, "parts"),
}
_RASTER = ("image flipped left to right", "image upside down", "image transposed")
_PREPARATIONS = (*_RASTER, "image resized", "two views averaged")
_REGISTERED = ("registers after the patches", "read from a register")
_NO_ANSWER = (
    "two views averaged",
    "maximum over the patches",
    "linear over tokens after the blocks",
)

_IMAGES = ((16, 16), (32, 32), (24, 24), (16, 24), (24, 16), (16, 32), (32, 16))
_PATCHES = ((8, 8), (4, 4), (4, 8), (8, 4))
_MOST_TOKENS = 16


def draw_plan(choose, odd=()):
    """A plan whose choices ``choose`` makes, each from a sequence of options.

    Args:
        choose: from options to one of them.
        odd: names in ODDITIES, of different groups, that some family has in common.
    """
    families = [f for f in FAMILIES if all(f in ODDITIES[name][0] for name in odd)]
    family = OWN if OWN in families and choose((False, True)) else choose(families)
    sizes = [
        (image, patch)
        for image in _IMAGES
        for patch in _PATCHES
        if 4 <= (image[0] // patch[0]) * (image[1] // patch[1]) <= _MOST_TOKENS
        and (family != TORCHVISION or (image[0] == image[1] and patch[0] == patch[1]))
    ]
    image, patch = choose(sizes)
    plan = Plan(
        family=family,
        seed=choose(range(1000)),
        dtype=choose(("float64", "float64", "float64", "float32")),
        batch=choose((1, 2)),
        image=image,
        patch=patch,
        depth=choose((2, 3, 4)),
        width=choose((16, 24, 32)),
        heads=choose((1, 2, 4)),
        dropout=choose((0.0, 0.1)),
        frozen=choose((False, True)),
        wrap=choose(("module", "module", *WRAPS)),
        told=choose(("nothing", "nothing", "layout", "layout and readout")),
        baseline=choose((0.0, 0.0, 0.5)),
        rows=choose((None, 3)),
        odd=tuple(odd),
    )
    plan = replace(plan, where=choose((None, *range(plan.depth))))
    if family == TORCHVISION:
        plan = replace(plan, head=choose(("linear", "hidden")))
    else:
        class_token = choose((True, True, False))
        readouts = ["mean", "all", "attention", *(["class", "distilled"] if class_token else [])]
        if family == OWN and class_token:
            readouts.append("class_mean")
        plan = replace(
            plan,
            class_token=class_token,
            readout=choose(readouts),
            attention=choose(tuple(PLAIN) if family == OWN else ("fused", "by hand")),
            norm=choose(("pre", "pre", "post")),
            norm_first=choose((False, True)),
            qk_norm=choose((False, True)),
            layer_scale=choose((False, True)),
            head=choose(("linear", "hidden", "norm") if family == OWN else ("linear", "norm")),
        )
        if plan.readout != "distilled" or family == OWN:
            plan = replace(plan, registers=choose((0, 0, 1, 3)))
        if family == OWN:
            plan = replace(
                plan,
                gated=choose((False, True)),
                tokens_first=choose((False, True)),
                stated=choose((True, False)),
            )
    return _consistent(plan)


def _consistent(plan):
    """What the oddities need, and what makes a plan without them ordinary."""
    odd = plan.odd
    if plan.attention.startswith("MultiheadAttention") or plan.family == TORCHVISION:
        plan = replace(plan, qk_norm=False)
    if plan.readout == "distilled" or plan.family == TORCHVISION:
        plan = replace(plan, class_token=True)
    needs_class = ("class token last", "registers before the class token")
    if any(name in odd for name in needs_class):
        plan = replace(plan, class_token=True)
    if any(name in odd for name in ("registers before the class token", *_REGISTERED)):
        plan = replace(plan, registers=plan.registers or 2)
    if any(name in odd for name in ("weighted mean of the patches", "maximum over the patches")):
        plan = replace(plan, readout="mean")
    if "read from a register" in odd:
        plan = replace(plan, readout="class", class_token=True)
    if "read otherwise than stated" in odd:
        plan = replace(plan, readout="class", class_token=True, wrap="module")
    if "mean added after the blocks" in odd and plan.readout == "attention":
        plan = replace(plan, readout="mean")
    if "readout neither told nor stated" in odd:
        plan = replace(plan, readout="mean", class_token=True)
    if "heads before images" in odd:
        plan = replace(plan, heads=2, batch=2)
    if "fully masked row" in odd:
        plan = replace(plan, attention="fused")
    if "Linear in attn_drop" in odd:
        plan = replace(plan, attention="by hand")
    if "LayerNorm over tokens" in odd:
        plan = replace(plan, tokens_first=False)
    untold = ("class token last", "patches column by column", "two views averaged", *_RASTER)
    if any(name in odd for name in (*untold, "registers before the class token", *_REGISTERED)):
        plan = replace(plan, told="nothing")
    if any(ODDITIES[name][1] == "readout" for name in odd) and plan.told != "nothing":
        plan = replace(plan, told="layout")
    if "grid neither told nor stated" in odd:
        plan = replace(plan, stated=False, told="nothing")
    elif not plan.is_square and plan.told == "nothing":
        plan = replace(plan, stated=True)
    if not (plan.shows_readout or any(ODDITIES[name][1] == "readout" for name in odd)):
        if any(ODDITIES[name][1] == "tokens" for name in odd) and plan.told == "nothing":
            plan = replace(plan, readout="class", class_token=True)
        else:
            plan = replace(plan, told="layout and readout")
    return plan


# -- attention ---------------------------------------------------------------------------


def _scores(q, k, mask):
    scores = q @ k.mT / math.sqrt(q.shape[-1])
    return scores if mask is None else scores.masked_fill(~mask, -math.inf)


def _einsum(q, k, v, mask):
    scores = torch.einsum("bhqd,bhkd->bhqk", q, k) / math.sqrt(q.shape[-1])
    scores = scores if mask is None else scores.masked_fill(~mask, -math.inf)
    return torch.einsum("bhqk,bhkd->bhqd", torch.softmax(scores, dim=-1), v)


def _exp_and_sum(q, k, v, mask):
    scores = _scores(q, k, mask)
    exponentials = (scores - scores.amax(dim=-1, keepdim=True)).exp()
    return (exponentials / exponentials.sum(dim=-1, keepdim=True)) @ v


def _transposed(q, k, v, mask):
    return _scores(q, k, mask).mT.softmax(dim=-2).mT @ v


def _sink(q, k, v, mask):
    exponentials = _scores(q, k, mask).exp()
    return exponentials / (1 + exponentials.sum(dim=-1, keepdim=True)) @ v


def _one_by_one(q, k, v, mask):
    heads = zip(q.split(1, 1), k.split(1, 1), v.split(1, 1), strict=True)
    return torch.cat([_scores(q, k, mask).softmax(dim=-1) @ v for q, k, v in heads], dim=1)


def _chunks(q, k, v, mask):
    half = q.shape[2] // 2
    masks = (None, None)
    if mask is not None:
        masks = mask.expand(-1, -1, q.shape[2], -1).split((half, q.shape[2] - half), dim=2)
    parts = q.split((half, q.shape[2] - half), dim=2)
    chunks = [_scores(p, k, m).softmax(dim=-1) @ v for p, m in zip(parts, masks, strict=True)]
    return torch.cat(chunks, dim=2)


def _one_dimension(q, k, v, mask):
    scores = torch.bmm(q.flatten(0, 1), k.flatten(0, 1).mT) / math.sqrt(q.shape[-1])
    if mask is not None:
        shape = (*q.shape[:2], *scores.shape[-2:])
        scores = scores.masked_fill(~mask.expand(shape).flatten(0, 1), -math.inf)
    return torch.bmm(scores.softmax(dim=-1), v.flatten(0, 1)).unflatten(0, q.shape[:2])


def _heads_first(q, k, v, mask):
    q, k, v = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    return (_scores(q, k, mask).softmax(dim=-1) @ v).transpose(0, 1)


@functools.cache
def _scripted():
    def softmax(scores: torch.Tensor) -> torch.Tensor:
        return torch.softmax(scores, dim=-1)

    return torch.jit.script(softmax)


PLAIN = {
    "fused": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    "by hand": lambda q, k, v, mask: _scores(q, k, mask).softmax(dim=-1) @ v,
    "functional": lambda q, k, v, mask: F.softmax(_scores(q, k, mask), dim=-1) @ v,
    "Softmax module": lambda q, k, v, mask: nn.Softmax(dim=-1)(_scores(q, k, mask)) @ v,
    "einsum": _einsum,
    "MultiheadAttention": None,
    "MultiheadAttention with weights": None,
}
_OF_SCORES = {
    "log_softmax and exp": lambda s: s.log_softmax(dim=-1).exp(),
    "aten.softmax": lambda s: torch.ops.aten.softmax.int(s, -1),
    "aten._softmax": lambda s: torch.ops.aten._softmax(s, -1, False),
    "torch.special.softmax": lambda s: torch.special.softmax(s, dim=-1),
    "softmin of negative scores": lambda s: F.softmin(-s, dim=-1),
    "scripted softmax": lambda s: _scripted()(s),
    "sigmoid attention": lambda s: s.sigmoid() / s.shape[-1],
}
_STYLES = {
    **PLAIN,
    **{
        name: lambda q, k, v, mask, f=function: f(_scores(q, k, mask)) @ v
        for name, function in _OF_SCORES.items()
    },
    "exp and sum": _exp_and_sum,
    "softmax over rows, transposed": _transposed,
    "aten.scaled_dot_product_attention": lambda q, k, v, mask: (
        torch.ops.aten.scaled_dot_product_attention(q, k, v, mask)
    ),
    "softmax with a sink": _sink,
    "heads one by one": _one_by_one,
    "queries in chunks": _chunks,
    "images and heads in one dimension": _one_dimension,
    "heads before images": _heads_first,
    "talking heads": None,
}


def spelled_out(scores, record, style=""):
    """Attention probabilities in plain arithmetic, kept with their gradient."""
    if style == "sigmoid attention":
        probabilities = 1 / (1 + (-scores).exp()) / scores.shape[-1]
    else:
        peak = scores.detach().amax(dim=-1, keepdim=True).clamp(min=-1e30)
        exponentials = (scores - peak).exp()
        total = exponentials.sum(dim=-1, keepdim=True)
        if style == "softmax with a sink":
            total = total + (-peak).exp()
        # A row of which all is masked is 0.
        probabilities = exponentials / torch.where(total > 0, total, 1)
    # The answer depends on them, whether or not they depend on anything trained.
    if torch.is_grad_enabled() and not probabilities.requires_grad:
        probabilities.requires_grad_()
    if probabilities.requires_grad:
        probabilities.retain_grad()
    record.append(probabilities)
    return probabilities


class Attention(nn.Module):
    """Self-attention in any style; spelled out where it has a record."""

    def __init__(self, plan, style, mask=None):
        super().__init__()
        width = plan.width
        self.style, self.heads = style, plan.heads
        self.tokens_first = plan.tokens_first
        self.record = None
        self.register_buffer("mask", mask)
        self.inner = None
        if style.startswith("MultiheadAttention"):
            self.inner = nn.MultiheadAttention(
                width, plan.heads, dropout=plan.dropout, batch_first=not plan.tokens_first
            )
        else:
            self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
            head = width // plan.heads
            self.q_norm = nn.LayerNorm(head) if plan.qk_norm else nn.Identity()
            self.k_norm = nn.LayerNorm(head) if plan.qk_norm else nn.Identity()
            if style == "talking heads":
                self.mix = nn.Conv2d(plan.heads, plan.heads, 1)

    def forward(self, tokens):
        if self.inner is not None and self.record is None:
            padding = None
            if self.mask is not None:
                images = tokens.shape[1 if self.tokens_first else 0]
                padding = ~self.mask[0, 0].expand(images, -1)
            answer, _ = self.inner(
                tokens,
                tokens,
                tokens,
                key_padding_mask=padding,
                need_weights=self.style.endswith("weights"),
            )
            return answer
        if self.tokens_first:
            tokens = tokens.transpose(0, 1)
        answer = self._attend(tokens)
        return answer.transpose(0, 1) if self.tokens_first else answer

    def _attend(self, tokens):
        if self.inner is not None:
            inner = self.inner
            qkv = F.linear(tokens, inner.in_proj_weight, inner.in_proj_bias)
            proj, q_norm, k_norm = inner.out_proj, nn.Identity(), nn.Identity()
        else:
            qkv, proj, q_norm, k_norm = self.qkv(tokens), self.proj, self.q_norm, self.k_norm
        q, k, v = (x.unflatten(2, (self.heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2))
        q, k = q_norm(q), k_norm(k)
        if self.record is not None:
            probabilities = spelled_out(_scores(q, k, self.mask), self.record, self.style)
            if self.style == "talking heads":
                probabilities = self.mix(probabilities)
            attended = probabilities @ v
        elif self.style == "talking heads":
            attended = self.mix(_scores(q, k, self.mask).softmax(dim=-1)) @ v
        else:
            attended = _STYLES[self.style](q, k, v, self.mask)
        return proj(attended.transpose(1, 2).flatten(2))


class AttentionPool(nn.Module):
    """Reads one vector out of the tokens (B, N, D) with learned queries."""

    def __init__(self, width, heads, queries=2):
        super().__init__()
        self.heads, self.record = heads, None
        self.query_tokens = nn.Parameter(torch.empty(queries, width))
        self.q, self.kv = nn.Linear(width, width), nn.Linear(width, 2 * width)

    def forward(self, tokens):
        q = self.q(self.query_tokens).expand(len(tokens), -1, -1)
        q, k, v = (
            x.unflatten(2, (self.heads, -1)).transpose(1, 2)
            for x in (q, *self.kv(tokens).chunk(2, dim=2))
        )
        if self.record is None:
            read = F.scaled_dot_product_attention(q, k, v)
        else:
            read = spelled_out(_scores(q, k, None), self.record) @ v
        return read.transpose(1, 2).flatten(2).mean(dim=1)


class SpelledTimmAttention(nn.Module):
    """In place of timm's attention: its own parts, its softmax spelled out."""

    def __init__(self, inner, record):
        super().__init__()
        self.inner, self.record = inner, record

    def forward(self, tokens, attn_mask=None, is_causal=False):
        inner = self.inner
        qkv = inner.qkv(tokens).unflatten(2, (3, inner.num_heads, -1))
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        scale = 1 / math.sqrt(q.shape[-1]) if inner.fused_attn else inner.scale
        scores = (inner.q_norm(q) * scale) @ inner.k_norm(k).mT
        probabilities = spelled_out(scores, self.record)
        if not inner.fused_attn:
            probabilities = inner.attn_drop(probabilities)
        return inner.proj_drop(inner.proj((probabilities @ v).transpose(1, 2).flatten(2)))


class SpelledTimmPool(nn.Module):
    """In place of timm's attention pooling."""

    def __init__(self, inner, record):
        super().__init__()
        self.inner, self.record = inner, record

    def forward(self, tokens):
        inner = self.inner
        heads = (inner.num_heads, inner.head_dim)
        q = inner.q(inner.latent.expand(len(tokens), -1, -1)).unflatten(2, heads).transpose(1, 2)
        k, v = inner.kv(tokens).unflatten(2, (2, *heads)).permute(2, 0, 3, 1, 4)
        scores = inner.q_norm(q) @ inner.k_norm(k).mT / math.sqrt(heads[1])
        read = inner.proj((spelled_out(scores, self.record) @ v).transpose(1, 2).flatten(2))
        return (read + inner.mlp(inner.norm(read)))[:, 0]


class SpelledMultiheadAttention(nn.Module):
    """In place of torchvision's self-attention."""

    batch_first = True

    def __init__(self, inner, record):
        super().__init__()
        self.inner, self.record = inner, record

    def forward(self, tokens, *_, **__):
        inner = self.inner
        qkv = F.linear(tokens, inner.in_proj_weight, inner.in_proj_bias)
        q, k, v = (
            x.unflatten(2, (inner.num_heads, -1)).transpose(1, 2) for x in qkv.chunk(3, dim=2)
        )
        attended = spelled_out(_scores(q, k, None), self.record) @ v
        return inner.out_proj(attended.transpose(1, 2).flatten(2)), None


_SPELLED = {
    TimmAttention: SpelledTimmAttention,
    AttentionPoolLatent: SpelledTimmPool,
    nn.MultiheadAttention: SpelledMultiheadAttention,
}


def spell_out(model, record):
    """Makes every attention of a model spell its probabilities out, into the record."""
    for module in list(model.modules()):
        if isinstance(module, (Attention, AttentionPool)):
            module.record = record
        elif isinstance(module, Checkpointed):
            module.active = False
        if not isinstance(module, Attention):
            for name, child in module.named_children():
                if type(child) in _SPELLED:
                    setattr(module, name, _SPELLED[type(child)](child, record))


# -- what stands between blocks ----------------------------------------------------------


class Detach(nn.Module):
    def forward(self, tokens):
        return tokens.detach()


class NoGrad(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, inputs):
        with torch.no_grad():
            return self.inner(inputs)


class Checkpointed(nn.Module):
    def __init__(self, inner, reentrant):
        super().__init__()
        self.inner, self.reentrant, self.active = inner, reentrant, True

    def forward(self, tokens):
        if self.active and torch.is_grad_enabled():
            return checkpoint(self.inner, tokens, use_reentrant=self.reentrant)
        return self.inner(tokens)


class TokenLinear(nn.Module):
    """Adds a linear map over the tokens."""

    def __init__(self, num_tokens, dim):
        super().__init__()
        self.linear, self.dim = nn.Linear(num_tokens, num_tokens), dim

    def forward(self, tokens):
        return tokens + self.linear(tokens.transpose(self.dim, 2)).transpose(self.dim, 2)


class TokenMean(nn.Module):
    """Adds the mean of all tokens."""

    def __init__(self, dim):
        super().__init__()
        self.dim = dim

    def forward(self, tokens):
        return tokens + tokens.mean(dim=self.dim, keepdim=True)


class TokenConvolution(nn.Module):
    """Adds a depthwise convolution of the image tokens, which stand at ``places``."""

    def __init__(self, width, grid, places, dim):
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1, groups=width)
        self.grid, self.places, self.dim = grid, places, dim

    def forward(self, tokens):
        places = torch.tensor(self.places, device=tokens.device)
        order = (1, 2, 0) if self.dim == 0 else (0, 2, 1)
        picture = tokens.index_select(self.dim, places).permute(*order)
        mixed = self.convolution(picture.unflatten(2, self.grid)).flatten(2)
        back = (2, 0, 1) if self.dim == 0 else (0, 2, 1)
        return tokens.index_add(self.dim, places, mixed.permute(*back))


class ChannelGate(nn.Module):
    """Multiplies by a softmax over channels, of all or of each head's."""

    def __init__(self, heads=None):
        super().__init__()
        self.heads = heads

    def forward(self, tokens):
        if self.heads is None:
            return tokens * (1 + tokens.softmax(dim=-1))
        features = tokens.unflatten(2, (self.heads, -1)).transpose(1, 2)
        return tokens * (1 + features.softmax(dim=-1).transpose(1, 2).flatten(2))


class Twice(nn.Sequential):
    """Runs its blocks, and then all of them again."""

    def forward(self, tokens):
        return super().forward(super().forward(tokens))


# -- our own family ----------------------------------------------------------------------


class Block(nn.Module):
    def __init__(self, plan, style, mask):
        super().__init__()
        width = plan.width
        self.attention = Attention(plan, style, mask)
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )
        self.gate = nn.Linear(width, width) if plan.gated else None
        self.drop = nn.Dropout(plan.dropout)
        self.is_post = plan.norm == "post"
        self.scale = nn.Parameter(torch.empty(2)) if plan.layer_scale else None

    def forward(self, tokens):
        first, second = (1, 1) if self.scale is None else self.scale
        attended = self.attention(tokens if self.is_post else self.norm1(tokens))
        if self.gate is not None:
            attended = attended * self.gate(tokens).sigmoid()
        tokens = tokens + first * self.drop(attended)
        if self.is_post:
            tokens = self.norm1(tokens)
            return self.norm2(tokens + second * self.mlp(tokens))
        return tokens + second * self.drop(self.mlp(self.norm2(tokens)))


class Transformer(nn.Module):
    """A Vision Transformer of our own, its tokens in any order."""

    def __init__(self, plan, order):
        super().__init__()
        self.order, self.specials = order, plan.specials
        self.is_by_column = "patches column by column" in plan.odd
        self.tokens_first = plan.tokens_first
        self.readout, self.head_kind = plan.readout, plan.head
        self.reads = "register 0" if "read from a register" in plan.odd else "class"
        self.takes_maximum = "maximum over the patches" in plan.odd
        width, count = plan.width, len(order)
        self.projection = nn.Conv2d(3, width, plan.patch, stride=plan.patch)
        self.special_tokens = nn.Parameter(torch.empty(len(plan.specials), width))
        self.position_tokens = nn.Parameter(torch.empty(count, width))
        self.norm_first = nn.LayerNorm(width) if plan.norm_first else nn.Identity()
        self.blocks = nn.Sequential(
            *(Block(plan, *how) for how in _attention_of_layers(plan, order))
        )
        self.norm = nn.LayerNorm(width)
        self.pool = AttentionPool(width, plan.heads) if plan.readout == "attention" else None
        self.weights = None
        if "weighted mean of the patches" in plan.odd:
            self.weights = nn.Parameter(torch.empty(plan.num_image_tokens))
        read = 2 * width if plan.readout == "class_mean" else width
        self.head = _head(plan.head, read)
        if plan.readout == "distilled":
            self.head_distilled = _head(plan.head, read)
        if plan.stated:
            self.grid_size = plan.grid
            if not any(ODDITIES[name][1] == "tokens" for name in plan.odd):
                self.num_prefix_tokens = len(plan.specials)

    def _places(self, *names):
        return [self.order.index(name) for name in names]

    def _patches(self):
        return [place for place, name in enumerate(self.order) if isinstance(name, int)]

    def forward(self, images):
        patches = self.projection(images)
        if self.is_by_column:
            patches = patches.mT
        patches = patches.flatten(2).mT
        specials = self.special_tokens.expand(len(images), -1, -1)
        found = {name: specials[:, n : n + 1] for n, name in enumerate(self.specials)}
        # Image tokens come in one piece.
        first = self._patches()[0]
        pieces = [found[name] for name in self.order[:first]]
        pieces += [patches, *(found[name] for name in self.order[first + patches.shape[1] :])]
        tokens = self.norm_first(torch.cat(pieces, dim=1) + self.position_tokens)
        if self.tokens_first:
            tokens = tokens.transpose(0, 1)
        tokens = self.norm(self.blocks(tokens))
        return self._read(tokens.transpose(0, 1) if self.tokens_first else tokens)

    def _read(self, tokens):
        if self.readout == "distilled":
            first, second = self._places("class", "distilled")
            return (self.head(tokens[:, first]) + self.head_distilled(tokens[:, second])) / 2
        if self.readout == "attention":
            return self.head(self.pool(tokens))
        if self.readout == "all":
            return self.head(tokens.mean(dim=1))
        patches = tokens[:, self._patches()]
        mean = patches.mean(dim=1)
        if self.weights is not None:
            mean = (self.weights.softmax(dim=0)[:, None] * patches).sum(dim=1)
        elif self.takes_maximum:
            mean = patches.amax(dim=1)
        if self.readout == "mean":
            return self.head(mean)
        read = tokens[:, self._places(self.reads)[0]]
        return self.head(read if self.readout == "class" else torch.cat([read, mean], dim=1))


def _head(kind, width):
    if kind == "hidden":
        return nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Linear(width, CLASSES))
    norm = nn.LayerNorm(width) if kind == "norm" else nn.Identity()
    return nn.Sequential(norm, nn.Linear(width, CLASSES))


def _attention_of_layers(plan, order):
    """Style and mask of each layer's attention."""
    odd = [name for name in plan.odd if name in _STYLES]
    for layer in range(plan.depth):
        is_odd = plan.where in (None, layer)
        count, mask = len(order), None
        if is_odd and "padding mask" in plan.odd:
            mask = torch.ones(1, 1, 1, count, dtype=torch.bool)
            mask[..., [order.index(1), order.index(2)]] = False
        elif is_odd and "fully masked row" in plan.odd:
            mask = torch.ones(1, 1, count, count, dtype=torch.bool)
            mask[..., order.index(1), :] = False
        yield odd[0] if is_odd and odd else plan.attention, mask


def _order(plan):
    """Names of the tokens in the model's order; those of the image are numbers."""
    patches = list(range(plan.num_image_tokens))
    specials = plan.specials
    registers = [name for name in specials if name.startswith("register")]
    others = [name for name in specials if not name.startswith("register")]
    if "class token last" in plan.odd:
        return [*specials[1:], *patches, specials[0]]
    if "registers before the class token" in plan.odd:
        return [*registers, *others, *patches]
    if "registers after the patches" in plan.odd:
        return [*others, *patches, *registers]
    return [*specials, *patches]


# -- other families ----------------------------------------------------------------------


def _timm(plan):
    pools = {"mean": "avg", "all": "avg", "attention": "map"}
    options = {
        "img_size": plan.image,
        "patch_size": plan.patch,
        "embed_dim": plan.width,
        "depth": plan.depth,
        "num_heads": plan.heads,
        "num_classes": CLASSES,
        "mlp_ratio": 2,
        "qk_norm": plan.qk_norm,
        "init_values": 0.5 if plan.layer_scale else None,
        "pre_norm": plan.norm_first,
        "attn_drop_rate": plan.dropout,
        "proj_drop_rate": plan.dropout,
    }
    if plan.norm == "post":
        options["block_fn"] = ResPostBlock
    if plan.readout == "distilled":
        return VisionTransformerDistilled(**options)
    model = TimmTransformer(
        **options,
        class_token=plan.class_token,
        reg_tokens=plan.registers,
        global_pool="max"
        if "maximum over the patches" in plan.odd
        else pools.get(plan.readout, "token"),
        pool_include_prefix=plan.readout == "all",
        fc_norm=True if plan.head == "norm" else None,
    )
    return model


def _torchvision(plan):
    return TorchvisionTransformer(
        image_size=plan.image[0],
        patch_size=plan.patch[0],
        num_layers=plan.depth,
        num_heads=plan.heads,
        hidden_dim=plan.width,
        mlp_dim=2 * plan.width,
        dropout=plan.dropout,
        attention_dropout=plan.dropout,
        num_classes=CLASSES,
        representation_size=plan.width if plan.head == "hidden" else None,
    )


class ReadsOtherwise(nn.Module):
    """A model that states its class token, under a head of the user's own."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, images):
        tokens = self.inner.forward_features(images)
        return self.inner.head(tokens[:, self.inner.num_prefix_tokens :].mean(dim=1))


# -- the image, before it reaches the model ----------------------------------------------


class Prepared(nn.Module):
    """Turns the image before the model sees it."""

    def __init__(self, inner, how):
        super().__init__()
        self.inner, self.how = inner, how

    def forward(self, images):
        if self.how == "image flipped left to right":
            return self.inner(images.flip(-1))
        if self.how == "image upside down":
            return self.inner(images.flip(-2))
        if self.how == "image transposed":
            return self.inner(images.mT)
        if self.how == "two views averaged":
            return (self.inner(images) + self.inner(images.flip(-1))) / 2
        return self.inner(F.interpolate(images, scale_factor=2.0, mode="bilinear"))


class Standardise(nn.Module):
    def forward(self, images):
        return (images - 0.2) / 0.7


WRAPS = ("module", "sequential", "standardised", "lambda", "method", "partial")


def wrapped(model, how):
    """The model as it is handed to an attributor."""
    if how == "sequential":
        return nn.Sequential(model)
    if how == "lambda":
        return lambda images: model(images)
    if how == "method":
        return model.forward
    return functools.partial(_run, model) if how == "partial" else model


def _run(model, images):
    return model(images)


# -- building ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Truth:
    """What is known of a model by construction.

    Attributes:
        order: places in the sequence, special tokens first, then of the image tokens in the
            raster order of the user's image.
        specials: how many tokens are not of the image.
        grid: (gh, gw) of the user's image.
        readout: (N,) in that order; None where attention reads the answer out.
        is_defined: whether there is a right answer at all.
    """

    order: list[int]
    specials: int
    grid: tuple[int, int]
    readout: torch.Tensor | None
    is_defined: bool


def build(plan, record=None):
    """The model of a plan in eval mode, and what is known of it.

    Args:
        plan: all that decides it.
        record: a list, for a model of the same weights that spells its attention out into it.
    """
    inner_plan = plan
    if "image transposed" in plan.odd:
        inner_plan = replace(plan, image=plan.image[::-1], patch=plan.patch[::-1])
    elif "image resized" in plan.odd:
        (height, width), (down, across) = plan.image, plan.patch
        inner_plan = replace(plan, image=(2 * height, 2 * width), patch=(2 * down, 2 * across))
    order = _order(inner_plan)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(plan.seed)
        if plan.family == OWN:
            model = Transformer(inner_plan, order)
        else:
            model = {TIMM: _timm, TORCHVISION: _torchvision}[plan.family](inner_plan)
            if plan.family == TIMM:
                _timm_attention(model, plan)
        _make_odd(model, inner_plan, order)
        _randomise(model, plan.seed)
    if "read otherwise than stated" in plan.odd:
        model = ReadsOtherwise(model)
    for name in plan.odd:
        if name in _PREPARATIONS:
            model = Prepared(model, name)
    if plan.wrap == "standardised":
        model = nn.Sequential(Standardise(), model)
    model = model.to(getattr(torch, plan.dtype)).eval().requires_grad_(not plan.frozen)
    if record is not None:
        spell_out(model, record)
    return model, _truth(plan, model, order)


def _timm_attention(model, plan):
    for block in model.blocks:
        block.attn.fused_attn = plan.attention == "fused"
    odd = [name for name in plan.odd if name in _STYLES]
    for layer, block in enumerate(model.blocks):
        if odd and plan.where in (None, layer):
            block.attn = _InTimm(replace(plan, tokens_first=False), odd[0])


class _InTimm(Attention):
    """Our own attention in a block of timm."""

    def forward(self, tokens, attn_mask=None, is_causal=False):
        return super().forward(tokens)


def _randomise(model, seed):
    """Weights under which every part of the model has its effect, exact in float32."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            is_token = any(part in name for part in ("token", "pos_embed", "latent"))
            if is_token or name.endswith("weights"):
                value = noise
            elif parameter.dim() > 1:
                value = noise * 1.5 / math.sqrt(parameter[0].numel())
            else:
                value = 0.2 * noise + (0 if name.endswith("bias") else 1)
            parameter.copy_(value)


def _parts(model, plan):
    """Where a family has its blocks and its patch projection: (owner, name) of each."""
    if plan.family == OWN:
        return (model, "blocks"), (model, "projection")
    if plan.family == TIMM:
        return (model, "blocks"), (model.patch_embed, "proj")
    return (model.encoder, "layers"), (model, "conv_proj")


def _make_odd(model, plan, order):
    """Exchanges parts of a model, as its plan names them."""
    odd, width, count = plan.odd, plan.width, len(order)
    (owner, where), (embedding, projection) = _parts(model, plan)
    blocks = list(getattr(owner, where))
    dim = 0 if plan.tokens_first else 1
    layer = plan.depth - 1 if plan.where is None else plan.where
    after = min(layer, plan.depth - 2)  # a block with another after it
    block, last = blocks[layer], blocks[-1]
    patches = [place for place, name in enumerate(order) if isinstance(name, int)]

    for name, insert in {
        "linear over tokens between blocks": lambda: TokenLinear(count, dim),
        "convolution between blocks": lambda: TokenConvolution(width, plan.grid, patches, dim),
        "mean added between blocks": lambda: TokenMean(dim),
        "softmax over channels": lambda: ChannelGate(),
        "softmax of features a head": lambda: ChannelGate(plan.heads),
        "detached between blocks": lambda: Detach(),
    }.items():
        if name in odd:
            blocks.insert(after + 1, insert())
    if "linear over tokens after the blocks" in odd:
        blocks.append(TokenLinear(count, dim))
    if "mean added after the blocks" in odd:
        blocks.append(TokenMean(dim))
    if "LayerNorm over tokens" in odd:
        norm = "ln_1" if plan.family == TORCHVISION else "norm1"
        setattr(block, norm, nn.LayerNorm((count, width)))
    if "spectral norm" in odd:
        linear = next(part for part in block.mlp.modules() if isinstance(part, nn.Linear))
        nn.utils.parametrizations.spectral_norm(linear)
    if "Linear in drop_path" in odd:
        last.drop_path1 = nn.Linear(width, width)
    if "LayerNorm in proj_drop" in odd:
        last.attn.proj_drop = nn.LayerNorm(width)
    if "Linear in attn_drop" in odd:
        last.attn.attn_drop = nn.Linear(count, count)
    if "other scale" in odd:
        last.attn.scale = 2.0
    if "Linear in dropout" in odd:
        last.dropout = nn.Linear(width, width)
    if "low-rank adapter" in odd:
        block.attn.qkv = LowRank(block.attn.qkv)
    if "nonlinear patch embedding" in odd:
        setattr(embedding, projection, nn.Sequential(getattr(embedding, projection), nn.GELU()))
    if "overlapping patches" in odd:
        kernel = tuple(side + 2 for side in plan.patch)
        wider = nn.Conv2d(3, width, kernel, stride=plan.patch, padding=1)
        setattr(embedding, projection, wider)
    if "hook changes a block's output" in odd:
        block.register_forward_hook(_double)
    if "hook changes a block's input" in odd:
        block.register_forward_pre_hook(_shift_input)
    if "hook on the patch projection" in odd:
        getattr(embedding, projection).register_forward_hook(_bend)
    if "forward of a block replaced" in odd:
        block.forward = types.MethodType(_negated, block)
    if "embedding under no_grad" in odd:
        setattr(embedding, projection, NoGrad(getattr(embedding, projection)))
    if "first block under no_grad" in odd:
        blocks[0] = NoGrad(blocks[0])
    for name in ("checkpointed", "checkpointed, reentrant"):
        if name in odd:
            blocks = [Checkpointed(part, name.endswith("reentrant")) for part in blocks]
    if "last block is the first" in odd:
        blocks[-1] = blocks[0]
    if "all blocks repeated" in odd:
        blocks = blocks + blocks
    kind = Twice if "blocks looped over twice" in odd else nn.Sequential
    if odd:
        setattr(owner, where, kind(OrderedDict((str(n), part) for n, part in enumerate(blocks))))


class LowRank(nn.Module):
    """A linear layer and a low-rank adapter beside it."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.down = nn.Linear(inner.in_features, 2, bias=False)
        self.up = nn.Linear(2, inner.out_features, bias=False)

    def forward(self, tokens):
        return self.inner(tokens) + self.up(self.down(tokens))


def _double(_module, _inputs, output):
    return 2 * output


def _shift_input(_module, inputs):
    return (inputs[0] + 0.5, *inputs[1:])


def _bend(_module, _inputs, output):
    return output.tanh()


def _negated(self, *args, **kwargs):
    return -type(self).forward(self, *args, **kwargs)


def _truth(plan, model, order):
    rows, columns = plan.grid
    cells = torch.arange(rows * columns).reshape(rows, columns)
    # The number of the image token that sees each cell of the user's image.
    if "image flipped left to right" in plan.odd:
        cells = cells.flip(1)
    elif "image upside down" in plan.odd:
        cells = cells.flip(0)
    elif "image transposed" in plan.odd or "patches column by column" in plan.odd:
        cells = torch.arange(rows * columns).reshape(columns, rows).T
    specials = plan.specials
    places = [order.index(name) for name in (*specials, *cells.flatten().tolist())]
    return Truth(
        order=places,
        specials=len(specials),
        grid=plan.grid,
        readout=None if plan.readout == "attention" else _readout(plan, model, cells),
        is_defined=not any(name in plan.odd for name in _NO_ANSWER),
    )


def _readout(plan, model, cells):
    """Weights of the tokens in the answer, special tokens first."""
    specials, count = len(plan.specials), plan.num_image_tokens
    weights = torch.zeros(specials + count, dtype=torch.float64)
    readout = "mean" if "read otherwise than stated" in plan.odd else plan.readout
    if "read from a register" in plan.odd:
        weights[plan.specials.index("register 0")] = 1
    elif readout in ("class", "class_mean"):
        weights[0] = 1
    elif readout == "distilled":
        weights[:2] = 1
    elif readout == "all":
        weights[:] = 1
    if readout in ("mean", "class_mean"):
        weights[specials:] = 1 / count
    if "weighted mean of the patches" in plan.odd:
        learned = next(p for name, p in model.named_parameters() if name.endswith("weights"))
        weights[specials:] = learned.detach().double().softmax(dim=0)[cells.flatten()].cpu()
    weights /= weights.sum()
    if "mean added after the blocks" in plan.odd:
        weights += 1 / len(weights)
    return weights / weights.sum()
