"""The one loop from masks to what the model says of masked images."""

import pytest
import timm
import torch
from conftest import make_vit
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import ReflectedRelevance, UnsupportedModelError, score_masks
from captum_reflected.masking.precision import Autocast

TARGETS = [2, 5, 0]


def random_masks(*shape):
    return torch.rand(*shape, generator=torch.Generator().manual_seed(3))


def one_by_one(model, images, masks, targets, baseline=0.0):
    """Logits (B, K) of images that are masked by repeating each cell of a mask."""
    height, width = images.shape[-2] // masks.shape[-2], images.shape[-1] // masks.shape[-1]
    enlarged = masks.repeat_interleave(height, -2).repeat_interleave(width, -1)
    with torch.no_grad():
        return torch.stack(
            [
                torch.stack(
                    [model((image * mask + baseline * (1 - mask))[None])[0, target] for mask in own]
                )
                for image, own, target in zip(images, enlarged, targets, strict=True)
            ]
        )


@pytest.mark.parametrize("grid_size", [(4, 4), (2, 8), (32, 32), (1, 1)], ids=str)
@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_masks_of_any_grid(vit, images, grid_size, baseline):
    masks = random_masks(3, 5, *grid_size)
    found = score_masks(vit, images, masks, TARGETS, baselines=baseline)
    expected = one_by_one(vit, images, masks, TARGETS, baseline)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_same_masks_for_every_image(vit, images):
    masks = random_masks(5, 4, 4)
    found = score_masks(vit, (images,), masks, TARGETS)
    assert torch.equal(found, score_masks(vit, images, masks.expand(3, 5, 4, 4), TARGETS))


def test_probabilities_any_function_and_further_arguments(vit, images):
    masks, shift = random_masks(3, 4, 4, 4), torch.arange(3.0)

    def forward(x, added):
        return vit(x + added[:, None, None, None])

    found = score_masks(
        forward, images, masks, TARGETS, shift, score="probability", perturbations_per_eval=1
    )
    for row in range(3):
        shown = images[row] * masks[row].repeat_interleave(8, -2).repeat_interleave(8, -1)[:, None]
        with torch.no_grad():
            expected = vit(shown + shift[row]).softmax(dim=1)[:, TARGETS[row]]
        torch.testing.assert_close(found[row], expected, rtol=1e-4, atol=1e-5)


def test_segments_of_an_image(vit, images):
    """Occlusion of the segments that Captum calls a feature mask."""
    segments = torch.arange(32).div(11, rounding_mode="floor").expand(32, 32)
    masks = 1 - torch.nn.functional.one_hot(segments).permute(2, 0, 1).float()
    found = score_masks(vit, images, masks, 1)
    for place in range(3):
        hidden = images.masked_fill(segments == place, 0.0)
        with torch.no_grad():
            torch.testing.assert_close(found[:, place], vit(hidden)[:, 1], rtol=1e-4, atol=1e-4)


def test_the_scores_of_reflected_relevance(vit, images):
    reflection = ReflectedRelevance(vit).reflect(images, TARGETS)
    assert torch.equal(score_masks(vit, images, reflection.masks, TARGETS), reflection.scores)


# -- tokens that are left out ---------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"reg_tokens": 4}, {"qk_norm": True}], ids=str)
def test_hidden_tokens_are_left_out(images, options):
    """Sequences are cut by hand; masks show as many tokens as they like, of any height."""
    model = make_vit(**options)
    masks = random_masks(3, 6, 4, 4)
    masks[masks < torch.linspace(0, 1.1, 6)[:, None, None]] = 0  # the last one shows nothing
    found = score_masks(model, images, masks, TARGETS, drop_hidden=True)
    prefix = model.num_prefix_tokens
    for row, image in enumerate(images):
        for place, mask in enumerate(masks[row]):
            shown = image * mask.repeat_interleave(8, -2).repeat_interleave(8, -1)
            with torch.no_grad():
                tokens = model._pos_embed(model.patch_embed(shown[None]))
                kept = mask.flatten().nonzero().flatten().tolist() or [0]
                tokens = tokens[:, [*range(prefix), *(prefix + token for token in kept)]]
                logits = model.forward_head(model.norm(model.blocks(tokens)))[0]
            torch.testing.assert_close(
                found[row, place], logits[TARGETS[row]], rtol=1e-4, atol=1e-4
            )


def test_torchvision(images):
    torch.manual_seed(0)
    model = TorchvisionTransformer(32, 8, 2, 2, 16, 32, num_classes=7).eval()
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    masks = random_masks(3, 4, 4, 4)
    all_shown = score_masks(model, images, masks, 1, drop_hidden=True)
    torch.testing.assert_close(
        all_shown, score_masks(model, images, masks, 1), rtol=1e-4, atol=1e-4
    )
    masks[..., :2, :] = 0
    few = score_masks(model, images, masks, 1, drop_hidden=True)
    assert not torch.allclose(few, score_masks(model, images, masks, 1))


