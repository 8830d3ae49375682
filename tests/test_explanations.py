"""From a model and images to a picture, a table and a file, in one call."""

import numpy as np
import pytest
import timm
import torch
from captum.attr import IntegratedGradients
from PIL import Image

import captum_reflected
from captum_reflected import MaskRegression, demo, explain
from captum_reflected.metrics import evaluate
from captum_reflected.models import load_model
from captum_reflected.models.fitting import PhotoFitter
from captum_reflected.visualization.overlay import (
    Box,
    HeatScale,
    heat_bar,
    heat_scale,
    overlay,
    photo_overlay,
)


@pytest.fixture(scope="module")
def loaded():
    return load_model("demo")


@pytest.fixture(scope="module")
def scenes():
    found = demo.load_scenes()
    return demo.preprocess(found.images[:3]), found.labels[:3]


def test_what_the_package_offers_is_listed_once():
    assert sorted(captum_reflected._PLACES) == sorted(captum_reflected.__all__)
    for name in captum_reflected.__all__:
        assert getattr(captum_reflected, name).__name__ == name
    assert set(captum_reflected.__all__) <= set(dir(captum_reflected))
    assert captum_reflected.metrics.evaluate is evaluate
    with pytest.raises(AttributeError, match="no attribute 'explian'"):
        _ = captum_reflected.explian


def test_explain_holds_what_attribute_returns(loaded, scenes):
    images, labels = scenes
    before = [parameter.clone() for parameter in loaded.model.parameters()]
    found = explain(loaded.model, images, labels, class_names=demo.CLASS_NAMES)
    expected = MaskRegression(loaded.model).attribute(images, labels)
    torch.testing.assert_close(found.attributions, expected[:, 0])
    probabilities = loaded.model(images).softmax(dim=-1).detach()
    torch.testing.assert_close(found.probability, probabilities[torch.arange(3), labels])
    torch.testing.assert_close(found.pictures, loaded.to_pictures(images))
    assert found.predicted.tolist() == probabilities.argmax(dim=-1).tolist()
    assert demo.CLASS_NAMES[labels[0]] in repr(found)
    assert "MaskRegression" in repr(found)
    assert all(map(torch.equal, before, loaded.model.parameters()))
    assert not loaded.model.training


def test_the_predicted_class_is_the_default(loaded, scenes):
    images, _ = scenes
    found = explain(loaded.model, images, method="transformer_attribution")
    assert found.target.tolist() == loaded.model(images).argmax(dim=-1).tolist()
    assert "predicted and explained: class" in repr(found)


def test_methods_by_quality_by_name_and_as_attributors(loaded, scenes):
    images, labels = scenes
    fast = explain(loaded.model, images[:1], labels[:1], method="fast")
    named = explain(loaded.model, images[:1], labels[:1], method="balanced_relevance")
    assert fast.method == named.method == "balanced_relevance"
    assert torch.equal(fast.attributions, named.attributions)
    gradients = IntegratedGradients(loaded.model)
    given = explain(loaded.model, images[:1], labels[:1], method=gradients)
    summed = gradients.attribute(images[:1], target=labels[:1]).sum(dim=1)
    torch.testing.assert_close(given.attributions, summed.detach())
    best = explain(loaded.model, images[:1], labels[:1], method="best")
    assert (best.method, best.title) == (
        "mask_regression:forwards=50",
        "MaskRegression (forwards=50)",
    )


def test_pictures_and_files(loaded, scenes, tmp_path):
    images, labels = scenes
    found = explain(loaded.model, images[:2], labels[:2], method="fast")
    pixels = found.overlay()
    assert pixels.shape == (2, 96, 96, 3)
    assert pixels.dtype == np.uint8
    bare = found.overlay(alpha=0)
    assert np.array_equal(bare, (255 * found.pictures).round().byte().numpy())
    figure = found.plot()
    assert len([axes for axes in figure.axes if axes.get_images()]) == 2 * 3
    for kind in ("png", "jpg", "pdf", "svg"):
        found.save(tmp_path / f"figure.{kind}")
        assert (tmp_path / f"figure.{kind}").stat().st_size > 5000
    found.save(tmp_path / "maps.npy")
    assert np.array_equal(np.load(tmp_path / "maps.npy"), found.attributions.numpy())
    with pytest.raises(ValueError, match=r"figure\.gif; wanted: a file name that ends in \.png"):
        found.save(tmp_path / "figure.gif")
    shown = found._repr_html_()
    assert shown.startswith("<img ")
    assert "data:image/jpeg;base64," in shown


