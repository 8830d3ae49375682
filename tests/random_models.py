"""Vision Transformers by plan, each of which can also spell its attention out.

``build(plan)`` makes the same model each time. With a list as ``record``, every attention of
the model computes its probabilities in plain arithmetic and appends them to the list, whatever
operations the model uses otherwise.
"""

from __future__ import annotations

import functools
import math
import types
from collections import OrderedDict
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from random_attention import STYLES, Attention, AttentionPool, spell_out
from random_plans import CLASSES, NO_ANSWER, ODDITIES, OWN, PREPARATIONS, TIMM, TORCHVISION
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import ResPostBlock
from timm.models.vision_transformer import VisionTransformer as TimmTransformer
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer as TorchvisionTransformer

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
        self.inner, self.reentrant, self.record = inner, reentrant, None

    def forward(self, tokens):
        # A second forward would be recorded, too.
        if self.record is None and torch.is_grad_enabled():
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
    odd = [name for name in plan.odd if name in STYLES]
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
        if name in PREPARATIONS:
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
    odd = [name for name in plan.odd if name in STYLES]
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
        is_defined=not any(name in plan.odd for name in NO_ANSWER),
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
