"""The fast forward of reflected images against the plain one, and when it is taken."""

import warnings
from functools import partial

import pytest
import torch
from conftest import make_vit
from test_model_families import TIMM, timm_model
from timm.layers import Mlp
from timm.models.deit import VisionTransformerDistilled
from torch import nn
from torch.overrides import BaseTorchFunctionMode
from torchvision.models import VisionTransformer as TorchvisionTransformer
from torchvision.models.vision_transformer import MLPBlock

from captum_reflected import ReflectedRelevance
from captum_reflected._exchange import tuned
from captum_reflected.masked_forward import masked_forward
from captum_reflected.reflection import reflected_images

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


@pytest.mark.parametrize("kind", ["vit", "SigLIP tower", "eva02", "cait", "naflexvit"])
def test_the_map_is_the_same(kind):
    name, options, size, _ = TIMM[kind]
    model = timm_model(name, options, size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    fast, plain = ReflectedRelevance(model), ReflectedRelevance(model)
    plain._may_be_fast = False
    for baselines in (None, 0.5, torch.randn(2, 3, *size)):
        scores = fast.reflect(images, [1, 3], baselines=baselines).scores
        assert_equal(plain.reflect(images, [1, 3], baselines=baselines).scores, scores)


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
    skips = fast is not None and type(fast._model.blocks[-1]) is not type(model.blocks[-1])
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
    with pytest.raises(ValueError, match=r"precision is 'fp16'; wanted: None or \"bf16\""):
        ReflectedRelevance(vit, precision="fp16")


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


# -- what is not known to be exact -------------------------------------------------------


class Overridden(type(make_vit())):
    def forward(self, x):
        return super().forward(x * 2)


def overridden_class():
    model = make_vit()
    model.__class__ = Overridden
    return model


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


UNKNOWN = {
    "function": lambda: make_vit().__call__,
    "overridden forward": overridden_class,
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
    "torch.compile": lambda: torch.compile(make_vit()),
    "compiled part": compiled_in_place,
    "data parallel": lambda: nn.DataParallel(make_vit()),
    "torch.jit": lambda: torch.jit.trace(make_vit(), torch.randn(1, 3, 32, 32)),
    "inside another module": lambda: nn.Sequential(make_vit()).eval(),
    "half precision": lambda: make_vit().bfloat16(),
}


@pytest.mark.parametrize("kind", UNKNOWN)
def test_unknown_forwards_take_the_generic_path(kind):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        forward = UNKNOWN[kind]()
    assert masked_forward(forward, torch.randn(1, 3, 32, 32), (4, 4), 0.0) is None


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
