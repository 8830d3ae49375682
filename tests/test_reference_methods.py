"""Reference methods: each against what its paper says, on cases that can be worked out."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import UnsupportedModelError
from captum_reflected.attr.methods import REFERENCE_METHODS
from captum_reflected.attr.reference_methods import (
    input_sampling_maps,
    legrad_maps,
    rise_maps,
    vit_cx_maps,
)
from captum_reflected.attr.reference_methods.rise import _rise_masks
from captum_reflected.attr.reference_methods.tis import _k_means
from captum_reflected.attr.reference_methods.vit_cx import _merged
from captum_reflected.masking.precision import Autocast
from captum_reflected.masking.reflection import min_max
from captum_reflected.metrics import rank_correlation

TARGET = torch.tensor([2, 5, 0])


@pytest.mark.parametrize("name", REFERENCE_METHODS)
def test_a_reference_method_leaves_no_trace_and_does_the_same_again(vit, images, name):
    before, state = [id(module) for module in vit.modules()], torch.get_rng_state()
    maps = REFERENCE_METHODS[name].explain(vit, images, TARGET)
    assert maps.shape == (3, 32, 32)
    assert maps.isfinite().all()
    assert torch.equal(maps, REFERENCE_METHODS[name].explain(vit, images, TARGET))
    alone = REFERENCE_METHODS[name].explain(vit, images[1:2], TARGET[1:2])
    torch.testing.assert_close(alone, maps[1:2], rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(module) for module in vit.modules()] == before
    assert not any(module._forward_hooks for module in vit.modules())
    assert all(parameter.grad is None for parameter in vit.parameters())
    half = REFERENCE_METHODS[name].explain(Autocast(vit, torch.bfloat16).eval(), images, TARGET)
    assert rank_correlation(half, maps).mean() > 0.5


def test_input_sampling_with_a_mask_for_every_channel(vit, images):
    """As many centres as channels: the masks are the channels' own, cut by hand here."""
    outputs = []
    hooks = [
        block.register_forward_hook(lambda *args: outputs.append(args[2])) for block in vit.blocks
    ]
    with torch.no_grad():
        vit(images[:1])
    for hook in hooks:
        hook.remove()
    channels = torch.cat([output[0, 1:].T for output in outputs])
    shown, worth = torch.zeros(16), torch.zeros(16)
    with torch.no_grad():
        sequence = vit._pos_embed(vit.patch_embed(images[:1]))
        for channel in channels:
            kept = channel.topk(8).indices.sort().values
            cut = torch.cat([sequence[:, :1], sequence[:, 1 + kept]], dim=1)
            score = vit.forward_head(vit.norm(vit.blocks(cut))).softmax(-1)[0, 2]
            shown[kept] += 1
            worth[kept] += score
    expected = F.interpolate((worth / shown).view(1, 1, 4, 4), (32, 32), mode="bilinear")[0]
    found = input_sampling_maps(vit, images[:1], TARGET[:1], num_masks=len(channels))
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_k_means_ends_where_every_centre_is_the_mean_of_its_points():
    generator = torch.Generator().manual_seed(0)
    points = torch.cat([torch.randn(50, 4, generator=generator) * 0.1 + at for at in (-3, 0, 4)])
    centres = _k_means(points, 3)
    nearest = torch.cdist(points, centres).argmin(dim=1)
    for index in range(3):
        torch.testing.assert_close(centres[index], points[nearest == index].mean(dim=0))


def test_rise_finds_the_pixels_that_count():
    def forward(images):
        bright = images[:, 0, 20:28, 4:12].mean(dim=(1, 2))
        return torch.stack([torch.zeros_like(bright), 8 * bright - 4], dim=1)

    heat = rise_maps(forward, torch.ones(1, 3, 32, 32), torch.tensor([1]))[0]
    top, left = np.unravel_index(int(heat.argmax()), (32, 32))
    assert 18 <= top < 30
    assert 2 <= left < 14


def test_rise_masks_are_half_on_everywhere():
    masks = _rise_masks(4000, (33, 40))
    assert masks.shape == (4000, 33, 40)
    assert masks.min() >= 0
    assert masks.max() < 1 + 1e-6
    assert (masks.mean(dim=0) - 0.5).abs().max() < 0.04


def test_merged_masks():
    base = torch.rand(3, 50, generator=torch.Generator().manual_seed(0))
    base[:, :20], base[1, 20:], base[2, :10] = 0, 0, 1  # far from each other
    base[1, :20] = 1
    near = base.repeat(2, 1) * torch.tensor([1.0, 1, 1, 0.5, 2, 3])[:, None]
    merged = _merged(near)
    assert merged.shape == (3, 50)
    for mask in base:
        span = (mask - mask.min()) / (mask.max() - mask.min())
        assert (merged - span).abs().amax(dim=1).min() < 1e-5


def test_vit_cx_scores_by_hand(vit, images):
    features = []
    hook = vit.blocks[-1].norm1.register_forward_hook(lambda *args: features.append(args[2]))
    with torch.no_grad():
        own = vit(images[:1]).softmax(-1)[0, 2]
    hook.remove()
    grids = features[0][:, 1:].mT.reshape(1, -1, 4, 4)
    enlarged = F.interpolate(grids, (32, 32), mode="bilinear")[0].flatten(1)
    masks = _merged(min_max(enlarged, dim=1)).reshape(-1, 32, 32)
    noise = 0.1 * torch.randn(len(masks), 3, 32, 32, generator=torch.Generator().manual_seed(0))
    expected = torch.zeros(32, 32)
    for mask, drawn in zip(masks, noise, strict=True):
        outside = drawn * (1 - mask)
        with torch.no_grad():
            masked = vit((images[0] * mask + outside)[None]).softmax(-1)[0, 2]
            whole = vit((images[0] + outside)[None]).softmax(-1)[0, 2]
        expected += (masked - whole + own) * mask / masks.sum(dim=0) / len(masks)
    found = vit_cx_maps(vit, images[:1], TARGET[:1])[0]
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-6)
    assert rank_correlation(found[None], expected[None]).item() > 0.99


@pytest.mark.parametrize("name", ["vit_cx", "legrad"])
def test_models_without_the_parts_that_are_read(images, name):
    model = TorchvisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7).eval()
    with pytest.raises(UnsupportedModelError, match="the model's structure is not known"):
        REFERENCE_METHODS[name].explain(model, images, TARGET)


def test_legrad_is_the_positive_gradient_of_the_last_two_maps(vit, images):
    attentions, outputs, hooks = [], [], []
    for block in vit.blocks:
        block.attn.fused_attn = False
        hooks += [
            block.attn.attn_drop.register_forward_hook(lambda *args: attentions.append(args[2])),
            block.register_forward_hook(lambda *args: outputs.append(args[2])),
        ]
    vit(images[:1])
    expected = torch.zeros(16)
    for attention, output in zip(attentions[1:], outputs[1:], strict=True):
        logits = vit.head(vit.fc_norm(vit.norm(output.mean(dim=1))))
        (gradient,) = torch.autograd.grad(logits[0, 2], attention, retain_graph=True)
        expected += gradient[0].clamp(min=0).mean(dim=(0, 1))[1:]
    for hook in hooks:
        hook.remove()
    enlarged = F.interpolate(expected.view(1, 1, 4, 4), (32, 32), mode="bilinear")[0]
    torch.testing.assert_close(legrad_maps(vit, images[:1], TARGET[:1]), enlarged)


def test_a_model_whose_tokens_cannot_be_left_out(images):
    with pytest.raises(UnsupportedModelError):
        input_sampling_maps(lambda images: make_vit()(images), images, TARGET)
