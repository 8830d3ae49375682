"""The fast forward of reflected images against the plain one, and when it is taken."""

import math
import warnings
from contextlib import contextmanager, nullcontext
from functools import partial

import pytest
import torch
from conftest import make_vit
from test_model_families import TIMM, timm_model
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from timm.models.vision_transformer import Attention, Block, VisionTransformer
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torchvision.models import VisionTransformer as TorchvisionTransformer
from torchvision.models.vision_transformer import MLPBlock

import captum_reflected.masking.masked_parts as masked_parts
from captum_reflected import (
    ReflectedRelevance,
    TokenLayout,
    TransformerAttribution,
    UnsupportedModelError,
    score_masks,
)
from captum_reflected.inputs.batch import Batch
from captum_reflected.masking import onednn, scoring
from captum_reflected.masking.masked_forward import (
    _Comparison,
    _tolerance,
    masked_forward,
    plain_forward,
)
from captum_reflected.masking.masked_parts import MaskedProjection, _ReadOutBlock
from captum_reflected.masking.model_structure import model_in
from captum_reflected.masking.module_copies import tuned
from captum_reflected.masking.precision import PRECISION_NAMES, canonical_precision
from captum_reflected.masking.reflection import reflected_images

# Their patches are not projected by a convolution of the images alone, or nobody has looked.
GENERIC = {"naflexvit", "naflexvit map", "qwen3", "gemma4"}
# Read their answer out of the first tokens, after a plain last block.
READ_OUT = {
    "vit",
    "patch 32",
    "patch 14",
    "patch 8",
    "CLIP tower",
    "CLIP quickgelu",
    "registers",
    "qk-norm",
    "layer scale",
    "deit",
    "deit distilled",
    "deit3",
    "flexivit",
}


def masked(model, images, grid_size, baselines=0.0, bf16=False):
    """Both answers for three masks an image, the fast one ``None`` where it is not taken."""
    generator = torch.Generator().manual_seed(2)
    masks = torch.rand(len(images) * 3, *grid_size, generator=generator)
    image = torch.arange(len(images)).repeat_interleave(3)
    shown = baselines
    if isinstance(baselines, torch.Tensor):
        baselines = baselines.expand_as(images)
        shown = baselines[image]
    with torch.no_grad():
        plain = model(reflected_images(images[image], masks[:, None], shown).squeeze(1))
        fast = masked_forward(model, images, grid_size, baselines, bf16=bf16)
        return plain, None if fast is None else fast(image, masks)


