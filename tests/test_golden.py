"""Equality with the authors' published code.

On the model and scenes that the package ships, and, where the reference data is at hand, on
real photos and real weights.
"""

import copy
import warnings

import naive
import pytest
import torch
from conftest import DEVICE

from captum_reflected import (
    AttentionGradCam,
    AttentionRollout,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.demo import load_model, load_scenes, preprocess

# LRP divides by sums that are all but zero, so float32 gives fewer digits.
TOLERANCES = {
    (torch.float64, "gradient"): 1e-5,
    (torch.float64, "lrp"): 1e-5,
    (torch.float32, "gradient"): 1e-5,
    (torch.float32, "lrp"): 1e-3,
}


def cases(golden, suffix):
    return [tuple(key.split("/")[:2]) for key in golden if key.endswith("/" + suffix)]


def assert_equal_to_golden(relevance, expected, tolerance=1e-5):
    assert (relevance - expected).abs().max() <= tolerance * expected.abs().max()


# -- the shipped model -------------------------------------------------------------------


def shipped(dtype):
    """The model and all its scenes as its inputs."""
    return load_model().to(DEVICE, dtype), preprocess(load_scenes().images).to(DEVICE, dtype)


@pytest.mark.parametrize(("dtype", "rule"), TOLERANCES, ids=str)
def test_relevance_of_the_shipped_model(golden_demo, dtype, rule):
    model, scenes = shipped(dtype)
    wanted = cases(golden_demo, f"{rule}_relevance")
    assert len(wanted) == 10
    inputs = scenes[[int(scene) for scene, _ in wanted]]
    targets = [int(target) for _, target in wanted]
    relevance = TransformerAttribution(model, rule=rule).relevance(inputs, targets)
    for found, (scene, target) in zip(relevance, wanted, strict=True):
        expected = golden_demo[f"{scene}/{target}/{rule}_relevance"]
        assert_equal_to_golden(found, expected, TOLERANCES[dtype, rule])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_rollout_and_logits_of_the_shipped_model(golden_demo, dtype):
    model, scenes = shipped(dtype)
    names = [key.split("/")[0] for key in golden_demo if key.endswith("/rollout")]
    assert len(names) == 5
    inputs = scenes[[int(name) for name in names]]
    # Patches of 8 pixels; "nearest" repeats each token's value.
    maps = AttentionRollout(model).attribute(inputs, interpolate_mode="nearest")
    rolled = maps[:, 0, 4::8, 4::8].flatten(1)
    assert_equal_to_golden(rolled, torch.stack([golden_demo[f"{n}/rollout"] for n in names]))
    with torch.no_grad():
        logits = model(inputs)
    assert_equal_to_golden(logits, torch.stack([golden_demo[f"{n}/logits"] for n in names]))


# -- real photos and weights -------------------------------------------------------------

# The stored tensors were made in float32, 5e-6 from float64; CPUs round differently.
FLOAT32 = 2e-5


def test_relevance_of_all_photos_and_targets_in_one_batch(golden, photos, deit):
    wanted = cases(golden, "gradient_relevance")
    assert len(wanted) == 12
    inputs = torch.stack([photos[name] for name, _ in wanted])
    relevance = TransformerAttribution(deit).relevance(inputs, [int(label) for _, label in wanted])
    for row, (name, label) in zip(relevance, wanted, strict=True):
        assert_equal_to_golden(row, golden[f"{name}/{label}/gradient_relevance"], FLOAT32)


def test_relevance_of_each_photo_alone(golden, photos, deit):
    attributor = TransformerAttribution(deit)
    for name, label in cases(golden, "gradient_relevance"):
        relevance = attributor.relevance(photos[name][None], int(label))
        assert_equal_to_golden(relevance[0], golden[f"{name}/{label}/gradient_relevance"], FLOAT32)


def test_map_is_the_class_tokens_row_enlarged(golden, photos, deit):
    name, label = cases(golden, "gradient_relevance")[0]
    row = golden[f"{name}/{label}/gradient_relevance"][0, 1:].reshape(1, 1, 14, 14)
    expected = torch.nn.functional.interpolate(row, (224, 224), mode="bilinear")
    attributions = TransformerAttribution(deit).attribute(photos[name][None], int(label))
    torch.testing.assert_close(
        attributions, expected.expand(1, 3, 224, 224), rtol=0, atol=1e-5 * float(expected.max())
    )


def test_explained_forward_answers_as_the_plain_one(golden, photos, deit):
    outputs = []

    def forward(inputs):
        outputs.append(deit(inputs))
        return outputs[-1]

    inputs = torch.stack(list(photos.values()))
    TransformerAttribution(forward).attribute(inputs, 0)
    expected = torch.stack([golden[f"{name}/logits"] for name in photos])
    assert (outputs[0] - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_reflected_relevance_from_golden_relevance(golden, photos, deit):
    """The method on top of the published relevance: masks and scores by the naive equations."""
    name, label = cases(golden, "gradient_relevance")[0]
    relevance = golden[f"{name}/{label}/gradient_relevance"]
    reflection = ReflectedRelevance(deit).reflect(photos[name][None], int(label))
    columns = naive.masks(relevance[1:, 1:])
    torch.testing.assert_close(reflection.masks[0].flatten(1), columns.T, rtol=0, atol=2e-4)
    for token in (0, 97, 195):
        seen = naive.reflected_image(photos[name], columns[:, token], (14, 14))
        with torch.no_grad():
            score = deit(seen[None])[0, int(label)]
        assert abs(float(score - reflection.scores[0, token])) <= 1e-3


def token_maps(attributions):
    """(B, 14, 14) of attributions enlarged with interpolate_mode="nearest"."""
    return attributions[:, 0, 8::16, 8::16]


def published_baselines_model(deit):
    """The baselines were published with torch's default epsilon of LayerNorm."""
    model = copy.deepcopy(deit)
    for module in model.modules():
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-5
    return model


def test_attention_rollout(golden, photos, deit):
    inputs = torch.stack(list(photos.values()))
    expected = torch.stack([golden[f"{name}/rollout"] for name in photos])
    for model, tolerance in ((deit, 1e-5), (published_baselines_model(deit), 1e-7)):
        maps = AttentionRollout(model).attribute(inputs, interpolate_mode="nearest")
        assert (token_maps(maps).flatten(1) - expected).abs().max() <= tolerance


def test_attention_grad_cam(golden, photos, deit):
    wanted = cases(golden, "grad_cam")
    inputs = torch.stack([photos[name] for name, _ in wanted])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # two maps are zero
        maps = AttentionGradCam(published_baselines_model(deit)).attribute(
            inputs, [int(label) for _, label in wanted], interpolate_mode="nearest"
        )
    zero = 0
    for heat, (name, label) in zip(token_maps(maps), wanted, strict=True):
        expected = golden[f"{name}/{label}/grad_cam"]
        if expected.isnan().all():  # min-max of a zero map
            assert not heat.any()
            zero += 1
            continue
        normalised = (heat - heat.min()) / (heat.max() - heat.min())
        # Min-max of a faint map, as of the predicted class, enlarges float32's rounding.
        tolerance = FLOAT32 if label == "281" else 1e-4
        assert (normalised - expected).abs().max() <= tolerance
    assert zero == 2
