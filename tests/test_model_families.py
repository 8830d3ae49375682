"""Every family of models that is explained, against attention maps obtained another way."""

import warnings
from typing import get_args, get_type_hints
from unittest import mock

import naive
import open_clip
import pytest
import timm
import torch
import torch.nn.functional as F
import transformers
from conftest import make_vit
from open_clip.transformer import VisionTransformer as OpenClipTower
from timm.models.vision_transformer import ParallelScalingBlock, VisionTransformer
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import (
    ReflectedRelevance,
    TokenLayout,
    TransformerAttribution,
    UnsupportedModelError,
)

TARGETS = [2, 1]


def randomised(model, std=0.2):
    """Random weights, so that no part of the model starts without effect."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * std)
    return model.eval()


# -- the slow way ------------------------------------------------------------------------


def plain_attention(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None):
    """scaled_dot_product_attention as its documentation has it, through the patched softmax."""
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        scores = scores + torch.full(scores.shape[-2:], float("-inf")).triu(1)
    if attn_mask is not None:
        as_bias = torch.zeros_like(attn_mask, dtype=scores.dtype)
        scores = scores + (
            as_bias.masked_fill(~attn_mask, float("-inf"))
            if attn_mask.dtype == torch.bool
            else attn_mask
        )
    return F.softmax(scores, dim=-1) @ value


def softmax_maps(forward, image, target):
    """Every softmax over the last dimension of a forward, and its gradient: (h, Q, M) each."""
    maps = []
    softmax = torch.softmax

    def record(scores, dim=None, *args, **kwargs):
        kwargs.pop("_stacklevel", None)
        output = softmax(scores, dim, *args, **kwargs)
        if output.dim() > 2 and dim in (-1, output.dim() - 1) and output.requires_grad:
            output.retain_grad()
            maps.append(output)
        return output

    with (
        mock.patch.object(torch.Tensor, "softmax", record),
        mock.patch.object(F, "softmax", record),
        mock.patch.object(F, "scaled_dot_product_attention", plain_attention),
    ):
        forward(image[None].requires_grad_())[0, target].backward()
    # nn.MultiheadAttention has (B * h, Q, M).
    return [
        (a.detach().reshape(-1, *a.shape[-2:]), a.grad.reshape(-1, *a.shape[-2:]))
        for a in maps
        if a.grad is not None
    ]


def slow_relevance(maps, parallel=1):
    """R by naive.relevance_matrix, maps of parallel attention as heads of one layer; and w."""
    square = [pair for pair in maps if pair[0].shape[-1] == pair[0].shape[-2]]
    layers = [
        tuple(torch.cat(side) for side in zip(*square[start : start + parallel], strict=True))
        for start in range(0, len(square), parallel)
    ]
    matrix = naive.relevance_matrix(layers)
    pooling = maps[len(square) :]
    return matrix, naive.pooling_weights(pooling, len(matrix)) if pooling else None


def state_of(model):
    """What a trace would show in."""
    return (
        {name: (value.clone(), value.requires_grad) for name, value in model.named_parameters()},
        [
            (module.training, len(module._forward_hooks), vars(module).keys())
            for module in model.modules()
        ],
        [parameter.grad for parameter in model.parameters()],
    )


def checked(forward_func):
    """Holds every answer of a forward against that of a plain call."""

    def forward(images):
        answer = forward_func(images)
        with torch._C.DisableTorchFunction(), torch.no_grad():
            torch.testing.assert_close(answer, forward_func(images), rtol=1e-5, atol=1e-5)
        return answer

    return forward


def check(model, forward_func, layout, size, parallel=1, maps_of=softmax_maps):
    """R, the map, the answer and the model's state, for a batch of two."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    images_before = images.clone()
    expected = []
    for image, target in zip(images, TARGETS, strict=True):
        maps = maps_of(forward_func, image, target)
        expected.append(slow_relevance(maps, parallel))
        model.zero_grad(set_to_none=True)
    names, modules, grads = state_of(model)
    explained = TransformerAttribution(checked(forward_func), token_layout=layout)
    relevance = explained.relevance(images, TARGETS)
    attributions = TransformerAttribution(forward_func).attribute(images, TARGETS)
    for index, (matrix, weights) in enumerate(expected):
        torch.testing.assert_close(relevance[index], matrix, rtol=1e-3, atol=1e-6)
        weights = layout.readout_weights() if weights is None else weights
        row = (weights @ matrix)[layout.num_prefix_tokens :].reshape(1, 1, *layout.grid_size)
        assert row.max() > row.min()
        row = F.interpolate(row, size, mode="bilinear")
        torch.testing.assert_close(attributions[index, :1], row[0], rtol=1e-3, atol=1e-6)

    after = state_of(model)
    assert after[1:] == (modules, grads)
    for name, (value, requires_grad) in after[0].items():
        assert torch.equal(value, names[name][0])
        assert requires_grad == names[name][1]
    assert torch.equal(images, images_before)
    assert not images.requires_grad


