"""Attention in many operations, and the same spelled out with its probabilities kept."""

from __future__ import annotations

import functools
import math

import torch
import torch.nn.functional as F
from timm.layers import AttentionPoolLatent
from timm.layers.attention import Attention as TimmAttention
from torch import nn


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


_OF_SCORES = {
    "by hand": lambda s: s.softmax(dim=-1),
    "functional": lambda s: F.softmax(s, dim=-1),
    "Softmax module": lambda s: nn.Softmax(dim=-1)(s),
    "log_softmax and exp": lambda s: s.log_softmax(dim=-1).exp(),
    "aten.softmax": lambda s: torch.ops.aten.softmax.int(s, -1),
    "aten._softmax": lambda s: torch.ops.aten._softmax(s, -1, False),
    "torch.special.softmax": lambda s: torch.special.softmax(s, dim=-1),
    "softmin of negative scores": lambda s: F.softmin(-s, dim=-1),
    "scripted softmax": lambda s: _scripted()(s),
    "sigmoid attention": lambda s: s.sigmoid() / s.shape[-1],
}
# From queries, keys and values (B, h, N, d) and a mask to what is attended (B, h, N, d).
STYLES = {
    "fused": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, attn_mask=mask),
    "einsum": _einsum,
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
    "talking heads": None,  # mixes its maps by weights of its own
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
            attended = STYLES[self.style](q, k, v, self.mask)
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
        if hasattr(module, "record"):
            module.record = record
        if not isinstance(module, Attention):
            for name, child in module.named_children():
                if type(child) in _SPELLED:
                    setattr(module, name, _SPELLED[type(child)](child, record))