@contextmanager
def without_the_fast_forward():
    """Every model takes the generic path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "masked_forward", lambda *_, **__: None)
        yield


def reflected(model, images, target=1, *, may_be_fast, baselines=None, **options):
    """The scores of reflected images."""
    attributor = ReflectedRelevance(model, **options)
    with nullcontext() if may_be_fast else without_the_fast_forward():
        return attributor.reflect(images, target, baselines=baselines).scores


def assert_equal(plain, fast, tolerance=1e-4):
    """Equal to a share of the range of the logits."""
    assert fast is not None
    assert fast.dtype == plain.dtype
    span = (plain.amax() - plain.amin()).item()
    assert span > 0
    torch.testing.assert_close(fast, plain, rtol=0, atol=tolerance * span)


@pytest.mark.parametrize("kind", TIMM)
def test_every_family_of_timm(kind):
    name, options, size, layout = TIMM[kind]
    model = timm_model(name, options, size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    plain, fast = masked(model, images, layout.grid_size)
    if kind in GENERIC:
        assert fast is None
    else:
        assert_equal(plain, fast)


@pytest.mark.parametrize("kind", TIMM)
def test_the_map_is_the_same(kind):
    name, options, size, _ = TIMM[kind]
    model = timm_model(name, options, size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    for baselines in (None, 0.5, torch.randn(2, 3, *size)):
        plain, fast = (
            reflected(model, images, [1, 3], baselines=baselines, may_be_fast=may_be_fast)
            for may_be_fast in (False, True)
        )
        assert_equal(plain, fast)


@pytest.mark.parametrize(
    "baselines", [0.7, torch.randn(2, 3, 32, 32), torch.randn(1, 3, 32, 32)], ids=["0.7", "2", "1"]
)
def test_baselines(vit, baselines):
    assert_equal(*masked(vit, torch.randn(2, 3, 32, 32), (4, 4), baselines))


@pytest.mark.parametrize(
    ("options", "size", "grid_size"),
    [
        ({"img_size": (48, 24)}, (48, 24), (6, 3)),
        ({"dynamic_img_size": True}, (40, 56), (5, 7)),
        ({"reg_tokens": 4, "no_embed_class": True}, (32, 32), (4, 4)),
        ({"in_chans": 1}, (32, 32), (4, 4)),
        ({"qk_norm": True, "scale_attn_norm": True, "scale_mlp_norm": True}, (32, 32), (4, 4)),
        ({"proj_bias": False, "qkv_bias": False}, (32, 32), (4, 4)),
        ({"attn_drop_rate": 0.5, "drop_path_rate": 0.5, "pos_drop_rate": 0.5}, (32, 32), (4, 4)),
    ],
    ids=str,
)
def test_options_of_the_vision_transformer(options, size, grid_size):
    model = make_vit(**options)
    assert_equal(*masked(model, torch.randn(2, options.get("in_chans", 3), *size), grid_size))
    assert_equal(
        *masked(
            model.double(), torch.randn(2, options.get("in_chans", 3), *size).double(), grid_size
        ),
        tolerance=1e-12,
    )


def test_torchvision():
    model = TorchvisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=5,
    ).eval()
    nn.init.normal_(model.heads.head.weight)
    assert_equal(*masked(model, torch.randn(2, 3, 32, 32), (4, 4)))


@pytest.mark.parametrize("kind", sorted({*TIMM} - GENERIC))
def test_bf16(kind):
    """As near to float32 as the model is under autocast, or half as near."""
    name, options, size, layout = TIMM[kind]
    model = timm_model(name, options, size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    plain, fast = masked(model, images, layout.grid_size, bf16=True)
    with torch.autocast("cpu", torch.bfloat16):
        rough, _ = masked(model, images, layout.grid_size)
    error, expected = (fast - plain).norm(), (rough.float() - plain).norm()
    assert fast.dtype == torch.float32
    assert 0 < error < 2 * expected


def test_the_pretrained_model(deit, photos):
    images = torch.stack(list(photos.values())[:2])
    assert_equal(*masked(deit, images, (14, 14)))


@pytest.mark.parametrize("kind", TIMM)
def test_only_the_tokens_that_are_read_pass_the_last_block(kind):
    name, options, size, layout = TIMM[kind]
    model = timm_model(name, options, size)
    fast = masked_forward(model, torch.randn(1, 3, *size), layout.grid_size, 0.0)
    skips = fast is not None and any(isinstance(m, _ReadOutBlock) for m in fast._model.modules())
    assert skips == (kind in READ_OUT)


def test_bf16_is_for_the_reflected_forwards_alone(vit, images):
    expected = ReflectedRelevance(vit).reflect(images, 1)
    span = (expected.scores.amax() - expected.scores.amin()).item()
    for forward in (vit, lambda x: vit(x)):
        attributor = ReflectedRelevance(forward, precision="bf16")
        reflection = attributor.reflect(images, 1)
        assert torch.equal(reflection.relevance, expected.relevance)
        assert torch.equal(reflection.masks, expected.masks)
        assert reflection.scores.dtype == torch.float32
        error = (reflection.scores - expected.scores).abs().max().item()
        assert 1e-5 * span < error < 0.2 * span


def test_names_of_bf16(vit, images):
    masks = torch.rand(4, 4, 4)
    expected = score_masks(vit, images, masks, 1, precision="bf16")
    assert not torch.equal(score_masks(vit, images, masks, 1), expected)
    for name in ("bfloat16", torch.bfloat16):
        assert torch.equal(score_masks(vit, images, masks, 1, precision=name), expected)
        assert ReflectedRelevance(vit, precision=name).precision == "bf16"
    for name in ("fp16", torch.float32, "half", 16, [], True):
        with pytest.raises(ValueError, match=r"precision is .*; wanted: None or \"bf16\", also"):
            ReflectedRelevance(vit, precision=name)


def test_names_of_precisions():
    assert PRECISION_NAMES == ("float32", "bf16", "bfloat16", "fp16", "float16")
    assert [canonical_precision(name) for name in PRECISION_NAMES] == [
        "float32", "bf16", "bf16", "fp16", "fp16",
    ]  # fmt: skip
    for dtype, name in ((torch.float32, "float32"), (torch.float16, "fp16")):
        assert canonical_precision(dtype) == name
    with pytest.raises(ValueError, match="precision is 'fp8'; wanted: one of float32, bf16, "):
        canonical_precision("fp8")


def test_bf16_of_double_precision_is_left_to_autocast(vit, images):
    assert masked_forward(vit.double(), images.double(), (4, 4), 0.0, bf16=True) is None


@pytest.mark.slow
def test_bf16_maps_rank_as_float32_does(deit, photos):
    for image in [*photos.values()][:3]:
        target = int(deit(image[None]).argmax())
        ranks = torch.stack(
            [
                ReflectedRelevance(deit, precision=precision)
                .attribute(image[None], target)[0, 0]
                .flatten()
                .argsort()
                .argsort()
                .double()
                for precision in (None, "bf16")
            ]
        )
        assert torch.corrcoef(ranks)[0, 1] >= 0.99


# -- what is not fast -------------------------------------------------------------------


def overridden_method():
    model = make_vit()
    forward = model.forward
    model.forward = lambda x: forward(x) + x.mean()
    return model


def overridden_features():
    model = make_vit()
    features = model.forward_features
    model.forward_features = lambda x: features(x + 1)
    return model


def with_hook(register, part=lambda model: model):
    model = make_vit()
    getattr(part(model), register)(lambda *_: None)
    return model


def parametrized():
    model = make_vit()
    nn.utils.parametrizations.weight_norm(model.patch_embed.proj)
    return model


def in_training():
    model = make_vit(drop_path_rate=0.5)
    model.blocks[1].drop_path1.train()
    return model


def compiled_in_place():
    model = make_vit()
    model.blocks[0].compile()
    return model


class Handing(nn.Module):
    """A module that does nothing but call a model, unless told otherwise."""

    def __init__(self, model, run=lambda model, x: model(x)):
        super().__init__()
        self.model, self.run = model, run

    def forward(self, x):
        return self.run(self.model, x)


def doing(run):
    """A wrapper that calls the model and does something else."""
    return lambda: Handing(make_vit(), run).eval()


def without_gradients(model, x):
    with torch.no_grad():
        return model(x)


def under_autocast(model, x):
    with torch.autocast("cpu", torch.bfloat16):
        return model(x)


def twice(model, x):
    model(x)
    return model(x)


def in_training_mode(model, x):
    return model.train()(x)


def is_dark(x: torch.Tensor) -> bool:
    return bool(x.mean() < 9)


def by_torch_jit(model):
    """Looks at the images in code that is not Python's."""
    scripted = torch.jit.script(is_dark)
    return lambda x: model(x) if scripted(x) else -model(x)