# -- timm --------------------------------------------------------------------------------

SMALL = {"depth": 2, "embed_dim": 32, "num_heads": 2, "num_classes": 5}
CLASS = TokenLayout(1, (4, 4), "class")
MEAN = TokenLayout(0, (4, 4), "mean")
POOLED = TokenLayout(0, (4, 4), "attention")

# Name in timm, options beyond SMALL, image size, layout with readout.
TIMM = {
    "vit": ("vit_tiny_patch16_224", {}, (64, 64), CLASS),
    "patch 32": ("vit_base_patch32_224", {}, (128, 128), CLASS),
    "patch 14": ("vit_small_patch14_dinov2", {}, (56, 56), CLASS),
    "patch 8": ("vit_base_patch8_224", {}, (32, 32), CLASS),
    "CLIP tower": ("vit_base_patch16_clip_224", {}, (64, 64), CLASS),
    "CLIP quickgelu": ("vit_base_patch16_clip_quickgelu_224", {}, (64, 64), CLASS),
    "SigLIP tower": ("vit_base_patch16_siglip_224", {}, (64, 64), POOLED),
    "SigLIP gap": ("vit_base_patch16_siglip_gap_224", {}, (64, 64), MEAN),
    "map, prefix read too": (
        "vit_so150m2_patch16_reg1_gap_256",
        {"global_pool": "map", "pool_include_prefix": True},
        (64, 64),
        TokenLayout(1, (4, 4), "attention"),
    ),
    "map, prefix not read": (
        "vit_base_patch16_224",
        {"global_pool": "map"},
        (64, 64),
        TokenLayout(1, (4, 4), "attention"),
    ),
    "registers": ("vit_small_patch14_reg4_dinov2", {}, (56, 56), TokenLayout(5, (4, 4), "class")),
    "gap with registers": (
        "vit_medium_patch16_reg4_gap_256",
        {},
        (64, 64),
        TokenLayout(4, (4, 4), "mean"),
    ),
    "gap over all tokens": (
        "vit_medium_patch16_reg4_gap_256",
        {"pool_include_prefix": True},
        (64, 64),
        TokenLayout(4, (4, 4), "all"),
    ),
    "qk-norm": ("vit_base_patch16_224", {"qk_norm": True}, (64, 64), CLASS),
    "layer scale": ("vit_base_patch16_224", {"init_values": 0.5}, (64, 64), CLASS),
    "parallel scaling": (
        "vit_base_patch16_224",
        {"block_fn": ParallelScalingBlock},
        (64, 64),
        CLASS,
    ),
    "parallel blocks": ("vit_small_patch16_18x2_224", {}, (64, 64), CLASS),
    "residual post-norm": ("vit_base_patch16_rpn_224", {}, (64, 64), MEAN),
    "rope": ("vit_base_patch16_rope_224", {}, (64, 64), CLASS),
    "rope mixed": ("vit_base_patch16_rope_mixed_224", {}, (64, 64), CLASS),
    "prr pooling": ("vit_base_patch16_224", {"global_pool": "prr"}, (64, 64), CLASS),
    "deit": ("deit_tiny_patch16_224", {}, (64, 64), CLASS),
    "deit distilled": (
        "deit_tiny_distilled_patch16_224",
        {},
        (64, 64),
        TokenLayout(2, (4, 4), "distilled"),
    ),
    "deit3": ("deit3_small_patch16_224", {}, (64, 64), CLASS),
    "beit": ("beit_base_patch16_224", {}, (64, 64), TokenLayout(1, (4, 4), "mean")),
    "beitv2": ("beitv2_base_patch16_224", {}, (64, 64), TokenLayout(1, (4, 4), "mean")),
    "eva": ("eva_giant_patch14_224", {}, (56, 56), TokenLayout(1, (4, 4), "mean")),
    "eva02": ("eva02_base_patch14_224", {}, (56, 56), TokenLayout(1, (4, 4), "mean")),
    "dinov3": ("vit_small_patch16_dinov3", {}, (64, 64), TokenLayout(5, (4, 4), "mean")),
    "perception encoder": (
        "vit_pe_core_tiny_patch16_384",
        {},
        (64, 64),
        TokenLayout(1, (4, 4), "attention"),
    ),
    # Unfused, its two maps a head are one map of twice as many heads.
    "differential": (
        "vit_dlittle_patch16_reg1_gap_256",
        {},
        (64, 64),
        TokenLayout(1, (4, 4), "mean"),
    ),
    "flexivit": ("flexivit_small", {}, (64, 64), CLASS),
    "relative position": ("vit_relpos_small_patch16_224", {}, (64, 64), MEAN),
    "relative position, class": (
        "vit_relpos_base_patch16_cls_224",
        {},
        (64, 64),
        CLASS,
    ),
    "shared relative position": ("vit_srelpos_small_patch16_224", {}, (64, 64), MEAN),
    "cait": ("cait_xxs24_224", {}, (64, 64), POOLED),
    "aimv2": ("aimv2_large_patch14_224", {}, (56, 56), MEAN),
    "naflexvit": ("naflexvit_base_patch16_gap", {}, (64, 64), TokenLayout(4, (4, 4), "mean")),
    "naflexvit map": (
        "naflexvit_base_patch16_map",
        {},
        (64, 64),
        TokenLayout(1, (4, 4), "attention"),
    ),
    "qwen3": ("qwen3_vit_416m", {}, (64, 64), MEAN),
    "gemma4": ("gemma4_vit_167m", {"embed_dim": 64}, (64, 64), MEAN),
}