def test_names_are_escaped(loaded, scenes):
    names = ['"><script>alert(1)</script>', *map(str, range(1, 10))]
    found = explain(loaded.model, scenes[0][:1], 0, method="fast", class_names=names)
    assert "<script>" not in found._repr_html_()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"method": "balanced_relevanc"}, "did you mean balanced_relevance"),
        ({"method": "mask_regression:forward=3"}, "did you mean forwards"),
        ({"target": 10}, r"target is \[10.*wanted: classes from 0 to 9"),
        ({"class_names": ["a"]}, "there are 1 class_names, and the model has 10 classes"),
        ({"mean": [0.5] * 3}, "mean is given and std is not"),
        ({"mean": [0.5] * 3, "std": [0.5] * 2}, r"std is \[0.5, 0.5\]; wanted: 3 finite"),
        (
            {"mean": [5] * 3, "std": [1] * 3},
            r"with mean and std undone, have values from.*wanted: from 0 to 1",
        ),
    ],
    ids=lambda value: str(value)[:30],
)
def test_bad_arguments(loaded, scenes, options, message):
    with pytest.raises(ValueError, match=message):
        explain(loaded.model, scenes[0], **{"method": "fast", **options})


def test_bad_types(loaded, scenes):
    with pytest.raises(TypeError, match="method is a int; wanted: a name"):
        explain(loaded.model, scenes[0], method=3)
    with pytest.raises(TypeError, match="method is a type; wanted: a name"):
        explain(loaded.model, scenes[0], method=dict)
    model = loaded.model
    with pytest.raises(ValueError, match=r"returned shape \(3,\).*use an attributor's attribute"):
        explain(lambda x: model(x)[:, 0], scenes[0])
    with pytest.warns(UserWarning, match="as they are, have values from -1 to 1, so their colours"):
        # The model inside cannot be found.
        found = explain(lambda x: loaded.model(x), scenes[0], method="random")
    assert (float(found.pictures.min()), float(found.pictures.max())) == (0, 1)


def test_the_colours_of_a_map():
    heat = np.array([[-1.0, 0.0], [1.0, 3.0]])
    scale = heat_scale(heat)
    assert (scale.low, scale.high) == (0.0, 3.0)
    picture = np.full((2, 2, 3), 0.5)
    drawn = overlay(picture, heat, alpha=0.5)
    # inferno goes from (0, 0, 4), with 30 % of the opacity, to (252, 255, 164)
    assert drawn[0, 0].tolist() == drawn[0, 1].tolist() == [108, 108, 109]
    assert drawn[1, 1].tolist() == [190, 191, 146]
    assert drawn[1, 1].sum() > drawn[1, 0].sum() > drawn[0, 0].sum()
    assert heat_scale(heat + 5).low == 4.0  # all positive: the smallest is dark
    many = np.concatenate([np.ones(1000), [1e6]])
    assert heat_scale(np.concatenate([many * 0, many])).high == 1e6  # it is 99.9 % of the sum
    assert heat_scale(np.concatenate([np.ones(1000), [15.0]]) - 1e-9).high == pytest.approx(15)
    with pytest.raises(ValueError, match="alpha is 2; wanted: a number from 0 to 1"):
        overlay(picture, heat, alpha=2)
    with pytest.raises(ValueError, match="cmap is 'infern'; wanted: a colour map"):
        overlay(picture, heat, cmap="infern")
    with pytest.raises(ValueError, match=r"heat \(2, 1\)"):
        overlay(picture, heat[:, :1])