def unseen_by_functions(model, x):
    with torch._C.DisableTorchFunction():
        dark = is_dark(x)
    return model(x) if dark else -model(x)


def ensemble():
    first, second = make_vit(), make_vit(qk_norm=True)
    return lambda x: first(x) + second(x)


HANDING_ON = {
    "lambda": lambda: (lambda model: lambda x: model(x))(make_vit()),
    "keyword": lambda: (lambda model: lambda x: model(x=x))(make_vit()),
    "call": lambda: make_vit().__call__,
    "partial": lambda: partial(lambda model, x: model(x), make_vit()),
    "module": lambda: Handing(make_vit()),
    "module in a module": lambda: Handing(Handing(make_vit())).eval(),
    "inside another module": lambda: nn.Sequential(nn.Identity(), make_vit()).eval(),
    "data parallel": lambda: nn.DataParallel(make_vit()),
    "without gradients": doing(without_gradients),
    "torch.compile": lambda: torch.compile(make_vit(), backend="eager"),
    "torch.compile of a module": lambda: torch.compile(Handing(make_vit()), backend="eager"),
}

UNKNOWN = {
    "normalisation": doing(lambda model, x: model((x - 0.5) / 0.5)),
    "no change": doing(lambda model, x: model(x.clone())),
    "another output": doing(lambda model, x: model(x) / 2),
    "a copy of the output": doing(lambda model, x: model(x)[:, :]),
    "a look at the values": doing(lambda model, x: model(x) if x.mean() < 9 else -model(x)),
    "a look at the batch size": doing(lambda model, x: model(x) if len(x) < 9 else -model(x)),
    "a look through NumPy": doing(lambda model, x: model(x) if x.numpy().max() < 9 else None),
    "a look by torch.jit": lambda: by_torch_jit(make_vit()),
    "a look without torch functions": doing(unseen_by_functions),
    "a look at the output": doing(
        lambda model, x: (lambda y: y if y.isfinite().all() else x)(model(x))
    ),
    "a part of the model": doing(lambda model, x: model.forward_head(model.forward_features(x))),
    "another argument": doing(lambda model, x: model(x, attn_mask=None)),
    "autocast": doing(under_autocast),
    "twice": doing(twice),
    "training mode": doing(in_training_mode),
    "ensemble": ensemble,
    "method": lambda: make_vit().forward,
    "forward of the instance": overridden_method,
    "forward_features of the instance": overridden_features,
    "forward hook": lambda: with_hook("register_forward_hook"),
    "forward pre-hook inside": lambda: with_hook("register_forward_pre_hook", lambda m: m.norm),
    "backward hook": lambda: with_hook(
        "register_full_backward_hook", lambda m: m.blocks[0].attn.proj
    ),
    "backward pre-hook": lambda: with_hook("register_full_backward_pre_hook"),
    "parametrization": parametrized,
    "training": in_training,
    "compiled part": compiled_in_place,
    "torch.jit": lambda: torch.jit.trace(make_vit(), torch.randn(1, 3, 32, 32)),
    "half precision": lambda: make_vit().bfloat16(),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_forwards_take_the_generic_path(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward = UNKNOWN[kind]()
    images = torch.randn(1, 3, 32, 32)
    for drop_hidden in (False, True, False):  # what a function does is remembered
        options = {"drop_hidden": drop_hidden}
        assert masked_forward(forward, images, (4, 4), 0.0, **options) is None
    with pytest.raises(UnsupportedModelError, match="drop_hidden is True"):
        score_masks(forward, images, torch.eye(16).view(16, 4, 4), 1, drop_hidden=True)


@pytest.mark.parametrize("kind", HANDING_ON)
def test_functions_that_only_call_the_model(kind, images):
    """They are as good as the model, and nothing is left on it."""
    forward, vit = HANDING_ON[kind](), make_vit()
    masks = torch.rand(5, 4, 4).gt(0.5).float()
    inside = model_in(forward)
    before = [vars(module).copy() for module in inside.modules()]
    for options in ({}, {"drop_hidden": True}, {"precision": "bf16"}):
        expected = score_masks(vit, images, masks, 1, **options)
        assert torch.equal(score_masks(forward, images, masks, 1, **options), expected)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MaskedProjection, "forward", lambda self, x: self._hidden)
        with pytest.raises(UnsupportedModelError, match="drop_hidden is True"):
            score_masks(forward, images, masks, 1, drop_hidden=True)
    assert [vars(module) for module in inside.modules()] == before


def test_a_function_is_judged_by_what_it_calls_now(images):
    """Not by what it called before: its module is exchanged."""
    forward, masks = Handing(make_vit()), torch.rand(5, 4, 4)
    score_masks(forward, images, masks, 1)
    forward.model = other = make_vit(num_classes=3, qk_norm=True)
    expected = score_masks(other, images, masks, 1, drop_hidden=True)
    assert torch.equal(score_masks(forward, images, masks, 1, drop_hidden=True), expected)


def test_other_arguments_are_not_handed_on(vit, images):
    def forward(x, *args):
        return vit(x)

    with pytest.raises(UnsupportedModelError, match="additional_forward_args"):
        score_masks(forward, images, torch.eye(16).view(16, 4, 4), 1, 3, drop_hidden=True)


def test_surroundings_that_take_the_generic_path(vit, images):
    def fast(grid_size=(4, 4)):
        return masked_forward(vit, images, grid_size, 0.0)

    assert fast() is not None
    assert fast((2, 8)) is None
    assert masked_forward(vit, images.double(), (4, 4), 0.0) is None
    with torch.autocast("cpu", torch.bfloat16):
        assert fast() is None
    with BaseTorchFunctionMode():
        assert fast() is None
    handle = nn.modules.module.register_module_forward_hook(lambda *_: None)
    try:
        assert fast() is None
    finally:
        handle.remove()
    assert fast() is not None


def attention_to_neighbours(self, x, *args, **kwargs):
    """To 2 tokens on either side, as somebody may replace the forward of timm's ``Attention``."""
    shape = (*x.shape[:2], 3, self.num_heads, -1)
    queries, keys, values = self.qkv(x).reshape(shape).permute(2, 0, 3, 1, 4)
    place = torch.arange(x.shape[1])
    near = (place - place[:, None]).abs() <= 2
    mixed = nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=near)
    return self.proj(mixed.transpose(1, 2).reshape_as(x))