def skip_unless_known(name, pooling=""):
    """Skips a family that the installed timm is too old for."""
    if not timm.is_model(name):
        pytest.skip(f"timm {timm.__version__} has no {name}")
    if pooling not in get_args(get_type_hints(VisionTransformer.__init__)["global_pool"]):
        pytest.skip(f"timm {timm.__version__} has no pooling {pooling!r}")


def timm_model(name, options, size):
    skip_unless_known(name, options.get("global_pool", ""))
    options = {**SMALL, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = timm.create_model(name, img_size=size, **options)
        except TypeError:  # takes images of any size
            model = timm.create_model(name, **options)
    return randomised(model)


def unfused_timm_maps(model):
    """The maps of timm's own unfused attention, which is another code path than the fused."""

    def maps_of(forward, image, target):
        fused = [module for module in model.modules() if getattr(module, "fused_attn", False)]
        for module in fused:
            module.fused_attn = False
        try:
            return softmax_maps(forward, image, target)
        finally:
            for module in fused:
                module.fused_attn = True

    return maps_of


@pytest.mark.parametrize("kind", TIMM)
def test_timm(kind):
    name, options, size, layout = TIMM[kind]
    model = timm_model(name, options, size)
    check(
        model,
        model,
        layout,
        size,
        parallel=2 if kind == "parallel blocks" else 1,
        maps_of=unfused_timm_maps(model),
    )


# -- torchvision, transformers, open_clip ------------------------------------------------


def test_torchvision():
    model = randomised(
        TorchvisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=2,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=5,
        )
    )
    check(model, model, CLASS, (32, 32))


HF_SMALL = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
    "patch_size": 8,
    "num_labels": 5,
}
# Classes of the model and of its configuration, options beyond HF_SMALL, layout.
HUGGING_FACE = {
    "ViT": ("ViTForImageClassification", "ViTConfig", {}, CLASS),
    "DeiT": ("DeiTForImageClassification", "DeiTConfig", {}, TokenLayout(2, (4, 4), "class")),
    "DeiT distilled": (
        "DeiTForImageClassificationWithTeacher",
        "DeiTConfig",
        {},
        TokenLayout(2, (4, 4), "distilled"),
    ),
    "BEiT": (
        "BeitForImageClassification",
        "BeitConfig",
        {"use_relative_position_bias": True},
        TokenLayout(1, (4, 4), "mean"),
    ),
    "BEiT, class token": (
        "BeitForImageClassification",
        "BeitConfig",
        {"use_mean_pooling": False, "use_shared_relative_position_bias": True},
        CLASS,
    ),
    "DINOv2": (
        "Dinov2ForImageClassification",
        "Dinov2Config",
        {},
        TokenLayout(1, (4, 4), "class_mean"),
    ),
    "DINOv2 with registers": (
        "Dinov2WithRegistersForImageClassification",
        "Dinov2WithRegistersConfig",
        {"num_register_tokens": 3},
        TokenLayout(4, (4, 4), "class_mean"),
    ),
    "SigLIP": ("SiglipForImageClassification", "SiglipConfig", {}, MEAN),
    "CLIP": ("CLIPForImageClassification", "CLIPConfig", {}, TokenLayout(1, (4, 4), "mean")),
}


