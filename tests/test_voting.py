"""Votes of the reflected images, and reflected images of a few tokens."""

import naive
import pytest
import timm
import torch
from conftest import make_vit
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import ReflectedRelevance, UnsupportedModelError
from captum_reflected.reflection import keep_highest, votes

TARGETS = [2, 5, 0]
GRID = (4, 4)


def naive_voting(model, image, target, keep=None, score="probability"):
    """One image, one mask and one token at a time; the sequence is cut by hand."""
    relevance = naive.relevance_matrix(naive.attention_and_gradients(model, image, target))
    masks = naive.masks(relevance[1:, 1:].T, scale_by_maxima=False).T  # mask j: row j
    tokens = masks.shape[1]
    scores = []
    for mask in masks:
        kept = list(range(tokens))
        if keep is not None:
            kept = sorted(sorted(kept, key=lambda token: -mask[token])[:keep])
        shown = image * mask.reshape(1, *GRID).repeat_interleave(8, 1).repeat_interleave(8, 2)
        with torch.no_grad():
            sequence = model._pos_embed(model.patch_embed(shown[None]))
            sequence = sequence[:, [0, *(1 + token for token in kept)]]
            logits = model.forward_head(model.norm(model.blocks(sequence)))[0]
        scores.append((logits.softmax(0) if score == "probability" else logits)[target])
        mask[[token for token in range(tokens) if token not in kept]] = 0
    scores = torch.stack(scores)
    weights = scores if score == "probability" else (scores - scores.median()).clamp(min=0)
    worth = torch.zeros(tokens)
    for weight, mask in zip(weights, masks, strict=True):
        worth += weight * mask
    scaled = [(term - term.min()) / (term.max() - term.min()) for term in (worth, relevance[0, 1:])]
    return scores, sum(scaled).reshape(GRID)


@pytest.mark.parametrize("score", ["probability", "logit"])
@pytest.mark.parametrize("keep", [None, 1, 5, 16])
def test_voting_matches_the_naive_method(vit, images, keep, score):
    attributor = ReflectedRelevance.voting(vit, keep=keep, score=score)
    reflection = attributor.reflect(images, TARGETS)
    maps = attributor.attribute(images, TARGETS, interpolate_mode="nearest")[:, 0, ::8, ::8]
    for row, (image, target) in enumerate(zip(images, TARGETS, strict=True)):
        scores, heat = naive_voting(vit, image, target, keep, score)
        torch.testing.assert_close(reflection.scores[row], scores, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(maps[row], heat, rtol=1e-3, atol=1e-3)


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
        ({"keep": 2.5}, TypeError, "keep is 2.5; wanted: an int"),
        ({"aggregate": "mean"}, ValueError, "aggregate is 'mean'; wanted: one of token, vote"),
    ],
)
def test_bad_options(vit, options, error, message):
    with pytest.raises(error, match=message):
        ReflectedRelevance(vit, **options)


def test_votes_and_kept_masks_by_hand():
    masks = torch.tensor([[[[0.1, 0.9]], [[0.5, 0.2]]]])
    assert keep_highest(masks, 1).tolist() == torch.tensor([[[[0, 0.9]], [[0.5, 0]]]]).tolist()
    worth = votes(masks, torch.tensor([[1.0, 2.0]]))
    torch.testing.assert_close(worth, torch.tensor([[1.1, 1.3]]))
