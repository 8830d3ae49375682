"""Classifiers of transformers are passed as they are: their output is an object with logits."""

import warnings
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import transformers
from captum.attr import InputXGradient, IntegratedGradients, NoiseTunnel
from conftest import make_vit
from test_model_families import (
    HF_SMALL,
    HUGGING_FACE,
    TEXT,
    hugging_face,
    hugging_face_clip,
    randomised,
)
from torch import nn

from captum_reflected import (
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
    UnsupportedModelError,
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


def test_a_model_of_images_and_texts_is_refused_at_once():
    clip, _ = hugging_face_clip()
    with pytest.raises(TypeError, match=r"CLIPModel, whose first .* input_ids; .*ZeroShotClassif"):
        TransformerAttribution(clip)


def on_fewer_tokens(model, image, shown):
    """The logits of an image of which only these tokens are in the sequence, part by part."""
    encoder = model.base_model
    tokens = encoder.embeddings(image[None])
    prefix = tokens.shape[1] - 16
    tokens = torch.cat([tokens[:, :prefix], tokens[:, prefix + shown]], dim=1)
    # The names, and what a layer returns, have changed between versions of transformers.
    for layer in encoder.layers if hasattr(encoder, "layers") else encoder.encoder.layer:
        output = layer(tokens)
        tokens = output[0] if isinstance(output, tuple) else output
    tokens = encoder.layernorm(tokens)
    if hasattr(model, "distillation_classifier"):
        heads = model.cls_classifier, model.distillation_classifier
        return sum(head(tokens[0, index]) for index, head in enumerate(heads)) / 2
    if hasattr(model, "dinov2"):
        return model.classifier(torch.cat([tokens[0, 0], tokens[0, 1:].mean(dim=0)]))
    return model.classifier(tokens[0, 0])


DROPPABLE = ("ViT", "DeiT", "DeiT distilled", "DINOv2", "DINOv2 with SwiGLU")


def droppable(kind, attention="sdpa"):
    if kind == "DINOv2 with SwiGLU":
        return hugging_face(*HUGGING_FACE["DINOv2"][:2], {"use_swiglu_ffn": True}, attention)
    return hugging_face(*HUGGING_FACE[kind][:3], attention)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", DROPPABLE)
def test_hidden_tokens_are_left_out_of_the_sequence(kind, attention, images):
    model = droppable(kind, attention)
    masks = torch.rand(4, 4, 4, generator=torch.Generator().manual_seed(3)).gt(0.6).float()
    masks[0] = 1
    with torch.no_grad():
        expected = torch.stack(
            [
                torch.stack(
                    [
                        on_fewer_tokens(model, image, mask.flatten().nonzero()[:, 0])
                        for mask in masks
                    ]
                )[:, 2]
                for image in images
            ]
        )
    for forward in (model, selected(model), lambda x: model(x)[0]):
        scores = score_masks(forward, images, masks, 2, drop_hidden=True)
        torch.testing.assert_close(scores, expected, rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            score_masks(forward, images, masks[:1], 2)[:, 0], expected[:, 0], rtol=1e-4, atol=1e-5
        )
    shown_as_zero = score_masks(model, images, masks[1:], 2)
    assert (shown_as_zero - expected[:, 1:]).abs().max() > 1e-3
    rough = score_masks(model, images, masks, 2, drop_hidden=True, precision="bf16")
    torch.testing.assert_close(rough, expected, rtol=0.1, atol=0.1)
    assert MaskRegression(model, forwards=9).fit(images, 1).masks.shape[1] == 12


@pytest.mark.parametrize("kind", [kind for kind in HUGGING_FACE if kind not in DROPPABLE])
def test_other_families_show_the_baseline_and_no_warning(kind, images):
    model = hugging_face(*HUGGING_FACE[kind][:3], "sdpa")
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        fit = MaskRegression(model, forwards=7).fit(images, 1)
    assert fit.masks.shape[1] == 4
    with pytest.raises(UnsupportedModelError, match=r"transformers \(ViT, DeiT, DINOv2\)"):
        score_masks(model, images, fit.masks, 1, drop_hidden=True)


def with_causal_attention(model):
    model.config.is_causal = True


def with_other_attention(model):
    model.config._attn_implementation = "flash_attention_2"


def with_another_layer(model):
    layer = next(module for module in model.modules() if type(module) is nn.LayerNorm)
    layer.__class__ = type("LayerNorm", (nn.LayerNorm,), {})


@pytest.mark.parametrize(
    "change", [with_causal_attention, with_other_attention, with_another_layer]
)
def test_changed_models_keep_their_tokens(change, images):
    model = droppable("ViT")
    change(model)
    masks = torch.eye(16).view(16, 4, 4)
    with pytest.raises(UnsupportedModelError, match="drop_hidden is True"):
        score_masks(model, images, masks, 1, drop_hidden=True)