def interfered(kind):
    model = make_vit()
    if kind == "hook":
        model.blocks[1].register_forward_hook(lambda *_: None)
    if kind == "function":
        return lambda images: 2 * model(images)
    if kind == "training":
        return make_vit(drop_path_rate=0.1).train()
    if kind == "relative positions":
        return timm.create_model("beit_base_patch16_224", img_size=32, patch_size=8, depth=2).eval()
    if kind == "float16":
        return Autocast(model, torch.float16).eval()
    return model


@pytest.mark.parametrize("kind", ["hook", "function", "training", "relative positions", "float16"])
def test_tokens_cannot_be_left_out_of_any_model(images, kind):
    with pytest.raises(UnsupportedModelError, match=r"drop_hidden is True, .*VisionTransformer of"):
        score_masks(interfered(kind), images, random_masks(2, 4, 4), 1, drop_hidden=True)


def test_tokens_are_not_left_out_with_further_arguments(vit, images):
    with pytest.raises(UnsupportedModelError, match="additional_forward_args"):
        score_masks(vit, images, random_masks(2, 4, 4), 1, (None,), drop_hidden=True)


def test_tokens_are_not_left_out_by_masks_of_another_grid(vit, images):
    with pytest.raises(UnsupportedModelError, match="masks on the grid of its patches"):
        score_masks(vit, images, random_masks(2, 8, 8), 1, drop_hidden=True)


# -- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("masks", "error", "message"),
    [
        ([[1.0]], TypeError, "masks is a list; wanted: a tensor"),
        (torch.ones(2, 4, 4, dtype=torch.bool), TypeError, "masks has dtype torch.bool; wanted: f"),
        (torch.ones(4, 4), ValueError, r"masks has shape \(4, 4\); wanted: \(B, K, gh, gw\) or"),
        (torch.ones(2, 5, 4, 4), ValueError, r"masks has shape \(2, 5, 4, 4\); .*B being 3"),
        (torch.ones(0, 4, 4), ValueError, "at least one mask"),
        (torch.ones(2, 33, 4), ValueError, "a grid of at most 32 x 32"),
        (torch.full((2, 4, 4), 1.5), ValueError, "masks holds values outside of 0 to 1"),
        (torch.full((2, 4, 4), torch.nan), ValueError, "masks holds values outside of 0 to 1"),
    ],
)
def test_bad_masks(images, masks, error, message):
    def forward(_):
        raise AssertionError("the model must not run")

    with pytest.raises(error, match=message):
        score_masks(forward, images, masks, 1)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"score": "loss"}, ValueError, "score is 'loss'; wanted: one of logit, probability"),
        ({"precision": "int8"}, ValueError, "precision is 'int8'"),
        ({"drop_hidden": 1}, TypeError, "drop_hidden is 1; wanted: True or False"),
        ({"baselines": "grey"}, TypeError, "baselines is a str"),
        ({"perturbations_per_eval": 0}, ValueError, "perturbations_per_eval is 0"),
    ],
)
def test_bad_options(vit, images, options, error, message):
    with pytest.raises(error, match=message):
        score_masks(vit, images, random_masks(2, 4, 4), 1, **options)


def test_a_target_that_is_not_there(vit, images):
    with pytest.raises(ValueError, match="out of range"):
        score_masks(vit, images, random_masks(2, 4, 4), 7)


def test_answers_that_are_not_finite(vit, images):
    broken = Broken(vit, images[1])
    with pytest.raises(ValueError, match=r"masked versions is not finite for image\(s\) \[1\]"):
        score_masks(broken, images, random_masks(2, 4, 4).round(), 1)


class Broken(torch.nn.Module):
    """Divides zero by zero where it sees an image again."""

    def __init__(self, model, image):
        super().__init__()
        self.model, self.image = model, image

    def forward(self, x):
        # A masked image has no value that the image has not, or zero.
        seen = ((x == 0) | torch.isclose(x, self.image)).flatten(1).all(dim=1)
        return self.model(x) + torch.where(seen, torch.nan, 0.0)[:, None]


def test_the_model_and_the_random_state_are_left_as_they_were(vit, images):
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    modules = [id(module) for module in vit.modules()]
    state = torch.get_rng_state()
    masks = random_masks(3, 4, 4).round()
    score_masks(vit, images, masks, 1, drop_hidden=True, precision="bf16")
    assert torch.equal(torch.get_rng_state(), state)
    assert [id(module) for module in vit.modules()] == modules
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
