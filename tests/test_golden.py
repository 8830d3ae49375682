"""Equality with the authors' published code, on real photos and real weights."""

import copy
import warnings

import naive
import torch

from captum_reflected import (
    AttentionGradCam,
    AttentionRollout,
    ReflectedRelevance,
    TransformerAttribution,
)


def cases(golden, suffix):
    return [tuple(key.split("/")[:2]) for key in golden if key.endswith("/" + suffix)]


def assert_equal_to_golden(relevance, expected):
    assert (relevance - expected).abs().max() <= 1e-5 * expected.max()


def test_relevance_of_all_photos_and_targets_in_one_batch(golden, photos, deit):
    wanted = cases(golden, "gradient_relevance")
    assert len(wanted) == 12
    inputs = torch.stack([photos[name] for name, _ in wanted])
    relevance = TransformerAttribution(deit).relevance(inputs, [int(label) for _, label in wanted])
    for row, (name, label) in zip(relevance, wanted, strict=True):
        assert_equal_to_golden(row, golden[f"{name}/{label}/gradient_relevance"])


def test_relevance_of_each_photo_alone(golden, photos, deit):
    attributor = TransformerAttribution(deit)
    for name, label in cases(golden, "gradient_relevance"):
        relevance = attributor.relevance(photos[name][None], int(label))
        assert_equal_to_golden(relevance[0], golden[f"{name}/{label}/gradient_relevance"])


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
        tolerance = 1e-5 if label == "281" else 1e-4
        assert (normalised - expected).abs().max() <= tolerance
    assert zero == 2
