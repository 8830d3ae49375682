"""What the tokens stand for: told, asked, inferred."""

import pytest
import torch
from conftest import make_vit

from captum_reflected import TokenLayout, TransformerAttribution
from captum_reflected.tokens import resolve_layout


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
        ((0, (4, 4), "class"), 'readout "class" needs 1 prefix token'),
        ((1, (4, 4), "distilled"), 'readout "distilled" needs 2 prefix token'),
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