def test_the_overlay_of_a_photo_has_its_size_and_place():
    """The map's bright quarter lies where the model saw that quarter; the rest is grey."""
    photo = np.full((120, 200, 3), (200, 30, 30), dtype=np.uint8)
    heat = np.zeros((64, 64))
    heat[:32, :32] = 1
    drawn = photo_overlay(photo, heat, Box(40, 0, 160, 120), alpha=1.0).astype(int)
    assert drawn.shape == photo.shape
    assert (np.ptp(drawn[:, :40], axis=-1) == 0).all()
    assert (np.ptp(drawn[:, 160:], axis=-1) == 0).all()
    bright = drawn.sum(axis=-1)
    assert bright[5:55, 45:95].min() > 500
    assert bright[65:, 45:155].max() < photo[0, 0].sum()
    padded = photo_overlay(photo, heat, Box(0, -40, 200, 160), alpha=1.0).astype(int).sum(axis=-1)
    assert padded[:55, :95].min() > 500  # rows 0 to 60 of the photo are rows 13 to 32 of the map
    assert padded[65:].max() < photo[0, 0].sum()


@pytest.mark.parametrize("alpha", [0.0, 0.4, 0.8, 1.0])
@pytest.mark.parametrize("cmap", ["inferno", "turbo"])
def test_a_map_is_more_opaque_the_brighter_it_is(alpha, cmap):
    """Its opacity is what it leaves of the difference between a white and a black picture."""
    ramp, scale = np.linspace(0, 1, 256)[None], HeatScale(0.0, 1.0)
    white, grey, black = (
        overlay(np.full((1, 256, 3), level), ramp, alpha=alpha, cmap=cmap, scale=scale).astype(int)
        for level in (1.0, 0.5, 0.0)
    )
    opacity = 1 - (white - black)[0] / 255
    expected = alpha * np.linspace(0.3, 1.0, 256)[:, None].repeat(3, axis=1)
    np.testing.assert_allclose(opacity, expected, atol=0.005)
    bar = heat_bar(alpha=alpha, cmap=cmap).astype(int)
    np.testing.assert_allclose(bar, grey, atol=1)


def test_a_picture_is_paler_under_a_map_and_as_light_as_before():
    """Where the map hides nothing of it; here, by a colour map that is the picture's grey."""
    picture = np.array([[[0.9, 0.2, 0.1], [0.1, 0.3, 0.8]]])
    lightness = picture @ [0.299, 0.587, 0.114]
    for alpha, kept in ((0.0, 1.0), (0.4, 0.7), (0.8, 0.4)):
        drawn = overlay(picture, np.zeros((1, 2)), alpha=alpha, cmap="gray") / 255
        visible = drawn / (1 - 0.3 * alpha)  # the colour map is black there
        np.testing.assert_allclose(
            np.ptp(visible, axis=-1), kept * np.ptp(picture, axis=-1), atol=0.01
        )
        np.testing.assert_allclose(visible @ [0.299, 0.587, 0.114], lightness, atol=0.01)


def test_the_bar_has_the_colours_of_the_overlay(loaded, scenes):
    """Of this opacity and colour map, and the map's values at its ends."""
    found = explain(loaded.model, scenes[0][:1], method="fast")
    bar = found.plot(alpha=0.5, cmap="viridis").axes[-1]
    assert np.array_equal(bar.get_images()[0].get_array(), heat_bar(alpha=0.5, cmap="viridis"))
    scale = heat_scale(found.attributions[0])
    numbers = [label.get_text() for label in bar.get_xticklabels()]
    assert numbers == [f"{scale.low:.3g}", f"≥ {scale.high:.3g}"]


@pytest.fixture(scope="module")
def deit_transform():
    from timm.data import create_transform

    return create_transform(
        input_size=(3, 224, 224), crop_pct=0.9, interpolation="bicubic", is_training=False
    )


MEAN, STD = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])


