"""Classifiers of transformers are passed as they are: their output is an object with logits."""

from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel
from conftest import make_vit
from test_model_families import HF_SMALL, TEXT, hugging_face, hugging_face_clip, randomised

from captum_reflected import (
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
    balanced,
    score_masks,
)
from captum_reflected.attr.methods import METHODS, REFERENCE_METHODS
from captum_reflected.inputs.outputs import logits_of
from captum_reflected.masking.precision import Autocast
from captum_reflected.metrics import evaluate, minimal_deletion

TARGETS = torch.tensor([2, 1, 0])


@pytest.fixture(scope="module")
def vit_of_hugging_face():
    return hugging_face("ViTForImageClassification", "ViTConfig", {}, "sdpa")


def selected(model):
    """The way around that users had to take."""
    return lambda x: model(pixel_values=x).logits


# Controls do not run the model, and the other reference methods need a structure that they know.
@pytest.mark.parametrize("name", [*list(METHODS)[:-2], "attn_lrp"])
def test_every_method(name, vit_of_hugging_face, images):
    explain = {**METHODS, **REFERENCE_METHODS}[name].explain
    maps = explain(vit_of_hugging_face, images, TARGETS)
    expected = explain(selected(vit_of_hugging_face), images, TARGETS)
    torch.testing.assert_close(maps, expected, rtol=1e-4, atol=1e-5)
    assert maps.amax() > maps.amin()


def test_the_logits_are_taken_where_there_are_several_scores(images):
    model = hugging_face("DeiTForImageClassificationWithTeacher", "DeiTConfig", {}, "sdpa")
    output = model(images)
    assert not torch.equal(output.logits, output.cls_logits)
    assert logits_of(output) is output.logits
    maps = TransformerAttribution(model).attribute(images, TARGETS)
    assert torch.equal(maps, TransformerAttribution(selected(model)).attribute(images, TARGETS))
    only_class = TransformerAttribution(lambda x: model(x).cls_logits).attribute(images, TARGETS)
    assert not torch.allclose(maps, only_class)


def test_metrics(vit_of_hugging_face, images):
    model, maps = vit_of_hugging_face, torch.rand(3, 32, 32)
    given, expected = (
        evaluate(forward, images, maps, target=TARGETS) for forward in (model, selected(model))
    )
    for name in ("deletion", "insertion", "average_drop", "average_increase"):
        assert torch.equal(getattr(given, name), getattr(expected, name))
    shares = [
        minimal_deletion(forward, images, maps, target=TARGETS, step=0.25)
        for forward in (model, selected(model))
    ]
    assert shares[0].isfinite().any()
    torch.testing.assert_close(*shares, rtol=0, atol=0, equal_nan=True)


def test_scores_of_masks_and_half_precision(vit_of_hugging_face, images):
    model = vit_of_hugging_face
    for masks in (torch.rand(5, 4, 4), torch.rand(5, 7, 3)):
        given, expected = (
            score_masks(forward, images, masks, TARGETS) for forward in (model, selected(model))
        )
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    rough = score_masks(Autocast(model, torch.bfloat16).eval(), images, torch.rand(5, 4, 4), 1)
    assert rough.isfinite().all()


def test_balanced_gradients_of_captums_methods(vit_of_hugging_face, images):
    model = vit_of_hugging_face
    wrapped = balanced(model)
    assert torch.equal(wrapped(images), model(images).logits)
    for method in (InputXGradient(wrapped), NoiseTunnel(InputXGradient(wrapped))):
        assert method.attribute(images.clone().requires_grad_(), target=1).shape == images.shape
    maps, delta = IntegratedGradients(wrapped).attribute(
        images, target=1, n_steps=4, return_convergence_delta=True
    )
    expected = IntegratedGradients(balanced(selected(model))).attribute(images, target=1, n_steps=4)
    assert torch.equal(maps, expected)
    assert delta.isfinite().all()


@pytest.mark.parametrize("attributor", [TransformerAttribution, ReflectedRelevance, MaskRegression])
def test_other_objects_with_logits(attributor, images):
    vit = make_vit()

    @dataclass
    class Scores:
        other: torch.Tensor
        logits: torch.Tensor

    expected = attributor(lambda x: 1 * vit(x)).attribute(images, 1)
    for wrap in (
        lambda y: Scores(-y, y),
        lambda y: {"other": -y, "logits": y},
        lambda y: SimpleNamespace(logits=y),
    ):
        maps = attributor(lambda x, wrap=wrap: wrap(1 * vit(x))).attribute(images, 1)
        assert torch.equal(maps, expected)


def test_outputs_without_logits_are_refused_by_what_they_hold(images):
    clip, _ = hugging_face_clip()
    encoder = randomised(transformers.ViTModel(transformers.ViTConfig(**HF_SMALL)))
    classifier = hugging_face("ViTForImageClassification", "ViTConfig", {}, "sdpa")
    for forward, message in (
        (
            lambda x: clip(input_ids=TEXT, pixel_values=x),
            r"a CLIPOutput of logits_per_image \(3, 2\), .* wanted: .*\.ZeroShotClassifier",
        ),
        (
            encoder,
            r"of last_hidden_state \(3, 17, 32\), pooler_output \(3, 32\); wanted: a tensor of log",
        ),
        (
            lambda x: classifier(x, return_dict=False),
            r"returned a tuple of 0 \(3, 5\); wanted: .* lambda x: model\(x\)\[0\]",
        ),
        (lambda x: object(), "returned a object; wanted: a tensor of logits"),
    ):
        for attributor in (TransformerAttribution, MaskRegression):
            with pytest.raises(TypeError, match=message):
                attributor(forward).attribute(images, 1)
