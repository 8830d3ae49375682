"""Choices that make a Vision Transformer, drawn at random.

Most of them are what ordinary models make. ``Plan.odd`` names what is out of the ordinary.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from captum_reflected import TokenLayout

OWN, TIMM, TORCHVISION = FAMILIES = ("own", "timm", "torchvision")
CLASSES = 5
ATTENTION = (
    "fused",
    "by hand",
    "functional",
    "Softmax module",
    "einsum",
    "MultiheadAttention",
    "MultiheadAttention with weights",
)
WRAPS = ("module", "sequential", "standardised", "lambda", "method", "partial")


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
PREPARATIONS = (*_RASTER, "image resized", "two views averaged")
_REGISTERED = ("registers after the patches", "read from a register")
NO_ANSWER = (
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
        readouts = [
            "mean",
            "all",
            "attention",
            *(["class", "class", "distilled"] if class_token else []),
        ]
        if family == OWN and class_token:
            readouts.append("class_mean")
        plan = replace(
            plan,
            class_token=class_token,
            readout=choose(readouts),
            attention=choose(ATTENTION if family == OWN else ("fused", "by hand")),
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
