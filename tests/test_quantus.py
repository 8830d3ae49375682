"""Quantus runs on our explanations, and its numbers are ours where both measure one thing."""

import numpy as np
import pytest
import quantus
import torch
from captum.attr import IntegratedGradients

from captum_reflected import TransformerAttribution, demo
from captum_reflected.attr.methods import METHODS
from captum_reflected.integrations.quantus import quantus_explain
from captum_reflected.metrics import (
    pointing_game,
    relevance_mass_accuracy,
    relevance_rank_accuracy,
)


@pytest.fixture(scope="module")
def model():
    return demo.load_model().eval()


@pytest.fixture(scope="module")
def scenes():
    """Images, classes and masks (B, 1, H, W), as Quantus takes them."""
    loaded = demo.load_scenes()
    images = demo.preprocess(loaded.images)
    return images[:6].numpy(), loaded.labels[:6].numpy(), loaded.masks[:6, None].numpy()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_by_its_name(model, scenes, method):
    images, labels, _ = scenes
    before = images.copy()
    found = quantus_explain(model, images[:2], labels[:2], method=method)
    expected = METHODS[method].explain(model, torch.tensor(images[:2]), torch.tensor(labels[:2]))
    assert found.dtype == np.float32
    np.testing.assert_allclose(found[:, 0], expected.detach().numpy(), rtol=1e-5, atol=1e-8)
    assert np.array_equal(images, before)


def test_arrays_of_any_kind(model, scenes):
    images, labels, _ = scenes
    expected = quantus_explain(model, images[:2], labels[:2])
    for given in (torch.tensor(images[:2]), images[:2].astype(np.float64)):
        assert np.array_equal(quantus_explain(model, given, labels[:2].tolist()), expected)


def test_classes_and_functions(model, scenes):
    images, labels, _ = scenes
    wanted = quantus_explain(model, images, labels, start_layer=1)
    of_class = quantus_explain(model, images, labels, method=TransformerAttribution, start_layer=1)
    np.testing.assert_allclose(of_class, 3 * wanted, rtol=1e-5)  # channels are summed
    integrated = quantus_explain(model, images[:1], labels[:1], method=IntegratedGradients)
    assert integrated.shape == (1, 1, 96, 96)

    def scaled(model, x, target, *, scale):
        return scale * METHODS["transformer_attribution"].explain(model, x, target, start_layer=1)

    of_function = quantus_explain(model, images, labels, method=scaled, scale=2.0, device="cpu")
    np.testing.assert_allclose(of_function, 2 * wanted, rtol=1e-5)


# Quantus and we, by formulas that were written apart.
ORACLES = {
    "mass": (quantus.RelevanceMassAccuracy, relevance_mass_accuracy),
    "rank": (quantus.RelevanceRankAccuracy, relevance_rank_accuracy),
    "pointing": (quantus.PointingGame, pointing_game),
}


@pytest.mark.parametrize("method", ["transformer_attribution", "saliency"])
@pytest.mark.parametrize("oracle", ORACLES)
def test_localisation_is_quantus_own(model, scenes, oracle, method):
    images, labels, masks = scenes
    theirs, ours = ORACLES[oracle]
    metric = theirs(abs=False, normalise=False, disable_warnings=True)
    found = metric(
        model=model, x_batch=images, y_batch=labels, s_batch=masks, device="cpu",
        explain_func=quantus_explain, explain_func_kwargs={"method": method},
    )  # fmt: skip
    heat = METHODS[method].explain(model, torch.tensor(images), torch.tensor(labels))
    expected = ours(heat, masks=torch.tensor(masks[:, 0]))
    # Both maps have no negative values. A place shared by tied pixels is part of a pixel.
    tolerance = 2 / masks.sum(axis=(1, 2, 3)).min() if oracle == "rank" else 1e-5
    np.testing.assert_allclose(np.array(found, dtype=float), expected.numpy(), atol=tolerance)
    assert expected.mean() > 0.1


def test_pixel_flipping(model, scenes):
    """Quantus removes pixels in our order: what the model looks at goes first."""
    images, labels, _ = scenes
    metric = quantus.PixelFlipping(
        features_in_step=3 * 96 * 8, perturb_baseline="black", abs=False, normalise=False,
        disable_warnings=True,
    )  # fmt: skip
    arguments = {
        "model": model, "x_batch": images[:3], "y_batch": labels[:3], "softmax": True,
        "device": "cpu", "explain_func": quantus_explain,
    }  # fmt: skip
    good, control = (
        np.array(metric(**arguments, explain_func_kwargs={"method": method}))
        for method in ("transformer_attribution", "center_gaussian")
    )
    assert good.shape == control.shape == (3, 12)
    # All removed, both see the same picture.
    np.testing.assert_allclose(good[:, -1], control[:, -1], rtol=1e-4)
    assert good.mean() < control.mean()


def test_a_randomisation_test_of_quantus_explains_again(model, scenes):
    images, labels, _ = scenes
    metric = quantus.RandomLogit(
        num_classes=10, similarity_func=quantus.similarity_func.correlation_spearman, seed=0,
        abs=False, normalise=False, disable_warnings=True,
    )  # fmt: skip
    found = {
        method: metric(
            model=model, x_batch=images[:3], y_batch=labels[:3], device="cpu",
            explain_func=quantus_explain, explain_func_kwargs={"method": method},
        )
        for method in ("transformer_attribution", "attention_rollout")
    }  # fmt: skip
    np.testing.assert_allclose(found["attention_rollout"], 1, atol=1e-6)  # knows no target
    assert max(found["transformer_attribution"]) < 0.999


@pytest.mark.parametrize(
    ("method", "error", "message"),
    [
        (
            "Magic",
            ValueError,
            "method is 'Magic'; wanted: one of fast, good, best, reflected_relevance, ",
        ),
        (dict, TypeError, "wanted: a name, a class of attributors, or a function"),
        (3, TypeError, "method is 3; wanted"),
        (lambda model, x, y: x[:, :, 1:], ValueError, r"attributions has shape \(1, 3, 95, 96\)"),
    ],
    ids=range(4),
)
def test_bad_methods(model, scenes, method, error, message):
    with pytest.raises(error, match=message):
        quantus_explain(model, scenes[0][:1], scenes[1][:1], method=method)


def test_bad_arrays(model, scenes):
    images, labels, _ = scenes
    with pytest.raises(ValueError, match=r"inputs has shape \(3, 96, 96\); wanted: \(B, C, H, W\)"):
        quantus_explain(model, images[0], labels[:1])
    with pytest.raises(TypeError, match=r"inputs has dtype torch.uint8; wanted: floating point"):
        quantus_explain(model, images[:1].astype(np.uint8), labels[:1])
    with pytest.raises(TypeError, match=r"target has dtype torch.float32; wanted: an integer"):
        quantus_explain(model, images[:1], labels[:1].astype(np.float32))
