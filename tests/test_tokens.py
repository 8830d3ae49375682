"""What the tokens stand for: told, asked, inferred."""

import functools

import pytest
import torch
from conftest import make_vit
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import TokenLayout, TransformerAttribution, UnsupportedModelError
from captum_reflected.attention.tokens import resolve_layout
from captum_reflected.inputs.modules import modules_of


@pytest.mark.parametrize(
    ("num_tokens", "image_size", "expected"),
    [
        (197, (224, 224), TokenLayout(1, (14, 14))),
        (198, (224, 224), TokenLayout(2, (14, 14))),
        (196, (224, 224), TokenLayout(0, (14, 14))),
        (577, (384, 384), TokenLayout(1, (24, 24))),
        (145, (384, 384), TokenLayout(1, (12, 12))),
        (785, (224, 224), TokenLayout(1, (28, 28))),
        (1374, (518, 518), TokenLayout(5, (37, 37))),
        (61, (160, 96), TokenLayout(1, (10, 6))),
        (17, (32, 32), TokenLayout(1, (4, 4))),
    ],
)
def test_inferred_from_tokens_and_image_size(num_tokens, image_size, expected):
    layout = resolve_layout(None, lambda x: x, num_tokens, image_size)
    assert layout == expected
    assert layout.num_tokens == num_tokens


def test_nothing_fits():
    with pytest.raises(ValueError, match=r"100 tokens .* 32 x 32 image; wanted: token_layout="):
        resolve_layout(None, lambda x: x, 100, (32, 32))


def test_a_lambda_is_explained_like_the_model_where_the_layout_can_be_inferred():
    model = make_vit(reg_tokens=4)
    images = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(
        TransformerAttribution(lambda x: model(x)).attribute(images, 1),
        TransformerAttribution(model).attribute(images, 1),
    )


def test_the_model_is_asked_before_anything_is_inferred():
    """A wrapper that resizes: the grid is the model's, not one that fits the photo."""
    model = torch.nn.Sequential(torch.nn.Upsample((32, 32)), make_vit(reg_tokens=4))
    images = torch.randn(1, 3, 45, 45)
    layout = resolve_layout(None, model, 21, (45, 45))
    assert layout == TokenLayout(5, (4, 4))
    assert TransformerAttribution(model).attribute(images, 1).shape == images.shape


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, (4, 4)), "num_prefix_tokens is -1; wanted: a whole number from 0"),
        ((1.0, (4, 4)), "num_prefix_tokens is 1.0"),
        ((1, (4,)), r"grid_size is \(4,\); wanted: \(rows, columns\)"),
        ((1, [4, 4]), r"grid_size is \[4, 4\]"),
        ((1, (0, 4)), r"grid_size is \(0, 4\)"),
        ((1, 16), "grid_size is 16"),
        ((1, (4, 4), "max"), "readout is 'max'; wanted: None or class, distilled, mean"),
        ((0, (4, 4), "class"), 'is 0; wanted: 1 or more, which readout "class" needs'),
        ((1, (4, 4), "distilled"), 'is 1; wanted: 2 or more, which readout "distilled" needs'),
    ],
    ids=str,
)
def test_bad_layouts(arguments, message):
    with pytest.raises(ValueError, match=message):
        TokenLayout(*arguments)


@pytest.mark.parametrize(
    ("layout", "expected"),
    [
        (TokenLayout(1, (1, 2)), [1, 0, 0]),
        (TokenLayout(3, (1, 2)), [1, 0, 0, 0, 0]),
        (TokenLayout(2, (1, 2), "distilled"), [0.5, 0.5, 0, 0]),
        (TokenLayout(0, (1, 2)), [0.5, 0.5]),
        (TokenLayout(1, (1, 2), "mean"), [0, 0.5, 0.5]),
    ],
    ids=str,
)
def test_readout_weights(layout, expected):
    assert layout.readout_weights().tolist() == expected


def test_a_photo_that_the_forward_resizes_keeps_the_models_grid():
    """640 x 480 with N = 197 would fit 5 prefix tokens and a 12 x 16 grid as well."""
    vit = make_vit(img_size=224, patch_size=16, depth=1)

    def forward(x):
        return vit(torch.nn.functional.interpolate(x, (224, 224)))

    asked = resolve_layout(None, forward, 197, (480, 640))
    assert asked == TokenLayout(1, (14, 14))
    torchvision_vit = TorchvisionTransformer(224, 16, 1, 1, 8, 8)
    resized = torch.nn.Sequential(torch.nn.Upsample((224, 224)), torchvision_vit)
    assert resolve_layout(None, resized, 197, (480, 640)) == TokenLayout(1, (14, 14))
    with pytest.raises(ValueError, match="cannot tell which"):
        resolve_layout(None, len, 197, (480, 640))


def test_modules_are_found_in_partials_closures_and_methods():
    vit = make_vit()
    for forward in (vit, vit.forward, functools.partial(vit, attn_mask=None), lambda x: vit(x)):
        assert modules_of(forward)[0] is vit
    assert modules_of(len) == []


def test_modules_are_in_the_order_of_torch_and_once_each():
    shared = torch.nn.Linear(2, 2)
    model = torch.nn.Sequential(shared, torch.nn.Sequential(make_vit(), shared), torch.nn.GELU())
    model.register_module("nothing", None)
    assert modules_of(model) == list(model.modules())


class SuffixTokens(torch.nn.Module):
    """A Vision Transformer whose further tokens come last, which no layout can say."""

    def __init__(self, suffix, read):
        super().__init__()
        self.vit = make_vit(class_token=False, global_pool="", num_classes=0, pos_embed="none")
        self.further = torch.nn.Parameter(torch.randn(1, suffix, 32))
        self.head = torch.nn.Linear(32, 5)
        self.read = read

    def forward(self, x):
        x = self.vit.patch_embed(x)
        x = torch.cat([x, self.further.expand(len(x), -1, -1)], dim=1)
        return self.head(self.vit.blocks(x)[:, self.read].mean(dim=1))


@pytest.mark.parametrize(("suffix", "read"), [(1, slice(16, 17)), (4, slice(0, 16))])
def test_tokens_behind_the_image_are_refused(suffix, read):
    with pytest.raises(UnsupportedModelError, match=f"token 0 most, where token {suffix} is"):
        TransformerAttribution(SuffixTokens(suffix, read)).attribute(torch.randn(2, 3, 32, 32), 1)