def hugging_face(model_class, config_class, options, attention):
    options = {**HF_SMALL, **options}
    if config_class in ("SiglipConfig", "CLIPConfig"):
        labels = options.pop("num_labels")
        options = {"vision_config": options, "num_labels": labels}
    config = getattr(transformers, config_class)(**options, attn_implementation=attention)
    return randomised(getattr(transformers, model_class)(config))


def reported_maps(model):
    """The maps that the model itself reports, with their gradients by autograd."""

    def maps_of(_forward, image, target):
        output = model(pixel_values=image[None], output_attentions=True)
        attentions = output.attentions
        gradients = torch.autograd.grad(output.logits[0, target], attentions)
        return [(a[0].detach(), g[0]) for a, g in zip(attentions, gradients, strict=True)]

    return maps_of


class Logits(nn.Module):
    """What makes a classifier of transformers a module that returns a tensor."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return self.model(pixel_values=images).logits


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("wrap", ["itself", "module"])
@pytest.mark.parametrize("kind", HUGGING_FACE)
def test_hugging_face(kind, wrap, attention):
    model_class, config_class, options, layout = HUGGING_FACE[kind]
    model = hugging_face(model_class, config_class, options, attention)
    reporting = hugging_face(model_class, config_class, options, "eager")
    forward_func = Logits(model) if wrap == "module" else model
    check(model, forward_func, layout, (32, 32), maps_of=reported_maps(reporting))


def test_hugging_face_siglip_attention_pooling():
    config = transformers.SiglipVisionConfig(**HF_SMALL)
    model = randomised(transformers.SiglipVisionModel(config))
    check(model, lambda x: model(pixel_values=x).pooler_output, POOLED, (32, 32))


def test_hugging_face_clip_tower():
    config = transformers.CLIPVisionConfig(**HF_SMALL, projection_dim=5)
    model = randomised(transformers.CLIPVisionModelWithProjection(config))
    check(model, lambda x: model(pixel_values=x).image_embeds, CLASS, (32, 32))


OPEN_CLIP_TOWERS = {
    "class token": ({}, CLASS),
    "mean pooling": ({"pool_type": "avg"}, TokenLayout(1, (4, 4), "mean")),
    "attention pooling": (
        {"attentional_pool": True, "attn_pooler_queries": 3, "attn_pooler_heads": 2},
        TokenLayout(1, (4, 4), "attention"),
    ),
}


@pytest.mark.parametrize("kind", OPEN_CLIP_TOWERS)
def test_open_clip_tower(kind):
    options, layout = OPEN_CLIP_TOWERS[kind]
    tower = OpenClipTower(
        image_size=32,
        patch_size=8,
        width=32,
        layers=2,
        heads=2,
        mlp_ratio=2,
        output_dim=16,
        **options,
    )
    randomised(tower)
    check(tower, tower, layout, (32, 32))
    check(tower, lambda x: tower(x), layout, (32, 32))


# -- image and text in one forward -------------------------------------------------------

# As many text tokens as image tokens, and as many texts as images: nothing but what they
# depend on tells the maps of the two towers apart.
NUM_TOKENS, NUM_TEXTS, IMAGE_LAYERS = 17, 2, 2
TEXT = torch.randint(1, 18, (NUM_TEXTS, NUM_TOKENS), generator=torch.Generator().manual_seed(2))
TEXT[:, -1] = 19


def open_clip_model():
    vision = {"image_size": 32, "patch_size": 8, "width": 32, "layers": 2, "head_width": 16}
    text = {"context_length": NUM_TOKENS, "vocab_size": 20, "width": 32, "heads": 2, "layers": 3}
    model = randomised(open_clip.CLIP(embed_dim=8, vision_cfg=vision, text_cfg=text))

    def forward_func(images):
        image_features, text_features, scale = model(images, TEXT)
        return scale * image_features @ text_features.T

    return model, forward_func


def hugging_face_clip():
    text = {
        "hidden_size": 32,
        "num_hidden_layers": 3,
        "num_attention_heads": 2,
        "intermediate_size": 64,
        "vocab_size": 20,
        "max_position_embeddings": NUM_TOKENS,
        "eos_token_id": 19,
    }
    config = transformers.CLIPConfig(text_config=text, vision_config=HF_SMALL, projection_dim=8)
    model = randomised(transformers.CLIPModel(config))
    return model, lambda x: model(input_ids=TEXT, pixel_values=x).logits_per_image


def text_first():
    model, _ = open_clip_model()

    def forward_func(images):
        text_features = F.normalize(model.encode_text(TEXT), dim=-1)
        return F.normalize(model.encode_image(images), dim=-1) @ text_features.T

    return model, forward_func


@pytest.mark.parametrize("frozen", [(), ("text",), ("text", "image")], ids=str)
@pytest.mark.parametrize("make", [open_clip_model, hugging_face_clip, text_first])
def test_image_and_text_in_one_forward(make, frozen):
    model, forward_func = make()
    images_maps = slice(-IMAGE_LAYERS, None) if make is text_first else slice(IMAGE_LAYERS)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    expected = [
        slow_relevance(softmax_maps(forward_func, image, target)[images_maps])[0]
        for image, target in zip(images, [0, 1], strict=True)
    ]
    for name, parameter in model.named_parameters():
        tower = "image" if "vis" in name else "text"
        parameter.requires_grad_(tower not in frozen)
    relevance = TransformerAttribution(forward_func).relevance(images, [0, 1])
    torch.testing.assert_close(relevance, torch.stack(expected), rtol=1e-3, atol=1e-6)
    attributions = TransformerAttribution(checked(forward_func)).attribute(images, 1)
    assert attributions.amax() > attributions.amin()


def test_several_models_are_told_apart_by_the_layout():
    """Two towers that both see the images: the told number of tokens picks one."""
    coarse = make_vit(patch_size=16)
    fine = make_vit(patch_size=8)

    def both(x):
        return coarse(x) + fine(x)

    images = torch.randn(2, 3, 32, 32)
    with pytest.raises(UnsupportedModelError, match=r"several sets of tokens.*token_layout says"):
        TransformerAttribution(both).attribute(images, 1)
    for model, layout in ((coarse, TokenLayout(1, (2, 2))), (fine, TokenLayout(1, (4, 4)))):
        torch.testing.assert_close(
            TransformerAttribution(both, token_layout=layout).attribute(images, 1),
            TransformerAttribution(model).attribute(images, 1),
        )


def test_several_models_of_one_size_are_refused():
    first, second = make_vit(), make_vit(num_classes=7, qk_norm=True)
    with pytest.raises(UnsupportedModelError, match="several models side by side"):
        TransformerAttribution(lambda x: first(x) + second(x)).attribute(torch.randn(1, 3, 32, 32))


def test_images_prepared_out_of_sight_of_autograd():
    """No map can be seen to depend on the images, so all are taken."""
    vit = make_vit()
    images = torch.randn(2, 3, 32, 32)

    def forward(x):
        with torch.no_grad():
            x = x.mul(2)
        return vit(x)

    torch.testing.assert_close(
        TransformerAttribution(forward).attribute(images, 1),
        TransformerAttribution(lambda x: vit(2 * x)).attribute(images, 1),
    )


# -- the read-out ------------------------------------------------------------------------


@pytest.mark.parametrize("told", ["class", "mean", "class_mean", "all", "attention"])
def test_told_readout_decides(told):
    model = timm_model("vit_base_patch16_224", {"global_pool": "map"}, (64, 64))
    images = torch.randn(1, 3, 64, 64)
    layout = TokenLayout(1, (4, 4), told)
    attributions = TransformerAttribution(model, token_layout=layout).attribute(
        images, 1, interpolate_mode="nearest"
    )
    matrix, weights = slow_relevance(unfused_timm_maps(model)(model, images[0], 1))
    weights = weights if told == "attention" else layout.readout_weights()
    expected = (weights @ matrix)[1:].reshape(4, 4)
    torch.testing.assert_close(attributions[0, 0, ::16, ::16], expected, rtol=1e-3, atol=1e-6)


def test_what_the_forward_reads_goes_before_what_the_model_states():
    """A head of the user's own on a model that says it reads its class token."""
    model = make_vit()

    class Own(nn.Module):
        def __init__(self):
            super().__init__()
            self.model = model

        def forward(self, x):
            return model.head(model.forward_features(x)[:, 1:].mean(dim=1))

    images = torch.randn(2, 3, 32, 32)
    told = TokenLayout(1, (4, 4), "mean")
    torch.testing.assert_close(
        TransformerAttribution(Own()).attribute(images, 1),
        TransformerAttribution(Own(), token_layout=told).attribute(images, 1),
    )


