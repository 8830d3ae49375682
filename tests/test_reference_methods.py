"""Reference methods: each against what its paper says, on cases that can be worked out."""

from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit
from scipy.ndimage import gaussian_filter
from scipy.optimize import minimize
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import TransformerAttribution, UnsupportedModelError, demo
from captum_reflected.attr.controls import random_maps
from captum_reflected.attr.methods import REFERENCE_METHODS
from captum_reflected.attr.reference_methods import (
    activation_patching_maps,
    input_sampling_maps,
    legrad_maps,
    mda,
    metric_driven_maps,
    optimised_mask_maps,
    rise_maps,
    vit_cx_maps,
)
from captum_reflected.attr.reference_methods.rise import _rise_masks
from captum_reflected.attr.reference_methods.tis import _k_means
from captum_reflected.attr.reference_methods.vit_cx import _merged
from captum_reflected.masking.precision import Autocast
from captum_reflected.masking.reflection import min_max
from captum_reflected.metrics import deletion, rank_correlation

TARGET = torch.tensor([2, 5, 0])

# The optimisation is short here, since it takes minutes otherwise.
EXPLAIN = {
    **{name: method.explain for name, method in REFERENCE_METHODS.items()},
    "igos": partial(optimised_mask_maps, iterations=2, path_steps=4),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REFERENCE_METHODS)
def test_a_reference_method_leaves_no_trace_and_does_the_same_again(vit, images, name):
    before, state = [id(module) for module in vit.modules()], torch.get_rng_state()
    maps = EXPLAIN[name](vit, images, TARGET)
    assert maps.shape == (3, 32, 32)
    assert maps.isfinite().all()
    assert torch.equal(maps, EXPLAIN[name](vit, images, TARGET))
    alone = EXPLAIN[name](vit, images[1:2], TARGET[1:2])
    torch.testing.assert_close(alone, maps[1:2], rtol=1e-3, atol=1e-4)
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(module) for module in vit.modules()] == before
    assert not any(module._forward_hooks for module in vit.modules())
    assert all(parameter.grad is None for parameter in vit.parameters())
    half = EXPLAIN[name](Autocast(vit, torch.bfloat16).eval(), images, TARGET)
    assert half.isfinite().all()
    if name != "igos":  # a rounding error may change a step of the optimisation
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


@pytest.mark.parametrize("name", ["caap", "mda", "igos"])
def test_a_function_around_a_model_has_no_known_blocks(vit, images, name):
    with pytest.raises(UnsupportedModelError, match="the model's structure is not known"):
        EXPLAIN[name](lambda images: vit(images), images, TARGET)


@pytest.mark.parametrize("name", ["caap", "mda", "igos"])
def test_a_failure_leaves_no_trace(vit, images, name):
    state = torch.get_rng_state()
    with pytest.raises((IndexError, RuntimeError, ValueError)):
        EXPLAIN[name](vit, images, TARGET + 100)
    assert not any(module._forward_hooks for module in vit.modules())
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert torch.is_grad_enabled()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["caap", "igos"])
def test_a_model_with_dropout_draws_the_same_numbers_again(images, name):
    model = make_vit(proj_drop_rate=0.5).train()
    state = torch.get_rng_state()
    maps = EXPLAIN[name](model, images[:1], TARGET[:1])
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(maps, EXPLAIN[name](model, images[:1], TARGET[:1]))
    assert all(module.training for module in model.modules())


def test_activation_patching_block_by_block(images):
    """The middle third of six blocks is the third and the fourth."""
    model = make_vit(depth=6)
    with torch.no_grad():
        expected = torch.zeros(2, 16)
        for image in range(2):
            source, tokens = [], model._pos_embed(model.patch_embed(images[image : image + 1]))
            for block in model.blocks:
                tokens = block(tokens)
                source.append(tokens)
            for patch in range(16):
                tokens = model._pos_embed(model.patch_embed(torch.zeros(1, 3, 32, 32)))
                for depth, block in enumerate(model.blocks):
                    tokens = block(tokens)
                    if depth in (2, 3):
                        tokens[0, 1 + patch] = source[depth][0, 1 + patch]
                expected[image, patch] = model.forward_head(model.norm(tokens))[0, TARGET[image]]
    enlarged = F.interpolate(expected.view(2, 1, 4, 4), (32, 32), mode="bilinear")[:, 0]
    found = activation_patching_maps(model, images[:2], TARGET[:2])
    torch.testing.assert_close(found, enlarged, rtol=1e-4, atol=1e-4)


