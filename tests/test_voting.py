"""Beyond the paper: other masks, sequences of fewer tokens, votes and regression."""

import math
from itertools import product

import naive
import pytest
import timm
import torch
from conftest import make_vit
from test_model_families import TIMM, timm_model
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import ReflectedRelevance, UnsupportedModelError
from captum_reflected.masking.precision import Autocast
from captum_reflected.masking.reflection import (
    _smoothed,
    component_masks,
    regression,
    shape_masks,
    votes,
)
from captum_reflected.metrics import rank_correlation

TARGETS = [2, 5, 0]
GRID = (4, 4)


def naive_shapes(masks, stride, smooth, opposites, keep, binary):
    """A list of (tokens fed, weight of every token), one mask and one token at a time."""
    tokens = masks.shape[1]
    chosen = list(masks)
    if stride > 1:
        chosen = [
            masks[row * GRID[1] + column]
            for row in range(0, GRID[0], stride)
            for column in range(0, GRID[1], stride)
        ]
    if smooth:
        chosen = [naive_smoothed(mask.reshape(GRID), smooth).flatten() for mask in chosen]
        chosen = [(mask - mask.min()) / (mask.max() - mask.min()) for mask in chosen]
    if opposites:
        chosen += [1 - mask for mask in chosen]
    shapes = []
    for mask in chosen:
        fed = list(range(tokens))
        if keep is not None or binary:
            fed = sorted(sorted(fed, key=lambda token: -mask[token])[: keep or tokens // 2])
        weight = torch.zeros(tokens)
        for token in fed:
            weight[token] = 1.0 if binary else mask[token]
        shapes.append((fed if keep is not None else list(range(tokens)), weight))
    return shapes


def naive_smoothed(grid, sigma):
    """Every cell the weighted mean of those up to 3 sigma away, down and across."""
    reach = math.ceil(3 * sigma)
    smooth = torch.zeros_like(grid)
    for row, column in product(range(GRID[0]), range(GRID[1])):
        total = 0.0
        for down, across in product(range(-reach, reach + 1), repeat=2):
            weight = math.exp(-(down**2 + across**2) / (2 * sigma**2))
            at = min(max(row + down, 0), GRID[0] - 1), min(max(column + across, 0), GRID[1] - 1)
            smooth[row, column] += weight * grid[at]
            total += weight
        smooth[row, column] /= total
    return smooth


def naive_regression(weights, scores):
    """The posterior mean by its other form, in weight space (Rasmussen & Williams, eq. 2.8)."""
    places = torch.tensor(list(product(range(GRID[0]), range(GRID[1]))), dtype=torch.float64)
    kernel = (-(torch.cdist(places, places) ** 2) / (2 * 0.7**2)).exp()
    design = (weights - weights.mean(0)).double()
    centred = (scores - scores.mean()).double()
    noise = 0.3 * torch.stack([row @ kernel @ row for row in design]).mean()
    precision = design.T @ design / noise + torch.linalg.inv(kernel)
    return (torch.linalg.inv(precision) @ design.T @ centred / noise).float()


def naive_voting(
    model,
    image,
    target,
    score="probability",
    aggregate="vote",
    stride=1,
    smooth=0.0,
    opposites=False,
    keep=None,
    binary=False,
    reflect="rows",
    components=None,
    weight=1.0,
):
    """One image, one mask and one token at a time; the sequence is cut by hand."""
    maps = naive.attention_and_gradients(model, image, target)
    relevance = naive.relevance_matrix(maps)
    if reflect == "rows":
        masks = naive.masks(relevance[1:, 1:].T, scale_by_maxima=False).T  # mask j: row j
    else:
        layers = [layer[1:, 1:] for layer in naive.layer_relevances(maps)]
        masks = naive.component_masks(layers, components)
    shapes = naive_shapes(masks, stride, smooth, opposites, keep, binary)
    scores = []
    for fed, mask in shapes:
        shown = image * mask.reshape(1, *GRID).repeat_interleave(8, 1).repeat_interleave(8, 2)
        with torch.no_grad():
            sequence = model._pos_embed(model.patch_embed(shown[None]))
            sequence = sequence[:, [0, *(1 + token for token in fed)]]
            logits = model.forward_head(model.norm(model.blocks(sequence)))[0]
        scores.append((logits.softmax(0) if score == "probability" else logits)[target])
    scores = torch.stack(scores)
    shown = torch.stack([mask for _, mask in shapes])
    if aggregate == "regression":
        worth = naive_regression(shown, scores)
    else:
        by_logit = (scores - scores.median()).clamp(min=0)
        worth = (scores if score == "probability" else by_logit) @ shown
    scaled = [(term - term.min()) / (term.max() - term.min()) for term in (worth, relevance[0, 1:])]
    return scores, (weight * scaled[0] + scaled[1]).reshape(GRID)


OPTIONS = [
    {},
    {"score": "logit"},
    {"keep": 1},
    {"keep": 5, "score": "logit"},
    {"keep": 16},
    {"smooth": 1.5},
    {"stride": 2, "opposites": True},
    {"binary": True},
    {"binary": True, "keep": 5, "opposites": True},
    {"binary": True, "smooth": 1.0, "opposites": True, "aggregate": "regression"},
    {"binary": True, "keep": 8, "opposites": True, "aggregate": "regression", "stride": 3},
    {"smooth": 0.5, "aggregate": "regression", "score": "logit"},
    {"reflect": "components", "components": 6},
    {"reflect": "components", "components": 3, "binary": True, "opposites": True, "keep": 5},
    {"reflect": "components", "components": 4, "binary": True, "aggregate": "regression"},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_voting_matches_the_naive_method(vit, images, options):
    attributor = ReflectedRelevance(
        vit,
        scale_by_maxima=False,
        **{"reflect": "rows", "aggregate": "vote", "score": "probability", **options},
    )
    reflection = attributor.reflect(images, TARGETS)
    maps = attributor.attribute(images, TARGETS, interpolate_mode="nearest")[:, 0, ::8, ::8]
    for row, (image, target) in enumerate(zip(images, TARGETS, strict=True)):
        scores, heat = naive_voting(vit, image, target, **options)
        torch.testing.assert_close(reflection.scores[row], scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(maps[row], heat, rtol=2e-3, atol=2e-3)


@pytest.mark.parametrize(
    ("given", "masks"),
    [
        ({}, {"stride": 2, "smooth": 1.5, "weight": 0.3}),
        ({"components": 7}, {"reflect": "components", "components": 7, "weight": 0.5}),
    ],
)
def test_voting_is_what_it_says(vit, images, given, masks):
    options = {"aggregate": "regression", "opposites": True, "binary": True, **masks}
    _, heat = naive_voting(vit, images[1], TARGETS[1], **options)
    found = ReflectedRelevance.voting(vit, **given).attribute(
        images[1:2], TARGETS[1], interpolate_mode="nearest"
    )
    torch.testing.assert_close(found[0, 0, ::8, ::8], heat.square(), rtol=2e-3, atol=2e-3)


def test_components_of_the_layers():
    generator = torch.Generator().manual_seed(0)
    layers = [torch.rand(2, 12, 12, generator=generator) ** 4 for _ in range(3)]
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
def test_components_of_every_family_of_timm(kind):
    name, options, size, _ = TIMM[kind]
    attributor = ReflectedRelevance.voting(timm_model(name, options, size), components=6)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    maps = attributor.attribute(images, 1)
    assert (maps.amax(dim=(1, 2, 3)) > maps.amin(dim=(1, 2, 3))).all()
    torch.testing.assert_close(attributor.attribute(images[1:], 1), maps[1:], rtol=0, atol=1e-3)


def test_no_more_components_than_there_are():
    assert component_masks([torch.rand(1, 6, 6)], (2, 3), 20).shape == (1, 5, 2, 3)
    assert not component_masks([torch.zeros(1, 6, 6)], (2, 3), 4).any()
    # Two kinds of tokens: one component tells them apart.
    layer = torch.zeros(1, 6, 6)
    layer[:, :2] = 1.0
    masks = component_masks([layer], (2, 3), 4)
    torch.testing.assert_close(masks[0, 0].flatten(), torch.tensor([1.0, 1, 0, 0, 0, 0]))
    assert not masks[0, 1:].any()


def test_all_tokens_kept_is_the_same_as_none_left_out(vit, images):
    few = ReflectedRelevance(vit, keep=16).attribute(images, TARGETS)
    torch.testing.assert_close(
        few, ReflectedRelevance(vit).attribute(images, TARGETS), rtol=1e-4, atol=1e-4
    )


@pytest.mark.parametrize("options", [{"reg_tokens": 4}, {"global_pool": "avg"}, {"qk_norm": True}])
def test_models_whose_tokens_can_be_left_out(images, options):
    model = make_vit(**options)
    kept = ReflectedRelevance(model, keep=3).reflect(images, 1)
    assert (kept.masks.flatten(2) > 0).sum(dim=-1).max() == 3
    full = ReflectedRelevance(model).reflect(images, 1)
    assert not torch.allclose(kept.scores, full.scores)


def test_torchvision(images):
    torch.manual_seed(0)
    model = TorchvisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    full = ReflectedRelevance(model).reflect(images, 1)
    few = ReflectedRelevance(model, keep=16).reflect(images, 1)
    torch.testing.assert_close(few.scores, full.scores, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(
        ReflectedRelevance(model, keep=4).reflect(images, 1).scores, full.scores
    )


def test_the_same_input_gives_the_same_map(vit, images):
    attributor = ReflectedRelevance.voting(vit, keep=4)
    first = attributor.attribute(images, TARGETS)
    assert torch.equal(first, attributor.attribute(images, TARGETS))
    alone = attributor.attribute(images[1:2], TARGETS[1])
    torch.testing.assert_close(alone, first[1:2], rtol=1e-4, atol=1e-4)


def test_bf16(vit, images):
    full = ReflectedRelevance.voting(vit, keep=4).reflect(images, TARGETS)
    half = ReflectedRelevance.voting(vit, keep=4, precision="bf16").reflect(images, TARGETS)
    assert not torch.equal(full.scores, half.scores)
    torch.testing.assert_close(full.scores, half.scores, rtol=0, atol=0.1)


def test_the_model_is_left_as_it_was(vit, images):
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    modules = [id(module) for module in vit.modules()]
    ReflectedRelevance.voting(vit, keep=4, precision="bf16").attribute(images, TARGETS)
    assert [id(module) for module in vit.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())


def interfered(kind):
    model = make_vit()
    if kind == "hook":
        model.blocks[1].register_forward_hook(lambda *_: None)
    if kind == "function":
        return lambda images: model(images)
    if kind == "training":
        return make_vit(drop_path_rate=0.1).train()
    if kind == "relative positions":
        return timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, depth=2).eval()
    return model


@pytest.mark.parametrize("kind", ["hook", "function", "training", "relative positions"])
def test_keep_is_refused_where_tokens_cannot_be_left_out(images, kind):
    with pytest.raises(UnsupportedModelError, match=r"keep is 4, .*wanted: a VisionTransformer"):
        ReflectedRelevance(interfered(kind), keep=4).attribute(images, 1)


def test_keep_is_refused_with_further_arguments(images):
    with pytest.raises(UnsupportedModelError, match="additional_forward_args"):
        ReflectedRelevance(make_vit(), keep=4).attribute(images, 1, (None,))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"keep": 0}, ValueError, "keep is 0; wanted: 1 or more"),
        ({"keep": 2.5}, ValueError, "keep is 2.5; wanted: a number of tokens, or a share under 1"),
        ({"keep": "half"}, TypeError, "keep is 'half'; wanted: an int"),
        ({"aggregate": "mean"}, ValueError, "aggregate is 'mean'; wanted: one of token, vote"),
        ({"stride": 2}, ValueError, "stride is 2, .* wants one reflected image for each token"),
        ({"opposites": True}, ValueError, "opposites is True, .* aggregate is 'token'"),
        ({"stride": 0, "aggregate": "vote"}, ValueError, "stride is 0; wanted: 1 or more"),
        (
            {"reflect": "components", "scale_by_maxima": False},
            ValueError,
            "reflect is 'components' and aggregate is 'token'",
        ),
        (
            {"reflect": "components", "aggregate": "vote"},
            ValueError,
            "scale_by_maxima is True and stride is 1: .*wanted: scale_by_maxima=False",
        ),
        ({"components": 3}, ValueError, "components is 3 and reflect is 'columns'; wanted"),
        ({"components": 2.5}, TypeError, "components is 2.5; wanted: an int"),
        ({"components": 0}, ValueError, "components is 0; wanted: 1 or more"),
        ({"opposites": 1}, TypeError, "opposites is 1; wanted: True or False"),
        ({"smooth": -1}, ValueError, "smooth is -1; wanted: a number, 0 or more"),
        ({"smooth": "1"}, TypeError, "smooth is '1'; wanted: a number"),
        ({"binary": 1}, TypeError, "binary is 1; wanted: True or False"),
    ],
)
def test_bad_options(vit, options, error, message):
    with pytest.raises(error, match=message):
        ReflectedRelevance(vit, **options)


