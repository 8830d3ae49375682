"""Complementary halves of the image, and the regression of what the model says of them."""

import warnings
from contextlib import nullcontext
from itertools import product

import naive
import pytest
import torch
from conftest import make_vit
from test_balanced import by_hand
from test_model_families import TIMM, timm_model

from captum_reflected import BalancedRelevance, MaskRegression, score_masks
from captum_reflected.masking.components import (
    complementary_halves,
    component_masks,
    regression,
)
from captum_reflected.masking.precision import Autocast

TARGETS = [2, 5, 0]
GRID = (4, 4)


def naive_regression(weights, scores):
    """The posterior mean by its other form, in weight space (Rasmussen & Williams, eq. 2.8)."""
    places = torch.tensor(list(product(range(GRID[0]), range(GRID[1]))), dtype=torch.float64)
    kernel = (-(torch.cdist(places, places) ** 2) / (2 * 0.7**2)).exp()
    design = (weights - weights.mean(0)).double()
    centred = (scores - scores.mean()).double()
    noise = 0.3 * torch.stack([row @ kernel @ row for row in design]).mean()
    precision = design.T @ design / noise + torch.linalg.inv(kernel)
    found = (torch.linalg.inv(precision) @ design.T @ centred / noise).float()
    # The scores have the variance of what the tokens add, and of the noise.
    return found, (centred.square().mean() / (noise / 0.3 + noise)).sqrt().float()