@pytest.fixture
def unsure_vit():
    """A model whose probabilities are not close to 0 and 1."""
    model = make_vit()
    with torch.no_grad():
        model.head.weight *= 0.2
    return model


def slow_convex_fit(curve):
    """By a general solver: convex and decreasing, with the ends of the curve."""
    count = len(curve)
    second = np.diff(np.eye(count), n=2, axis=0)
    found = minimize(
        lambda x: ((x - curve) ** 2).sum(),
        np.linspace(curve[0], curve[-1], count),
        jac=lambda x: 2 * (x - curve),
        method="SLSQP",
        options={"maxiter": 500, "ftol": 1e-12},
        constraints=[
            {"type": "ineq", "fun": lambda x: second @ x, "jac": lambda x: second},
            {"type": "ineq", "fun": lambda x: x[-2] - x[-1]},
            {"type": "eq", "fun": lambda x: np.array([x[0] - curve[0], x[-1] - curve[-1]])},
        ],
    )
    assert found.success
    return found.x


def test_the_nearest_convex_curve():
    np.testing.assert_allclose(mda._convex_fit(np.array([1.0, 1, 0])), [1, 0.5, 0], atol=1e-9)
    np.testing.assert_allclose(mda._convex_fit(np.array([1.0, 0.2, 0])), [1, 0.2, 0], atol=1e-9)
    np.testing.assert_allclose(mda._convex_fit(np.array([0.3, 0.9, 0.5])), [0.5] * 3)
    rng = np.random.default_rng(0)
    for _ in range(5):
        curve = np.sort(rng.random(17))[::-1].copy()
        np.testing.assert_allclose(mda._convex_fit(curve), slow_convex_fit(curve), atol=1e-4)
    steep = mda._convex_fit(np.sort(rng.random(197))[::-1].copy())
    assert (np.diff(steep, n=2) > -1e-9).all()