@pytest.mark.parametrize("kind", ["SigLIP tower", "cait", "gap with registers"])
def test_reflected_relevance(kind):
    name, options, size, layout = TIMM[kind]
    model = timm_model(name, options, size)
    images = torch.randn(2, 3, *size)
    reflection = ReflectedRelevance(model).reflect(images, 1)
    row = TransformerAttribution(model).attribute(images, 1, interpolate_mode="nearest")
    patch = size[0] // layout.grid_size[0]
    torch.testing.assert_close(
        reflection.class_relevance, row[:, 0, ::patch, ::patch].flatten(1), rtol=1e-4, atol=1e-7
    )
    attributions = ReflectedRelevance(model).attribute(images, 1)
    assert attributions.shape == images.shape
    assert attributions.amax() > attributions.amin()


# -- refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options", "size", "message"),
    [
        (
            "swin_tiny_patch4_window7_224",
            {"depths": (1, 1, 1, 1), "embed_dim": 24},
            224,
            "inside windows",
        ),
        ("tiny_vit_5m_224", {}, 224, "inside windows"),
        ("pvt_v2_b0", {}, 64, "queries and keys of the model are different"),
        (
            "xcit_nano_12_p16_224",
            {},
            224,
            "another set of tokens, or attention is between channels",
        ),
        (
            "xcit_nano_12_p16_224",
            {},
            64,
            "the 32 tokens are not 16 prefix tokens and then the image",
        ),
        ("crossvit_tiny_240", {}, 240, "several sets of tokens"),
        ("convit_tiny", {}, 224, "several sets of tokens"),
        ("lowformer_b0", {}, 224, "number of heads changes"),
        ("resnet18", {}, 64, "no self-attention was seen"),
        ("mixer_s32_224", {}, 224, "no self-attention was seen"),
    ],
)
def test_refused(name, options, size, message):
    skip_unless_known(name)
    model = timm.create_model(name, num_classes=3, **options).eval()
    with pytest.raises(UnsupportedModelError, match=message):
        TransformerAttribution(model).attribute(torch.randn(2, 3, size, size), 1)