@pytest.mark.parametrize("size", [(640, 480), (300, 451), (1999, 700), (90, 90)])
def test_where_the_model_sees_the_photo(deit_transform, size):
    """A bright spot of the photo is found in the input at the place that the box says."""
    width, height = size
    spot = (round(0.45 * width), round(0.6 * height))
    pixels = np.zeros((height, width, 3), dtype=np.uint8)
    radius = max(min(size) // 40, 1)
    pixels[spot[1] - radius : spot[1] + radius, spot[0] - radius : spot[0] + radius] = 255
    photo = Image.fromarray(pixels)
    for fit in ("crop", "pad", "squash"):
        fitted = PhotoFitter(deit_transform, MEAN, STD, fit)(photo)
        assert fitted.image.shape == (3, 224, 224)
        bright = (fitted.image[0] * STD[0] + MEAN[0]).clamp(0, 1)
        if fit == "pad":  # bars of the mean colour
            bright = torch.where(fitted.image[0] == 0, 0.0, bright)
        at = (bright / bright.sum()).double()
        place = torch.arange(224).double() + 0.5
        left, top, right, bottom = fitted.box
        found = (
            left + float((at.sum(dim=0) * place).sum()) * (right - left) / 224,
            top + float((at.sum(dim=1) * place).sum()) * (bottom - top) / 224,
        )
        assert found == pytest.approx(spot, abs=0.012 * max(size))


def test_photos_that_a_preprocessing_distorts_are_refused(deit_transform):
    photo = Image.new("RGB", (300, 200))
    with pytest.raises(ValueError, match=r'horizontal.*wanted: .*"pad" or "squash"'):
        PhotoFitter(lambda picture: deit_transform(picture).flip(-1), MEAN, STD)(photo)
    with pytest.raises(ValueError, match="fit is 'stretch'; wanted"):
        PhotoFitter(deit_transform, MEAN, STD, "stretch")


@pytest.mark.parametrize("size", [(2000, 20), (20, 2000), (500, 10), (1000, 100), (8000, 6000)])
def test_the_box_of_photos_of_extreme_shapes(deit_transform, size):
    """timm resizes the shorter side to 248 pixels and keeps the centre of 224 x 224."""
    width, height = size
    scale = 248 / min(size)
    left, top, right, bottom = PhotoFitter(deit_transform, MEAN, STD)(Image.new("RGB", size)).box
    wanted = (
        width / 2 - 112 / scale,
        height / 2 - 112 / scale,
        width / 2 + 112 / scale,
        height / 2 + 112 / scale,
    )
    assert (left, top, right, bottom) == pytest.approx(wanted, abs=2 / scale)


def test_images_that_are_not_what_the_model_says_are_shown_as_they_are(loaded, scenes):
    """They were not preprocessed, or the model does it itself."""
    raw = loaded.to_pictures(scenes[0][:1]).permute(0, 3, 1, 2)
    model = loaded.model

    def preprocesses_itself(images):
        return model((images - 0.5) / 0.5)

    with pytest.warns(UserWarning, match="images are from 0 to 1, though the model states"):
        found = explain(preprocesses_itself, raw, method="fast")
    torch.testing.assert_close(found.pictures, loaded.to_pictures(scenes[0][:1]))
    expected = explain(model, scenes[0][:1], method="fast")
    torch.testing.assert_close(found.attributions, expected.attributions, rtol=1e-3, atol=1e-5)


def test_grey_images_and_numbers_for_all_channels():
    model = timm.create_model(
        "deit_tiny_patch16_224", in_chans=1, num_classes=5, img_size=32, patch_size=8, depth=2
    ).eval()
    grey = torch.rand(1, 1, 32, 32)
    found = explain(model, grey, method="fast")
    assert torch.equal(found.pictures, grey.permute(0, 2, 3, 1).expand(-1, -1, -1, 3))
    assert explain(model, grey - 0.5, method="fast", mean=0.5, std=1).pictures.max() <= 1
    with pytest.raises(ValueError, match=r"std is \[0.0\]; wanted: numbers greater than 0"):
        explain(model, grey, method="fast", mean=0, std=0)


def test_an_attributor_of_another_model_is_refused(loaded, scenes):
    other = load_model("demo").model
    with pytest.raises(ValueError, match="MaskRegression of another model; wanted"):
        explain(loaded.model, scenes[0], method=MaskRegression(other))
    with pytest.raises(TypeError, match="model is a int; wanted: a model or a function"):
        explain(5, scenes[0])