def slow_metric_driven(model, image, target, guide):
    """Patch after patch and image after image, for a grid of 4 x 4; also the share inserted."""

    def probability(picture):
        with torch.no_grad():
            return model(picture[None]).softmax(-1)[0, target].item()

    def blur(size):
        kernel = np.zeros((size, size))
        kernel[size // 2, size // 2] = 1
        kernel = torch.from_numpy(gaussian_filter(kernel, size)).float()
        return F.conv2d(image[:, None], kernel[None, None], padding=size // 2)[:, 0]

    def show(fill, patches):
        picture = fill.clone()
        for patch in patches:
            rows, columns = (slice(8 * place, 8 * place + 8) for place in divmod(patch, 4))
            picture[:, rows, columns] = image[:, rows, columns]
        return picture

    size = 31
    while probability(blur(size)) > 0.01 and size < 103:
        size += 2
    blurred, zero = blur(size), torch.zeros_like(image)
    low, high, none = probability(blurred), probability(image), probability(zero)
    ranked = sorted(range(16), key=lambda patch: -guide[patch])
    first = []
    while len(first) < 16 and (
        not first or probability(show(blurred, first)) - low < 0.9 * abs(high - low)
    ):
        candidates = [patch for patch in ranked if patch not in first][:8]
        first.append(max(candidates, key=lambda patch: probability(show(blurred, [*first, patch]))))
    last = []
    while len(first) + len(last) < 16:
        candidates = [patch for patch in ranked[::-1] if patch not in first + last][:8]
        last.append(min(candidates, key=lambda patch: probability(show(zero, [*last, patch]))))
    order = first + last[::-1]

    inserted = [probability(show(blurred, order[:count])) for count in range(17)]
    deleted = [probability(show(zero, order[count:])) for count in range(17)]
    rise = [min(max((score - low) / abs(high - low), 0), 1) for score in inserted]
    fall = [min(max((score - none) / abs(high - none), 0), 1) for score in deleted]
    rise = [max(rise[: place + 1]) for place in range(17)]
    fall = [min(fall[: place + 1]) for place in range(17)]
    curve = slow_convex_fit(
        np.array([1 - (up + 1 - down) / 2 for up, down in zip(rise, fall, strict=True)])
    )
    values = torch.zeros(16)
    for place, patch in enumerate(order, start=1):
        drop = curve[place - 1] - curve[place] + 1e-6
        values[patch] = drop / 64 + drop * (16 - place) / 16
    return values, len(first)


def test_metric_driven_patch_by_patch(unsure_vit, images):
    # The class that blurring hides the most, as the insertion would else end at the whole image.
    blurred = torch.stack([mda._blurred(image, 103) for image in images])
    target = (unsure_vit(images).softmax(1) - unsure_vit(blurred).softmax(1)).argmax(1)
    target[2] = 5  # a class whose insertion curve goes up and down
    guides = TransformerAttribution(unsure_vit).attribute(images, target)[:, :1]
    guides = F.avg_pool2d(guides, 8).flatten(1)
    found = metric_driven_maps(unsure_vit, images, target)
    inserted = []
    for image in range(3):
        values, count = slow_metric_driven(unsure_vit, images[image], target[image], guides[image])
        inserted.append(count)
        expected = values.view(4, 4).repeat_interleave(8, 0).repeat_interleave(8, 1)
        torch.testing.assert_close(found[image], expected, rtol=0, atol=1e-4)
    assert all(1 < count < 16 for count in inserted[:2])


def slow_optimised_mask(model, image, target, iterations, steps):
    """The objective written down once, differentiated as a whole."""
    from torchvision.transforms.functional import gaussian_blur

    blurred = gaussian_blur(image, [51, 51], [50.0, 50.0])
    generator = torch.Generator().manual_seed(0)

    def enlarge(mask):
        return F.interpolate(mask[None, None], (96, 96), mode="bilinear", align_corners=True)[0, 0]

    def path(mask, shown, hidden):
        noise = 0.2 * torch.randn(steps, 3, 96, 96, generator=generator)
        scores = []
        for step in range(1, steps + 1):
            part = mask * step / steps
            picture = shown * part + hidden * (1 - part) + noise[step - 1]
            scores.append(model(picture[None]).softmax(-1)[0, target])
        return sum(scores) / steps

    def objective(masks):
        out, into = enlarge(masks[0]), enlarge(masks[1])
        both, product = out * into, masks[0] * masks[1]
        value = path(both, image, blurred) - path(both, blurred, image)
        value = (value + path(out, image, blurred) - path(into, blurred, image)) / 2
        large, smooth = enlarge(product), 0
        for dim in (0, 1):
            weight = torch.exp(-((image.diff(dim=1 + dim)) ** 2) / 0.01).mean(0)
            smooth = smooth + 0.5 * (product.diff(dim=dim) ** 2).mean()
            smooth = smooth + 0.5 * (weight * large.diff(dim=dim) ** 2).mean()
        return value + (1 - product).abs().mean() + 20 * smooth

    masks = torch.ones(2, 12, 12)
    for _ in range(iterations):
        leaf = masks.clone().requires_grad_()
        (gradient,) = torch.autograd.grad(objective(leaf), leaf)
        with torch.no_grad():
            start, step = objective(masks), 1000.0
            while True:
                moved = (masks - step * gradient).clamp(0, 1)
                enough = objective(moved) <= start - 1e-4 * step * (gradient**2).sum()
                if enough or step < 1e-5:
                    break
                step *= 0.2
        masks = moved
    return 1 - enlarge(masks[0] * masks[1])


def test_optimised_masks_by_hand():
    model = demo.load_model()
    images = demo.preprocess(demo.load_scenes().images[:2])
    target = model(images).argmax(1)
    found = optimised_mask_maps(model, images, target, iterations=3, path_steps=2)
    assert (found.amax(dim=(1, 2)) > 0.1).all()
    for image in range(2):
        expected = slow_optimised_mask(model, images[image], target[image], 3, 2)
        torch.testing.assert_close(found[image], expected, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["caap", "mda", "igos"])
def test_the_object_of_a_scene_is_found(monkeypatch, name):
    monkeypatch.setattr(mda, "_CANDIDATES", 2)  # a full search takes a minute
    model = demo.load_model()
    image = demo.preprocess(demo.load_scenes().images[:1])
    target = model(image).argmax(1)
    explain = {**EXPLAIN, "igos": partial(optimised_mask_maps, iterations=5, path_steps=4)}[name]
    maps = explain(model, image, target)
    assert maps.shape == (1, 96, 96)
    found, chance = (
        deletion(model, image, map, target=target) for map in (maps, random_maps(image))
    )
    assert found < chance - 0.1