# -- the sweep, and real sizes -----------------------------------------------------------


@pytest.mark.slow
def test_sweep():
    support = pytest.importorskip("model_support")
    names = [
        "vit_tiny_patch16_224",
        "vit_base_patch16_siglip_224",
        "cait_xxs24_224",
        "resnet18",
        "swin_tiny_patch4_window7_224",
        "efficientformer_l1",
    ]
    results = {result.name: result for result in support.sweep(names, jobs=2)}
    assert list(results) == names
    assert [result.readout for result in results.values()] == [
        "class",
        "attention",
        "attention",
        "",
        "",
        "mean",
    ]
    assert results["efficientformer_l1"].how == "real size"
    assert results["cait_xxs24_224"].how == "small"
    assert "windows" in results["swin_tiny_patch4_window7_224"].reason
    text = support.report(list(results.values()))
    assert "4 are explained and 2 are refused" in text
    assert "| vision_transformer | VisionTransformer | 2 | 0 | attention, class |  |" in text


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_tiny_patch16_224",
        "deit3_small_patch16_224",
        "beit_base_patch16_224",
        "eva02_tiny_patch14_224",
        "vit_small_patch16_dinov3",
        "flexivit_small",
        "vit_relpos_small_patch16_224",
        "cait_xxs24_224",
        "vit_base_patch16_siglip_224",
        "vit_small_r26_s32_224",
    ],
)
def test_real_size(name):
    model = randomised(timm.create_model(name, num_classes=5), std=0.02)
    images = torch.randn(1, *model.pretrained_cfg["input_size"])
    matrix, _ = slow_relevance(unfused_timm_maps(model)(model, images[0], 1))
    relevance = TransformerAttribution(checked(model)).relevance(images, 1)[0]
    torch.testing.assert_close(relevance, matrix, rtol=1e-3, atol=1e-5)
