"""Methods by name, with options."""

import pytest
import torch

from captum_reflected import (
    AttentionRollout,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.attr.methods import METHODS, REFERENCE_METHODS, find_method, method_key

TARGET = torch.tensor([2, 5, 0])


@pytest.mark.parametrize(
    ("text", "attributor", "title"),
    [
        ("reflected_relevance", ReflectedRelevance, "ReflectedRelevance"),
        (
            "reflected_relevance:reflect=rows:scale_by_maxima=False:reflected_weight=0.25",
            lambda model: ReflectedRelevance(
                model, reflect="rows", scale_by_maxima=False, reflected_weight=0.25
            ),
            "ReflectedRelevance (reflect=rows, scale_by_maxima=False, reflected_weight=0.25)",
        ),
        (
            "mask_regression : forwards=9",
            lambda model: MaskRegression(model, forwards=9),
            "MaskRegression (forwards=9)",
        ),
        (
            "transformer_attribution:rule=lrp",
            lambda model: TransformerAttribution(model, rule="lrp"),
            "TransformerAttribution (rule=lrp)",
        ),
        (
            "attention_rollout:start_layer=1",
            lambda model: AttentionRollout(model, start_layer=1),
            "AttentionRollout (start_layer=1)",
        ),
    ],
)
def test_a_text_is_an_attributor(vit, images, text, attributor, title):
    method = find_method(text)
    assert method.title == title
    expected = attributor(vit).attribute(images, TARGET)[:, 0]
    assert torch.equal(method.explain(vit, images, TARGET), expected)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("magic", "method is 'magic'; wanted: one of fast, good, best, reflected_relevance, "),
        ("", "method is ''; wanted"),
        ("reflected_relevance:rows", "has no option 'rows'; wanted: rule, start_layer, reflect"),
        ("saliency:abs=False", "'saliency' has no option 'abs'; wanted: no options"),
        ("reflected_relevance:token_layout=1", "has no option 'token_layout'"),
        (
            "reflected_relevance:reflect=diagonals",
            "reflect is 'diagonals'; wanted: one of columns, rows",
        ),
        ("mask_regression:forwards=4", "forwards is 4; wanted: 5 or more"),
        ("mask_regression:forwards=", "forwards is ''; wanted: an int"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(ValueError, match=message):
        find_method(text)


@pytest.mark.parametrize(
    ("text", "key", "title"),
    [
        ("reflected", "reflected_relevance", "ReflectedRelevance"),
        ("rollout", "attention_rollout", "AttentionRollout"),
        ("grad_cam", "attention_grad_cam", "AttentionGradCam"),
        ("Grad-CAM", "attention_grad_cam", "AttentionGradCam"),
        ("InputXGradient", "input_x_gradient", "InputXGradient"),
        ("ViT-CX", "vit_cx", "ViT-CX"),
        ("fast", "balanced_relevance", "BalancedRelevance"),
        ("best", "mask_regression:forwards=50", "MaskRegression (forwards=50)"),
        (
            "best:forwards=30:precision=bf16",
            "mask_regression:forwards=30:precision=bf16",
            "MaskRegression (forwards=30, precision=bf16)",
        ),
        (
            "reflected : reflect=rows",
            "reflected_relevance:reflect=rows",
            "ReflectedRelevance (reflect=rows)",
        ),
    ],
)
def test_whatever_is_written_has_one_key_and_one_title(text, key, title):
    method = find_method(text)
    assert (method.key, method.title) == (key, title)
    assert method_key(text) == method_key(key) == find_method(key).key == key


def test_every_class_and_every_title_is_a_name():
    for key, method in {**METHODS, **REFERENCE_METHODS}.items():
        for text in (key, method.title, method.title.upper()):
            assert find_method(text) is method
        if method.attributor is not None:
            assert method.title == method.attributor.__name__


def test_what_is_not_known_keeps_its_name():
    assert method_key("of_another_version:size=3") == "of_another_version:size=3"
    assert method_key("grad_cam:of=another_version") == "attention_grad_cam:of=another_version"


@pytest.mark.parametrize(
    ("text", "meant"),
    [
        ("reflectd", "reflected_relevance"),
        ("ReflectedRelevence", "reflected_relevance"),
        ("atention_rollout", "attention_rollout"),
        ("rolout", "attention_rollout"),
        ("gradcamm", "attention_grad_cam"),
        ("AttentionGradCan", "attention_grad_cam"),
        ("MaskRegresion:forwards=9", "mask_regression"),
        ("bst", "best"),
    ],
)
def test_a_misspelt_key_class_or_earlier_name(text, meant):
    with pytest.raises(ValueError, match=f"; did you mean {meant}\\?$"):
        find_method(text)


def test_every_option_that_is_listed_is_taken():
    assert METHODS["mask_regression"].options == ("forwards", "precision")
    for name, method in METHODS.items():
        for option in method.options:
            with pytest.raises(ValueError, match=f"{option}|rule"):
                find_method(f"{name}:{option}=no such value")