def test_votes_and_shaped_masks_by_hand():
    masks = torch.tensor([[[[0.1, 0.9]], [[0.5, 0.2]]]])
    kept = [[[[0, 0.9]], [[0.5, 0]]]]
    assert shape_masks(masks, keep=1).tolist() == torch.tensor(kept).tolist()
    halves = shape_masks(masks, binary=True, opposites=True)
    assert halves.tolist() == [[[[0, 1]], [[1, 0]], [[1, 0]], [[0, 1]]]]
    worth = votes(masks, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(worth, torch.tensor([[1.1, 1.3]]))


@pytest.mark.parametrize("grid_size", [(5, 5), (4, 4), (1, 7), (3, 1)])
def test_halves_hold_every_token_once(grid_size):
    tokens = grid_size[0] * grid_size[1]
    masks = torch.randint(0, 3, (2, tokens, *grid_size)) / 2  # many are equal
    masks[..., 0, 0] = 0.25
    halves = shape_masks(masks, binary=True, opposites=True)
    shown, hidden = halves.chunk(2, dim=1)
    assert torch.equal(shown + hidden, torch.ones_like(masks))
    assert (shown.flatten(2).sum(dim=-1) == -(-tokens // 2)).all()


@pytest.mark.parametrize("smooth", [0.3, 1.5, 40.0])
def test_smoothing_is_a_mean(smooth):
    masks = torch.rand(1, 15, 3, 5)
    with torch.autocast("cpu", torch.bfloat16):
        smoothed = _smoothed(masks, smooth)
    assert smoothed.dtype == torch.float32
    assert smoothed.min() >= masks.min()
    assert smoothed.max() <= masks.max()
    torch.testing.assert_close(_smoothed(torch.ones(1, 1, 3, 5), smooth), torch.ones(1, 1, 3, 5))


def test_a_share_of_the_tokens(vit, images):
    share = ReflectedRelevance.voting(vit, keep=0.3).attribute(images, TARGETS)
    assert torch.equal(share, ReflectedRelevance.voting(vit, keep=5).attribute(images, TARGETS))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"keep": 16}, "keep is 16 and the model has 16 image tokens"),
        ({"stride": 4, "opposites": False}, r"grid of tokens is \(4, 4\), stride is 4 and"),
        ({"components": 1, "opposites": False}, "components is 1, which makes 1 reflected images"),
    ],
)
def test_options_that_leave_nothing_to_regress_on(vit, images, options, message):
    with pytest.raises(ValueError, match=message):
        ReflectedRelevance.voting(vit, **options).attribute(images, TARGETS)


