"""Both attributors against the naive equations, on every kind of Vision Transformer here."""

import naive
import pytest
import timm
import torch
from conftest import make_vit
from timm.models.deit import VisionTransformerDistilled
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import ReflectedRelevance, TokenLayout, TransformerAttribution

TARGETS = [2, 5, 0]


def naive_relevance(model, image, target, start_layer=0):
    return naive.relevance_matrix(naive.attention_and_gradients(model, image, target), start_layer)


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("start_layer", [0, 2])
def test_relevance_matches_the_naive_rollout(vit, images, fused, start_layer):
    for block in vit.blocks:
        block.attn.fused_attn = fused
    relevance = TransformerAttribution(vit, start_layer=start_layer).relevance(images, TARGETS)
    for row, image, target in zip(relevance, images, TARGETS, strict=True):
        torch.testing.assert_close(
            row, naive_relevance(vit, image, target, start_layer), rtol=1e-4, atol=1e-6
        )


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"reflect": "rows"},
        {"scale_by_maxima": False},
        {"combine": "sum"},
        {"reflected_weight": 0.25},
        {"score": "probability"},
        {"aggregate": "mask_weighted"},
        {"aggregate": "mask_weighted", "score": "probability", "reflect": "rows"},
        {"reflect": "rows", "scale_by_maxima": False, "reflected_weight": 2},
    ],
    ids=str,
)
def test_reflected_relevance_matches_the_naive_method(vit, images, options):
    attributions = ReflectedRelevance(vit, **options).attribute(images, TARGETS)
    for row, image, target in zip(attributions, images, TARGETS, strict=True):
        expected = naive.reflected_relevance(vit, image, target, (4, 4), **options)
        torch.testing.assert_close(row, expected.expand(3, 32, 32), rtol=1e-3, atol=1e-4)


def test_baselines_stand_where_the_mask_is_zero(vit, images):
    number = ReflectedRelevance(vit).attribute(images, TARGETS, baselines=0.7)
    expected = naive.reflected_relevance(vit, images[0], TARGETS[0], (4, 4), baseline=0.7)
    torch.testing.assert_close(number[0, 0], expected, rtol=1e-3, atol=1e-4)
    for shape in (images.shape, (1, 3, 32, 32)):
        tensor = ReflectedRelevance(vit).attribute(
            images, TARGETS, baselines=torch.full(shape, 0.7)
        )
        torch.testing.assert_close(tensor, number, rtol=1e-3, atol=1e-4)
    assert not torch.allclose(number, ReflectedRelevance(vit).attribute(images, TARGETS))


def test_reflection_is_what_the_map_is_made_of(vit, images):
    attributor = ReflectedRelevance(vit)
    reflection = attributor.reflect(images, TARGETS)
    assert reflection.relevance.shape == (3, 17, 17)
    assert reflection.masks.shape == (3, 16, 4, 4)
    assert reflection.scores.shape == reflection.class_relevance.shape == (3, 16)
    torch.testing.assert_close(reflection.class_relevance, reflection.relevance[:, 0, 1:])
    torch.testing.assert_close(
        reflection.relevance, TransformerAttribution(vit).relevance(images, TARGETS)
    )
    with pytest.raises(AttributeError):
        reflection.scores = None


