"""Methods by name, with options."""

import pytest
import torch

from captum_reflected import (
    AttentionRollout,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
)
from captum_reflected.attr.methods import METHODS, find_method

TARGET = torch.tensor([2, 5, 0])


@pytest.mark.parametrize(
    ("text", "attributor", "title"),
    [
        ("reflected", ReflectedRelevance, "ReflectedRelevance"),
        (
            "reflected:reflect=rows:scale_by_maxima=False:reflected_weight=0.25",
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
            "rollout:start_layer=1",
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
        ("magic", "method is 'magic'; wanted: one of fast, good, best, reflected, "),
        ("", "method is ''; wanted"),
        ("reflected:rows", "has no option 'rows'; wanted: rule, start_layer, reflect"),
        ("saliency:abs=False", "'saliency' has no option 'abs'; wanted: no options"),
        ("reflected:token_layout=1", "has no option 'token_layout'"),
        ("reflected:reflect=diagonals", "reflect is 'diagonals'; wanted: one of columns, rows"),
        ("mask_regression:forwards=4", "forwards is 4; wanted: 5 or more"),
        ("mask_regression:forwards=", "forwards is ''; wanted: an int"),
    ],
)
def test_bad_texts(text, message):
    with pytest.raises(ValueError, match=message):
        find_method(text)


def test_every_option_that_is_listed_is_taken():
    assert METHODS["mask_regression"].options == ("forwards", "precision")
    for name, method in METHODS.items():
        for option in method.options:
            with pytest.raises(ValueError, match=f"{option}|rule"):
                find_method(f"{name}:{option}=no such value")