def test_a_model_under_our_autocast_is_known(vit, images):
    wrapped = Autocast(vit, torch.bfloat16).eval()
    half = ReflectedRelevance.voting(vit, keep=4, precision="bf16").reflect(images, TARGETS)
    few = ReflectedRelevance.voting(wrapped, keep=4).reflect(images, TARGETS)
    torch.testing.assert_close(few.scores, half.scores, rtol=0, atol=0.006)
    assert rank_correlation(few.scores, half.scores).min() > 0.8
    with pytest.raises(UnsupportedModelError, match="keep is 4"):
        ReflectedRelevance(Autocast(vit, torch.float16).eval(), keep=4).attribute(images, 1)


def test_a_mask_that_says_nothing_shows_nothing():
    masks = torch.zeros(1, 4, 2, 2)
    masks[0, 1] = torch.tensor([[0.0, 1.0], [0.5, 0.2]])
    for options in ({"opposites": True}, {"binary": True, "opposites": True}, {"smooth": 1.0}):
        shaped = shape_masks(masks, **options)[0].flatten(1).any(dim=1)
        assert shaped.nonzero().flatten().tolist() == ([1, 5] if len(shaped) == 8 else [1])


def test_regression_finds_the_tokens_that_count():
    generator = torch.Generator().manual_seed(0)
    masks = (torch.rand(2, 300, 6, 6, generator=generator) < 0.5).float()
    truth = torch.zeros(2, 6, 6)
    truth[0, 1:3, 1:3], truth[1, 4:, 3:] = 1.0, -2.0
    scores = torch.einsum("bkhw,bhw->bk", masks, truth) + 5
    found = regression(masks, scores).reshape(2, 6, 6)
    assert (found - truth).abs().max() < 0.5
    assert torch.equal(
        found[0].flatten().topk(4).indices.sort().values, truth[0].flatten().nonzero()[:, 0]
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("count", "value"), [(3, 0.5), (7, 0.1), (49, 0.9999951), (98, 0.7)])
def test_regression_of_nothing_is_zero(dtype, count, value):
    scores = torch.rand(2, count, dtype=dtype)
    worth = regression(torch.full((2, count, 2, 2), value), scores)
    assert worth.dtype == dtype
    assert not worth.any()
    assert not regression(torch.rand(1, count, 2, 2), torch.full((1, count), value)).any()