def test_a_replaced_method_of_a_known_class(vit, images, monkeypatch):
    """Tokens are not left out if their order matters."""
    monkeypatch.setattr(Attention, "forward", attention_to_neighbours)
    assert masked_forward(vit, images, (4, 4), 0.0) is not None
    with pytest.raises(UnsupportedModelError, match="drop_hidden is True"):
        score_masks(vit, images, torch.eye(16).view(16, 4, 4), 1, drop_hidden=True)


def test_unknown_parts_are_computed_in_full():
    """A part that mixes tokens, in the last block or after it."""

    class Mixing(nn.Module):
        def forward(self, x):
            return x + x.mean(dim=1, keepdim=True)

    for place in (
        "norm",
        "blocks.2.mlp",
        "blocks.2.ls2",
        "blocks.1.mlp",
        "blocks.2.attn.proj_drop",
    ):
        model = make_vit()
        model.set_submodule(place, nn.Sequential(model.get_submodule(place), Mixing()))
        assert_equal(*masked(model.eval(), torch.randn(2, 3, 32, 32), (4, 4)))


def test_distilled_head_of_another_class():
    class Doubled(VisionTransformerDistilled):
        def forward_head(self, x, pre_logits=False):
            return self.head(x.mean(dim=1))

    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = Doubled(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7
        )
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    assert_equal(*masked(model.eval(), torch.randn(2, 3, 32, 32), (4, 4)))


