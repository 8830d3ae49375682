"""The baselines against the naive equations, and what sets them apart from other attributors."""

import naive
import pytest
import torch
from conftest import make_vit

from captum_reflected import AttentionGradCam, AttentionRollout, RawAttention, TokenLayout

READOUTS = {
    "class": ({}, TokenLayout(1, (4, 4), "class")),
    "mean": ({"global_pool": "avg"}, TokenLayout(1, (4, 4), "mean")),
    "no class token": (
        {"global_pool": "avg", "class_token": False},
        TokenLayout(0, (4, 4), "mean"),
    ),
}
TARGETS = [2, 4, 0]


def tokens(attributions):
    return attributions[:, 0, 4::8, 4::8].flatten(1)


@pytest.mark.parametrize("kind", READOUTS)
def test_naive_equations(images, kind):
    options, layout = READOUTS[kind]
    model, prefix = make_vit(**options), layout.num_prefix_tokens
    weights = layout.readout_weights()
    found = [
        tokens(method.attribute(images, TARGETS, interpolate_mode="nearest"))
        for method in (AttentionRollout(model), RawAttention(model), AttentionGradCam(model))
    ]
    for row, target in enumerate(TARGETS):
        maps = naive.attention_and_gradients(model, images[row], target)
        expected = (
            (weights @ naive.rollout(maps))[prefix:],
            (weights @ maps[-1][0].mean(dim=0))[prefix:],
            naive.grad_cam(maps, weights, prefix),
        )
        for heat, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(heat[row], wanted, rtol=1e-4, atol=1e-6)


def test_start_layer(vit, images):
    heat = AttentionRollout(vit, start_layer=1).attribute(images, interpolate_mode="nearest")
    maps = naive.attention_and_gradients(vit, images[0], 0)
    torch.testing.assert_close(tokens(heat)[0], naive.rollout(maps, 1)[0, 1:])
    with pytest.raises(ValueError, match="start_layer is 3; wanted: less than the 3"):
        AttentionRollout(vit, start_layer=3).attribute(images)


@pytest.mark.parametrize("attributor", [AttentionRollout, RawAttention])
def test_no_target_and_no_gradient_are_needed(vit, images, attributor):
    expected = attributor(vit).attribute(images, 1)
    assert torch.equal(attributor(vit).attribute(images), expected)
    without = attributor(torch.no_grad()(vit.forward)).attribute(images)
    torch.testing.assert_close(without, expected)
    with pytest.raises(ValueError, match="out of range"):
        attributor(vit).attribute(images, 7)


def test_grad_cam_needs_a_target_and_a_gradient(vit, images):
    with pytest.raises(ValueError, match="target is None"):
        AttentionGradCam(vit).attribute(images)
    with pytest.raises(ValueError, match="no gradient flows"):
        AttentionGradCam(torch.no_grad()(vit.forward)).attribute(images, 1)