def deterministic(model):
    """Random weights for a model whose own initialisation may be zero."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(0)
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    return model.eval()


TIMM_MODELS = {
    "patch 16": (make_vit, {"img_size": 64, "patch_size": 16}, (64, 64)),
    "patch 32": (make_vit, {"img_size": 128, "patch_size": 32}, (128, 128)),
    "patch 14": (make_vit, {"img_size": 56, "patch_size": 14}, (56, 56)),
    "non-square": (make_vit, {"img_size": (48, 24)}, (48, 24)),
    "dynamic size": (make_vit, {"dynamic_img_size": True}, (40, 56)),
    "padded size": (make_vit, {"dynamic_img_size": True, "dynamic_img_pad": True}, (37, 50)),
    "registers": (make_vit, {"reg_tokens": 4}, (32, 32)),
    "registers, unembedded": (make_vit, {"reg_tokens": 4, "no_embed_class": True}, (32, 32)),
    "layer scale, qk-norm": (make_vit, {"init_values": 0.5, "qk_norm": True}, (32, 32)),
    "mean pooling": (
        make_vit,
        {"global_pool": "avg", "class_token": False, "fc_norm": True},
        (32, 32),
    ),
    "one channel": (make_vit, {"in_chans": 1}, (32, 32)),
}


def expected_map(model, image, target, layout):
    relevance = naive_relevance(model, image, target)
    row = layout.readout_weights() @ relevance
    return torch.nn.functional.interpolate(
        row[layout.num_prefix_tokens :].reshape(1, 1, *layout.grid_size),
        image.shape[-2:],
        mode="bilinear",
    ).squeeze()


LAYOUTS = {
    "patch 16": TokenLayout(1, (4, 4)),
    "patch 32": TokenLayout(1, (4, 4)),
    "patch 14": TokenLayout(1, (4, 4)),
    "non-square": TokenLayout(1, (6, 3)),
    "dynamic size": TokenLayout(1, (5, 7)),
    "padded size": TokenLayout(1, (5, 7)),
    "registers": TokenLayout(5, (4, 4)),
    "registers, unembedded": TokenLayout(5, (4, 4)),
    "layer scale, qk-norm": TokenLayout(1, (4, 4)),
    "mean pooling": TokenLayout(0, (4, 4), "mean"),
    "one channel": TokenLayout(1, (4, 4)),
}


@pytest.mark.parametrize("kind", TIMM_MODELS)
def test_timm_vision_transformers(kind):
    make, options, size = TIMM_MODELS[kind]
    if options.get("qk_norm"):
        options = {**options, "norm_layer": torch.nn.LayerNorm}
    model = make(**options)
    inputs = torch.randn(2, options.get("in_chans", 3), *size)
    attributions = TransformerAttribution(model).attribute(inputs, [1, 4])
    for row, image, target in zip(attributions, inputs, [1, 4], strict=True):
        expected = expected_map(model, image, target, LAYOUTS[kind])
        assert expected.max() > 0
        torch.testing.assert_close(row, expected.expand_as(image), rtol=1e-3, atol=1e-6)
    reflected = ReflectedRelevance(model).attribute(inputs, [1, 4])
    assert reflected.shape == inputs.shape
    assert reflected.amax() > reflected.amin()


def test_distilled_deit_reads_class_and_distillation_token():
    model = deterministic(
        VisionTransformerDistilled(
            img_size=32, patch_size=8, embed_dim=32, depth=2, num_heads=4, num_classes=7
        )
    )
    inputs = torch.randn(2, 3, 32, 32)
    attributions = TransformerAttribution(model).attribute(inputs, 3)
    expected = expected_map(model, inputs[1], 3, TokenLayout(2, (4, 4), "distilled"))
    torch.testing.assert_close(attributions[1], expected.expand(3, 32, 32), rtol=1e-3, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "vit_base_patch16_224",
        "vit_small_patch32_384",
        "vit_base_patch8_224",
        "deit_base_distilled_patch16_384",
        "vit_base_patch14_reg4_dinov2.lvd142m",
    ],
)
def test_real_sizes(name):
    model = timm.create_model(name, depth=2, num_classes=5).eval()
    inputs = torch.randn(1, *timm.data.resolve_model_data_config(model)["input_size"])
    outputs = []

    def forward(x):
        outputs.append(model(x))
        return outputs[-1]

    TransformerAttribution(forward).attribute(inputs, 1)
    with torch.no_grad():
        torch.testing.assert_close(outputs[0], model(inputs), rtol=0, atol=1e-5)
    relevance = TransformerAttribution(model).relevance(inputs, 1)
    torch.testing.assert_close(
        relevance[0], naive_relevance(model, inputs[0], 1), rtol=1e-3, atol=1e-6
    )


def torchvision_vit():
    return deterministic(
        TorchvisionTransformer(
            image_size=32,
            patch_size=8,
            num_layers=2,
            num_heads=4,
            hidden_dim=32,
            mlp_dim=64,
            num_classes=7,
        )
    )


def as_timm(model):
    """The same network with timm's code: an independent way to torchvision's attention."""
    twin = make_vit(depth=2, mlp_ratio=2)
    twin.load_state_dict(
        {
            "cls_token": model.class_token,
            "pos_embed": model.encoder.pos_embedding,
            "patch_embed.proj.weight": model.conv_proj.weight,
            "patch_embed.proj.bias": model.conv_proj.bias,
            "norm.weight": model.encoder.ln.weight,
            "norm.bias": model.encoder.ln.bias,
            "head.weight": model.heads.head.weight,
            "head.bias": model.heads.head.bias,
            **{
                f"blocks.{index}.{ours}.{part}": block.get_parameter(
                    f"{theirs}_{part}" if theirs.endswith("in_proj") else f"{theirs}.{part}"
                )
                for index, block in enumerate(model.encoder.layers)
                for part in ("weight", "bias")
                for ours, theirs in {
                    "norm1": "ln_1",
                    "attn.qkv": "self_attention.in_proj",
                    "attn.proj": "self_attention.out_proj",
                    "norm2": "ln_2",
                    "mlp.fc1": "mlp.0",
                    "mlp.fc2": "mlp.3",
                }.items()
            },
        }
    )
    return twin


@pytest.mark.parametrize("frozen", [False, True])
def test_torchvision_vision_transformer(images, frozen):
    model = torchvision_vit()
    twin = as_timm(model)
    model.requires_grad_(not frozen)
    relevance = TransformerAttribution(model).relevance(images, TARGETS)
    for row, image, target in zip(relevance, images, TARGETS, strict=True):
        torch.testing.assert_close(row, naive_relevance(twin, image, target), rtol=1e-3, atol=1e-6)
    torch.testing.assert_close(
        ReflectedRelevance(model).attribute(images, TARGETS),
        ReflectedRelevance(twin).attribute(images, TARGETS),
        rtol=1e-3,
        atol=1e-3,
    )


@pytest.mark.parametrize("attributor", [TransformerAttribution, ReflectedRelevance])
def test_each_image_as_if_alone(vit, images, attributor):
    together = attributor(vit).attribute(images, TARGETS)
    for index, target in enumerate(TARGETS):
        alone = attributor(vit).attribute(images[index : index + 1], target)
        torch.testing.assert_close(together[index : index + 1], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("attributor", [TransformerAttribution, ReflectedRelevance])
def test_no_relevance_gives_a_zero_map_and_one_warning(vit, images, attributor):
    with torch.no_grad():  # the class no longer depends on the tokens
        vit.head.weight[4] = 0
    with pytest.warns(UserWarning, match="zero throughout") as caught:
        attributions = attributor(vit).attribute(images, [1, 4, 1])
    assert len(caught) == 1
    assert torch.count_nonzero(attributions[1]) == 0
    assert attributions[0].max() > 0
    with pytest.warns(UserWarning, match="zero throughout"):
        literal = ReflectedRelevance(vit, combine="sum").attribute(images, [1, 4, 1])
    assert torch.count_nonzero(literal[1]) == 0


@pytest.mark.parametrize("mode", ["bilinear", "bicubic", "nearest", "nearest-exact", "area"])
def test_interpolation_modes(vit, images, mode):
    row = TransformerAttribution(vit).relevance(images, 1)[:, 0, 1:].reshape(3, 1, 4, 4)
    expected = torch.nn.functional.interpolate(row, (32, 32), mode=mode).expand(3, 3, 32, 32)
    attributions = TransformerAttribution(vit).attribute(images, 1, interpolate_mode=mode)
    torch.testing.assert_close(attributions, expected)


def test_told_layout_decides_the_grid(vit, images):
    told = TokenLayout(1, (2, 8), "mean")
    attributions = TransformerAttribution(vit, token_layout=told).attribute(images, 1)
    expected = expected_map(vit, images[0], 1, told)
    torch.testing.assert_close(attributions[0, 0], expected, rtol=1e-3, atol=1e-6)