class Mean(nn.Module):
    def forward(self, x):
        return x - x.mean()


@pytest.mark.parametrize(
    ("module", "fuses"),
    [
        (Mlp(8, 16), True),
        (Mlp(8, 16, act_layer=partial(nn.GELU, approximate="tanh")), True),
        (MLPBlock(8, 16, 0.0), True),
        (Mlp(8, 16, act_layer=nn.SiLU), False),
        (nn.Sequential(Mean(), nn.GELU(), nn.Linear(8, 8)), False),
    ],
)
def test_gelu_in_one_pass_with_the_layer_before_it(module, fuses):
    module = module.eval()
    inputs = torch.randn(3, 5, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = module(inputs)
        fast = tuned(module, on_cpu=True, bf16=False, num_tokens=5)
        assert any(getattr(part, "gelu", None) for part in fast.modules()) == fuses
        assert not (fuses and any(isinstance(part, nn.GELU) for part in fast.modules()))
        torch.testing.assert_close(fast(inputs), expected)
        with torch.backends.mkldnn.flags(enabled=False):
            torch.testing.assert_close(fast(inputs), expected)


# -- changed models ----------------------------------------------------------------------


def changed(change, **options):
    model = make_vit(**options)
    model = change(model) or model
    with torch.random.fork_rng():
        torch.manual_seed(3)
        for module in model.modules():
            if getattr(module, "is_new", False):
                nn.init.normal_(module.weight, std=0.5)
    return model.eval()


def new(layer):
    layer.is_new = True
    return layer


class Twice(nn.Sequential):
    def forward(self, x):
        for _ in range(2):
            x = super().forward(x)
        return x


def unfused(model):
    for block in model.blocks:
        block.attn.fused_attn, block.attn.scale = False, 2.0


def mixed_attention(model):
    model.blocks[-1].attn.fused_attn = False
    model.blocks[-1].attn.attn_drop = new(nn.Linear(17, 17))


CHANGED = {
    "a block twice": lambda m: m.blocks.__setitem__(2, m.blocks[0]),
    "the last block before": lambda m: m.blocks.__setitem__(0, m.blocks[2]),
    "all blocks twice": lambda m: setattr(m, "blocks", nn.Sequential(*(list(m.blocks) * 2))),
    "blocks in a loop": lambda m: setattr(m, "blocks", Twice(*m.blocks)),
    "drop_path1": lambda m: setattr(m.blocks[-1], "drop_path1", new(nn.Linear(32, 32))),
    "drop_path2": lambda m: setattr(m.blocks[-1], "drop_path2", new(nn.LayerNorm(32))),
    "proj_drop": lambda m: setattr(m.blocks[-1].attn, "proj_drop", new(nn.Linear(32, 32))),
    "attn_drop": mixed_attention,
    "scale": unfused,
    "sequence norm": lambda m: setattr(m.blocks[-1], "norm2", nn.LayerNorm((17, 32))),
    "sequence norm at the end": lambda m: setattr(m, "norm", nn.LayerNorm((17, 32))),
    "spectral norm": lambda m: (
        nn.utils.parametrizations.spectral_norm(m.blocks[1].mlp.fc1) and None
    ),
    "parametrized projection": lambda m: (
        nn.utils.parametrizations.weight_norm(m.patch_embed.proj) and None
    ),
}
# Their parts cannot be copied, or take all tokens.
NOT_FAST = {"sequence norm", "sequence norm at the end", "spectral norm"}


@pytest.mark.parametrize("kind", CHANGED)
@pytest.mark.parametrize("baseline", [0.0, 0.3])
def test_changed_models(kind, baseline, images):
    model = changed(CHANGED[kind])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plain, fast = masked(model, images, (4, 4), baseline)
    if kind not in NOT_FAST:
        assert_equal(plain, fast)
    layout = TokenLayout(1, (4, 4), "class")
    plain, fast = (
        reflected(model, images, baselines=baseline, token_layout=layout, may_be_fast=may_be_fast)
        for may_be_fast in (False, True)
    )
    assert_equal(plain, fast)


def test_other_versions_of_timm(monkeypatch, images):
    """``attn_dim`` and ``gate`` came with 1.0.28; the block and its forward have other names."""

    def forward(self, x, attn_mask=None, is_causal=False):
        q, k, v = self.qkv(x).unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        x = nn.functional.scaled_dot_product_attention(self.q_norm(q), self.k_norm(k), v)
        return self.proj_drop(self.proj(self.norm(x.transpose(1, 2).flatten(2))))

    forward.__module__, forward.__qualname__ = Attention.__module__, "Attention.forward"
    monkeypatch.setattr(Attention, "forward", forward)
    model = make_vit()
    for block in model.blocks:
        block.attn.__dict__.pop("attn_dim", None)
        for kept in (vars(block.attn), block.attn._modules):
            kept.pop("gate", None)
    assert_equal(*masked(model, images, (4, 4)))
    masks = torch.eye(16).view(16, 4, 4)
    assert score_masks(model, images, masks, 1, drop_hidden=True).isfinite().all()


@pytest.mark.parametrize(
    "operation",
    [None, lambda *_: torch.zeros(1), torch.add],
    ids=["none", "another", "other arguments"],
)
def test_a_version_of_torch_without_the_private_linear_layer(operation, vit, images, monkeypatch):
    onednn.can_run.cache_clear()
    monkeypatch.setattr(onednn, "linear_operation", lambda: operation)
    try:
        assert not onednn.can_run(torch.float32)
        assert_equal(*masked(vit, images, (4, 4)))
    finally:
        onednn.can_run.cache_clear()


@pytest.mark.parametrize("name", ["_global_forward_hooks", "_global_backward_pre_hooks"])
def test_a_version_of_torch_without_what_is_looked_at(name, vit, images, monkeypatch):
    monkeypatch.delattr(nn.modules.module, name)
    assert masked_forward(vit, images, (4, 4), 0.0) is None


# -- the trial ---------------------------------------------------------------------------


class Brighter(VisionTransformer):
    def forward(self, x):
        return super().forward(2 * x + 1)


def brighter():
    model = make_vit()
    model.__class__ = Brighter
    return model


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_a_large_difference_is_told_once_for_each_model(precision, images):
    for model in (brighter(), brighter()):
        expected = reflected(model, images, may_be_fast=False, precision=precision)
        with pytest.warns(UserWarning, match="on this Brighter, and its outputs are off by"):
            scores = reflected(model, images, may_be_fast=True, precision=precision)
        assert torch.equal(scores, expected)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            reflected(model, images, may_be_fast=True, precision=precision)


@pytest.mark.parametrize("part", ["MaskedProjection", "_ReadOutBlock", "_InBf16"])
def test_what_goes_wrong_in_the_fast_forward_is_not_told(part, vit, images, monkeypatch):
    precision = "bf16" if part == "_InBf16" else None
    expected = reflected(vit, images, may_be_fast=False, precision=precision)
    reached = []

    def forward(self, *args, **kwargs):
        reached.append(part)
        raise RuntimeError("no kernel for this")

    monkeypatch.setattr(getattr(masked_parts, part), "forward", forward)
    modules = [vars(module).copy() for module in vit.modules()]
    state = torch.get_rng_state()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.equal(reflected(vit, images, may_be_fast=True, precision=precision), expected)
    assert reached
    assert torch.equal(torch.get_rng_state(), state)
    assert [vars(module) for module in vit.modules()] == modules


def test_a_forward_that_is_right_for_the_first_image_alone_is_found_out(vit, images, monkeypatch):
    forward = MaskedProjection.forward

    def of_the_first(self, tokens):
        self.image = torch.zeros_like(self.image)
        return forward(self, tokens)

    monkeypatch.setattr(MaskedProjection, "forward", of_the_first)
    assert masked_forward(vit, images[:1], (4, 4), 0.0) is not None
    with pytest.warns(UserWarning, match="off by"):
        assert masked_forward(vit, images, (4, 4), 0.0, forwards=48) is None


def test_a_forward_that_is_wrong_in_one_output_is_found_out(vit, images):
    plain = plain_forward(vit, Batch(images, (), None, is_tuple=False), 0.0)
    comparison = _Comparison(plain, images, (4, 4), None, None, None)

    def wrong(image, masks):
        return plain(image, masks) + 0.01 * torch.eye(7)[3] * (image == 1)[:, None]

    with torch.no_grad():
        assert comparison.mismatch(plain) == 0
        assert comparison.mismatch(wrong) > 2e-3
        assert comparison.mismatch(lambda image, masks: plain(image, masks) * math.nan) != 0


def test_a_forward_that_draws_random_numbers(vit, images):
    class Drawing(nn.Module):
        def forward(self, x):
            return nn.functional.dropout(x, 0.5, training=True)

    vit.norm = nn.Sequential(vit.norm, Drawing())
    with pytest.warns(UserWarning, match="off by"):
        assert masked_forward(vit.eval(), images, (4, 4), 0.0) is None


@pytest.mark.slow
@pytest.mark.parametrize(("precision", "extra"), [(None, 4), ("bf16", 6)])
def test_what_the_trial_costs(precision, extra, monkeypatch):
    """2 % for 196 tokens, and no forward of more rows than were asked for."""
    model = make_vit(img_size=56, patch_size=4)
    images = torch.randn(2, 3, 56, 56, generator=torch.Generator().manual_seed(1))
    forward_head, rows = VisionTransformer.forward_head, []

    def counted(self, x, *args, **kwargs):
        rows.append(len(x))
        return forward_head(self, x, *args, **kwargs)

    TransformerAttribution(model).attribute(images, 1)  # what is proved once a model
    monkeypatch.setattr(VisionTransformer, "forward_head", counted)
    totals = []
    for may_be_fast in (False, True):
        rows.clear()
        attributor = ReflectedRelevance(model, precision=precision)
        with nullcontext() if may_be_fast else without_the_fast_forward():
            attributor.reflect(images, 1, perturbations_per_eval=2)
        assert max(rows) == 4
        totals.append(sum(rows))
    assert totals[1] - totals[0] == 2 * extra


@pytest.mark.parametrize("kind", ["shared", "subclass", "adapter", "loop", "projection"])
def test_tokens_of_a_changed_model_are_not_left_out(kind, images, monkeypatch):
    model = make_vit()
    if kind == "shared":
        model.blocks[2] = model.blocks[1]
    if kind == "subclass":
        model.blocks[1].__class__ = type("Block", (Block,), {})
    if kind == "adapter":
        model.blocks[1].ls1 = nn.Softmax(dim=1)
    if kind == "loop":
        model.blocks.__class__ = Twice
    if kind == "projection":  # and what is known still has to be right
        monkeypatch.setattr(MaskedProjection, "forward", lambda self, x: self._hidden)
    with pytest.raises(UnsupportedModelError, match="drop_hidden is True"):
        score_masks(model, images, torch.eye(16).view(16, 4, 4), 1, drop_hidden=True)


def test_the_model_is_left_as_it_was(vit, images):
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    modules = dict(vit.named_modules())
    attributes = {name: dict(vars(module)) for name, module in modules.items()}
    for bf16 in (False, True):
        masked(vit, images, (4, 4), bf16=bf16)
    assert dict(vit.named_modules()) == modules
    for name, module in modules.items():
        assert vars(module) == attributes[name]
    for name, value in vit.state_dict().items():
        assert torch.equal(value, before[name])


def test_more_rounding_is_allowed_for_only_where_tf32_may_be_used():
    class Images:
        device = torch.device("cuda")

        def __init__(self, dtype):
            self.dtype = dtype

    settings = torch.backends.cuda.matmul, torch.backends.cudnn
    before = [setting.allow_tf32 for setting in settings]
    try:
        for allowed in ((False, False), (True, False), (False, True)):
            for setting, value in zip(settings, allowed, strict=True):
                setting.allow_tf32 = value
            assert (_tolerance(Images(torch.float32), bf16=False) > 0.01) == any(allowed)
            assert _tolerance(Images(torch.float64), bf16=False) < 0.01
            assert _tolerance(torch.ones(1), bf16=False) < 0.01
    finally:
        for setting, value in zip(settings, before, strict=True):
            setting.allow_tf32 = value
