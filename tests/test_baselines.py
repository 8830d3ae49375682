"""The baselines against the naive equations, and what sets them apart from other attributors."""

import naive
import pytest
import torch
from conftest import make_vit
from test_model_families import TIMM, timm_model, unfused_timm_maps

from captum_reflected import AttentionGradCam, AttentionRollout, RawAttention, TokenLayout

READOUTS = {
    "class": ({}, TokenLayout(1, (4, 4), "class")),
    "mean": ({"global_pool": "avg"}, TokenLayout(1, (4, 4), "mean")),
    "no class token": (
        {"global_pool": "avg", "class_token": False},
        TokenLayout(0, (4, 4), "mean"),
    ),
}
TARGETS = [2, 3, 5]


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
    assert all(heat.any() for heat in found)
    for row, target in enumerate(TARGETS):
        maps = naive.attention_and_gradients(model, images[row], target)
        expected = (
            (weights @ naive.rollout(maps))[prefix:],
            (weights @ maps[-1][0].mean(dim=0))[prefix:],
            naive.grad_cam(maps, weights, prefix),
        )
        for heat, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(heat[row], wanted, rtol=1e-4, atol=1e-6)


def pooled_rollout(layers, pooling):
    """Abnar & Zuidema's product, with the attention that reads the tokens out as more factors."""
    rolled = naive.rollout(layers)
    tokens = len(rolled)
    if pooling[0][0].shape[-1] <= tokens:  # queries of its own, over the last tokens
        (attention, _), = pooling  # fmt: skip
        weights = torch.zeros(tokens)
        for head in attention:
            for query in head:
                weights[tokens - len(query) :] += query / (len(attention) * len(head))
        return weights @ rolled
    # Class attention: one more token, first, that no layer before has seen, and whose row is
    # the only one that changes. It is left out of the answer, whose shares sum to one.
    product = torch.eye(tokens + 1)
    for attention, _ in pooling:
        factor = torch.eye(tokens + 1)
        factor[0] += attention.mean(dim=0)[0]
        factor[0] /= factor[0].sum()
        product = factor @ product
    weights = product[0, 1:] / product[0, 1:].sum()
    return weights @ rolled


@pytest.mark.parametrize(
    "kind",
    ["deit distilled", "SigLIP tower", "map, prefix read too", "map, prefix not read", "cait"],
)
def test_naive_equations_of_other_readouts(kind):
    name, options, size, layout = TIMM[kind]
    model = timm_model(name, options, size)
    images = torch.randn(3, 3, *size, generator=torch.Generator().manual_seed(1))
    targets = [2, 4, 0]
    patch = size[0] // layout.grid_size[0]
    found = [
        method.attribute(images, targets, interpolate_mode="nearest")[:, 0, ::patch, ::patch]
        for method in (AttentionRollout(model), RawAttention(model), AttentionGradCam(model))
    ]
    assert all(heat.any() for heat in found)
    for row, target in enumerate(targets):
        maps = unfused_timm_maps(model)(model, images[row], target)
        model.zero_grad(set_to_none=True)
        layers = [pair for pair in maps if pair[0].shape[-1] == pair[0].shape[-2]]
        pooling = maps[len(layers) :]
        assert len(pooling) == {"deit distilled": 0, "cait": 2}.get(kind, 1)
        if pooling:
            rolled = pooled_rollout(layers, pooling)
            queries = pooling[-1][0].shape[-2]
            weights = torch.ones(queries) / queries
        else:
            weights = torch.zeros(layout.num_tokens)
            weights[:2] = 0.5
            rolled = weights @ naive.rollout(layers)
        last = maps[-1][0].mean(dim=0)
        prefix = last.shape[-1] - layout.num_image_tokens
        expected = (
            rolled[layout.num_prefix_tokens :],
            (weights @ last)[prefix:],
            naive.grad_cam(maps, weights, prefix),
        )
        for heat, wanted in zip(found, expected, strict=True):
            torch.testing.assert_close(heat[row].flatten(), wanted, rtol=1e-3, atol=1e-6)


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