def naive_halves(masks):
    """(tokens shown, weight of every token), one mask and one token at a time."""
    order = [sorted(range(len(mask)), key=lambda token, mask=mask: -mask[token]) for mask in masks]
    shown = [tokens[: len(tokens) // 2] for tokens in order]
    shown += [tokens[len(tokens) // 2 :] for tokens in order]
    return [sorted(tokens) for tokens in shown]


def naive_fit(model, image, target, pairs, drop_hidden):
    """One image and one half at a time; the gradient and the sequence are written by hand."""
    output, inputs, _ = by_hand(model, image[None])
    gradients = torch.autograd.grad(output[0, target], inputs)
    relevance = torch.stack([(z * g).sum(-1)[0] for z, g in zip(inputs, gradients, strict=True)])
    relevance = relevance.mean(0)[1:].detach()
    layers = [
        (z - z.mean(-1, keepdim=True)) / z.std(-1, correction=0, keepdim=True)
        for z in (tokens.detach()[0, 1:] for tokens in inputs)
    ]
    scores, shown = [], []
    for tokens in naive_halves(naive.component_masks(layers, pairs)):
        mask = torch.zeros(16)
        mask[tokens] = 1.0
        seen = image * mask.reshape(1, *GRID).repeat_interleave(8, 1).repeat_interleave(8, 2)
        with torch.no_grad():
            sequence = model._pos_embed(model.patch_embed(seen[None]))
            if drop_hidden:
                sequence = sequence[:, [0, *(1 + token for token in tokens)]]
            logits = model.forward_head(model.norm(model.blocks(sequence)))[0]
        scores.append(logits.softmax(0)[target])
        shown.append(mask)
    scores = torch.stack(scores)
    adds, deviation = naive_regression(torch.stack(shown), scores)
    heat = relevance / relevance.std(correction=0) + adds / deviation
    return scores, adds, relevance, heat.reshape(GRID)


# Hidden tokens are left out of the sequence where no baseline is asked for.
@pytest.mark.parametrize(
    ("forwards", "pairs", "baselines"), [(10, 7, None), (17, 7, 0.0), (5, 1, 0)]
)
def test_the_method_by_hand(vit, images, forwards, pairs, baselines):
    attributor = MaskRegression(vit, forwards=forwards)
    fit = attributor.fit(images, TARGETS, baselines=baselines)
    maps = attributor.attribute(images, TARGETS, baselines=baselines, interpolate_mode="nearest")[
        :, 0, ::8, ::8
    ]
    assert fit.masks.shape == (3, 2 * pairs, *GRID)
    for row, (image, target) in enumerate(zip(images, TARGETS, strict=True)):
        scores, adds, relevance, heat = naive_fit(vit, image, target, pairs, baselines is None)
        torch.testing.assert_close(fit.relevance[row], relevance, rtol=1e-3, atol=1e-4)
        torch.testing.assert_close(fit.scores[row], scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(fit.token_weights[row], adds, rtol=2e-3, atol=2e-3)
        torch.testing.assert_close(maps[row], heat, rtol=1e-2, atol=1e-2)


def test_the_relevance_is_that_of_balanced_relevance(vit, images):
    fit = MaskRegression(vit, forwards=5).fit(images, TARGETS)
    expected = BalancedRelevance(vit).attribute(images, TARGETS, interpolate_mode="nearest")
    torch.testing.assert_close(fit.relevance, expected[:, 0, ::8, ::8].flatten(1))


@pytest.mark.parametrize("how", ["function", "baselines"])
def test_hidden_tokens_are_shown_as_the_baseline_where_they_cannot_be_left_out(how):
    """Half as many masks then have the same price."""
    model, images = make_vit(), torch.randn(1, 3, 32, 32)
    forward = (lambda x: 1 * model(x)) if how == "function" else model
    baselines = 0.0 if how == "baselines" else None
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fit = MaskRegression(forward, forwards=11).fit(images, 1, baselines=baselines)
        MaskRegression(lambda x: 2 * model(x), forwards=11).fit(images, 1, baselines=baselines)
    assert [str(warning.message)[:61] for warning in told] == (
        ["tokens can be left out of this VisionTransformer, but not out"]
        if baselines is None
        else []
    )
    assert fit.masks.shape[1] == 8
    expected = score_masks(model, images, fit.masks, 1, score="probability")
    torch.testing.assert_close(fit.scores, expected, rtol=1e-4, atol=1e-5)


def test_hidden_tokens_are_left_out_of_a_model_inside_a_function(vit, images):
    expected = MaskRegression(vit, forwards=11).fit(images, TARGETS)
    assert expected.masks.shape[1] == 16
    for forward in (lambda x: vit(x), torch.nn.Sequential(vit), vit.__call__):
        fit = MaskRegression(forward, forwards=11).fit(images, TARGETS)
        assert torch.equal(fit.scores, expected.scores)
        assert torch.equal(fit.masks, expected.masks)


def test_no_warning_where_nothing_can_be_done():
    """No tokens can be left out of these models, however they are passed."""
    name, options, size, _ = TIMM["beit"]
    beit = timm_model(name, options, size)
    adapted = make_vit()
    adapted.blocks[1].ls1 = type("Adapter", (torch.nn.Identity,), {})()
    for model, shape in ((beit, size), (adapted.eval(), (32, 32))):
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)
            fit = MaskRegression(model, forwards=7).fit(torch.randn(1, 3, *shape), 1)
        assert fit.masks.shape[1] == 4


@pytest.mark.parametrize("state", ["training", "hook", "autocast", "arguments"])
def test_a_state_in_which_tokens_are_not_left_out_is_told(state, images):
    model, arguments = make_vit(), None
    context = nullcontext()
    if state == "training":
        model.norm.train()
    if state == "hook":
        model.register_forward_hook(lambda *_: None)
    if state == "autocast":
        context = torch.autocast("cpu", torch.bfloat16)
    forward = model
    if state == "arguments":
        arguments, forward = 3, lambda x, _: model(x)
    with context, pytest.warns(UserWarning, match="half as many halves .* Wanted.* in eval mode"):
        fit = MaskRegression(forward, forwards=7).fit(images, 1, arguments)
    assert fit.masks.shape[1] == 4


def test_one_number_per_image_is_scored_as_it_is(vit, images):
    fit = MaskRegression(lambda x: 3 * vit(x)[:, 1] - 2, forwards=9).fit(images)
    expected = score_masks(vit, images, fit.masks, 1)
    torch.testing.assert_close(fit.scores, 3 * expected - 2, rtol=1e-4, atol=1e-4)


def test_components_of_the_layers():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.randn(2, 12, width, generator=generator) ** 3 for width in (5, 8, 8)]
    with torch.autocast("cpu", torch.bfloat16):
        masks = component_masks(layers, (3, 4), 7)
    for row in range(2):
        expected = naive.component_masks([layer[row] for layer in layers], 7)
        torch.testing.assert_close(masks[row], expected.view(7, 3, 4), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("scale", [1e-30, 1e30])
def test_components_do_not_depend_on_the_scale(scale):
    layers = [torch.rand(1, 6, 6, generator=torch.Generator().manual_seed(0))]
    scaled = component_masks([layer * scale for layer in layers], (2, 3), 3)
    torch.testing.assert_close(scaled, component_masks(layers, (2, 3), 3), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", sorted(TIMM))
def test_every_family_of_timm(kind):
    name, options, size, _ = TIMM[kind]
    attributor = MaskRegression(timm_model(name, options, size), forwards=9)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    maps = attributor.attribute(images, 1)
    assert (maps.amax(dim=(1, 2, 3)) > maps.amin(dim=(1, 2, 3))).all()
    torch.testing.assert_close(attributor.attribute(images[1:], 1), maps[1:], rtol=0, atol=1e-2)


def test_no_more_components_than_there_are():
    assert component_masks([torch.rand(1, 6, 9)], (2, 3), 20).shape == (1, 5, 2, 3)
    assert not component_masks([torch.zeros(1, 6, 6)], (2, 3), 4).any()
    # Two kinds of tokens: one component tells them apart.
    layer = torch.zeros(1, 6, 3)
    layer[:, :2] = 1.0
    masks = component_masks([layer], (2, 3), 4)
    torch.testing.assert_close(masks[0, 0].flatten(), torch.tensor([1.0, 1, 0, 0, 0, 0]))
    assert not masks[0, 1:].any()


def test_the_same_input_gives_the_same_map(vit, images):
    attributor = MaskRegression(vit, forwards=9)
    first = attributor.attribute(images, TARGETS)
    assert torch.equal(first, attributor.attribute(images, TARGETS))
    alone = attributor.attribute(images[1:2], TARGETS[1])
    torch.testing.assert_close(alone, first[1:2], rtol=1e-4, atol=1e-4)


def test_bf16(vit, images):
    full = MaskRegression(vit).fit(images, TARGETS)
    half = MaskRegression(vit, precision="bf16").fit(images, TARGETS)
    assert not torch.equal(full.scores, half.scores)
    torch.testing.assert_close(full.scores, half.scores, rtol=0, atol=0.1)
    wrapped = MaskRegression(Autocast(vit, torch.bfloat16).eval())
    few = wrapped.fit(images, TARGETS)
    torch.testing.assert_close(few.scores, half.scores, rtol=0, atol=0.03)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"forwards": 4}, ValueError, "forwards is 4; wanted: 5 or more"),
        ({"forwards": 20.5}, TypeError, "forwards is 20.5; wanted: an int"),
        ({"precision": "fp8"}, ValueError, "precision is 'fp8'; wanted: None or \"bf16\""),
    ],
)
def test_bad_options(vit, options, error, message):
    with pytest.raises(error, match=message):
        MaskRegression(vit, **options)


def test_one_token_is_refused():
    model = make_vit(img_size=8, patch_size=8)
    with pytest.raises(ValueError, match="the model has one image token; wanted: two or more"):
        MaskRegression(model).attribute(torch.randn(1, 3, 8, 8), 1)


@pytest.mark.parametrize("grid_size", [(5, 5), (4, 4), (1, 7), (3, 1)])
def test_halves_hold_every_token_once(grid_size):
    tokens = grid_size[0] * grid_size[1]
    masks = torch.randint(0, 3, (2, tokens, *grid_size)) / 2  # many are equal
    masks[..., 0, 0] = 0.25
    shown, hidden = complementary_halves(masks).chunk(2, dim=1)
    assert torch.equal(shown + hidden, torch.ones_like(masks))
    assert (shown.flatten(2).sum(dim=-1) == -(-tokens // 2)).all()
    assert shown.dtype == masks.dtype


def test_a_mask_that_says_nothing_shows_nothing():
    masks = torch.zeros(1, 2, 2, 2)
    masks[0, 1] = torch.tensor([[0.0, 1.0], [0.5, 0.2]])
    expected = [[[0, 0], [0, 0]], [[0, 1], [1, 0]], [[0, 0], [0, 0]], [[1, 0], [0, 1]]]
    assert complementary_halves(masks)[0].tolist() == expected


def test_regression_finds_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 300, 6, 6, generator=generator) < 0.5).float()
    truth = torch.zeros(2, 6, 6)
    truth[0, 1:3, 1:3], truth[1, 4:, 3:] = 1.0, -2.0
    scores = torch.einsum("bkhw,bhw->bk", masks, truth) + 5
    found, deviation = regression(masks, scores)
    found = found.reshape(2, 6, 6)
    assert (deviation > 0).all()
    assert (found - truth).abs().max() < 0.5
    assert torch.equal(
        found[0].flatten().topk(4).indices.sort().values, truth[0].flatten().nonzero()[:, 0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "value"), [(3, 0.5), (7, 0.1), (49, 0.9999951), (98, 0.7)])
def test_regression_of_nothing_is_zero(dtype, count, value):
    scores = torch.rand(2, count, dtype=dtype)
    adds, deviation = regression(torch.full((2, count, 2, 2), value), scores)
    assert adds.dtype == dtype
    assert not adds.any()
    assert not deviation.any()
    adds, deviation = regression(torch.rand(1, count, 2, 2), torch.full((1, count), value))
    assert not adds.any()
    assert not deviation.any()
