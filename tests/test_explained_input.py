"""Models and images of all kinds that are given to `explain`, and what is said of those that do
not fit."""

import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from captum.attr import InputXGradient
from PIL import Image
from transformers import ViTConfig, ViTForImageClassification

from captum_reflected import BalancedRelevance, MaskRegression, demo, explain
from captum_reflected.models import ZeroShotClassifier
from captum_reflected.models.hugging_face_classifier import Logits

X = 2 * torch.rand(1, 3, 32, 32) - 1
notes = pytest.mark.skipif(sys.version_info < (3, 11), reason="errors have notes from 3.11 on")


def small_vit(num_classes):
    torch.manual_seed(0)
    return timm.create_model(
        "deit_tiny_patch16_224", img_size=32, patch_size=8, depth=2, num_classes=num_classes
    ).eval()


def small_hugging_face(names):
    config = ViTConfig(
        image_size=32, patch_size=8, hidden_size=24, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, id2label=names,
    )  # fmt: skip
    return ViTForImageClassification(config).eval()


@pytest.fixture(scope="module")
def vit():
    return small_vit(5)


def names_of(model, **options):
    return explain(model, X, method="random", mean=0.5, std=0.5, **options).class_names


# --- Class names


def test_names_of_imagenet_on_request():
    model = small_vit(1000)
    assert names_of(model) is None  # 1000 classes need not be ImageNet's
    names = names_of(model, class_names="imagenet-1k")
    assert (len(names), names[281]) == (1000, "tabby, tabby cat")
    with pytest.raises(
        ValueError, match=r"'imagenet-12k': there are 11821 class_names, and .* 1000"
    ):
        names_of(model, class_names="imagenet-12k")
    with pytest.raises(
        ValueError, match=r"'imagenet1k'; wanted.*read_class_names.*mean imagenet-1k"
    ):
        names_of(model, class_names="imagenet1k")


@pytest.mark.parametrize("given", [{0: "cat"}, {"cat": 0}, {"a", "b"}, [1, 2], 3, []], ids=str)
def test_what_has_no_order_is_no_list_of_names(vit, given):
    with pytest.raises(TypeError, match=r"class_names is .*; wanted: a list of texts"):
        names_of(vit, class_names=given)


def test_names_that_a_model_states():
    named = small_hugging_face({0: "cat", 1: "dog"})
    assert names_of(named) == names_of(Logits(named)) == ("cat", "dog")
    assert names_of(named, class_names=["a", "b"]) == ("a", "b")
    assert names_of(small_hugging_face({0: "LABEL_0", 1: "LABEL_1"})) is None
    # A function around it may return anything, such as the logits of another head.
    assert names_of(lambda images: named(images).logits.flip(-1)) is None
    named.classifier = torch.nn.Linear(24, 3)
    assert names_of(named) is None
    zero_shot = ZeroShotClassifier(
        lambda images: images.mean(dim=(2, 3)), torch.eye(3)[:2], class_names=["red", "green"]
    )
    assert names_of(zero_shot) == ("red", "green")


# --- Images that are no batch of tensors

PHOTO = Image.new("RGB", (30, 20))
WAY_OUT = r"create_transform(.|\n)*\[None\](.|\n)*weights.transforms"


@pytest.mark.parametrize(
    ("images", "error", "message"),
    [
        (PHOTO, TypeError, rf"images is an image of PIL; wanted: a torch.Tensor(.|\n)*{WAY_OUT}"),
        ("a.jpg", TypeError, r"images is 'a.jpg'; wanted(.|\n)*Image.open\('a.jpg'\)"),
        (Path("a.jpg"), TypeError, rf"images is 'a.jpg'; wanted: (.|\n)*{WAY_OUT}"),
        ([PHOTO], TypeError, rf"images is a list; wanted: (.|\n)*{WAY_OUT}"),
        ([X[0]], TypeError, r"images is a list; wanted: .*torch.stack\(images\)"),
        (X.numpy(), TypeError, r"\(1, 3, 32, 32\) and float32, .*torch.from_numpy\(images\).float"),
        (np.asarray(PHOTO), TypeError, r"\(20, 30, 3\) and uint8, .*(.|\n)*Image.fromarray"),
        ({"pixel_values": X}, TypeError, r'images is a dict; .*images\["pixel_values"\]'),
        (X.byte(), TypeError, rf"images has dtype torch.uint8; wanted(.|\n)*{WAY_OUT}"),
        (X[0], ValueError, r"add the batch dimension with images\[None\]"),
        (X[0].permute(1, 2, 0), ValueError, r"with images.permute\(2, 0, 1\)\[None\]"),
        (X.permute(0, 2, 3, 1), ValueError, r"with images.permute\(0, 3, 1, 2\)"),
        (torch.rand(1, 4, 32, 32), ValueError, r'three channels after photo.convert\("RGB"\)'),
    ],
    ids=["PIL", "text", "path", "photos", "list", "numpy", "array", "dict", "uint8", "CHW", "HWC",
         "BHWC", "RGBA"],
)  # fmt: skip
def test_images_that_are_no_batch(images, error, message):
    def never(images):
        raise AssertionError("the model must not run")

    with pytest.raises(error, match=message):
        explain(never, images)


# --- Images that the model refuses


@notes
@pytest.mark.parametrize(
    "call",
    [
        lambda model, images: explain(model, images, method="fast"),
        lambda model, images: MaskRegression(model).attribute(images, 1),
        lambda model, images: BalancedRelevance(lambda x: model(x)).attribute(images, 1),
    ],
    ids=["explain", "attribute", "function"],
)
def test_the_models_own_error_gets_a_note(vit, call):
    with pytest.raises(AssertionError, match=r"\(40\) doesn't match model \(32\)") as caught:
        call(vit, torch.rand(1, 3, 40, 40))
    (note,) = caught.value.__notes__
    assert "given images of shape (1, 3, 40, 40), and states (1, 3, 32, 32)" in note
    assert "timm.data.create_transform" in note
    with pytest.raises(RuntimeError, match="to have 3 channels, but got 1") as caught:
        call(vit, X[:, :1])
    assert "shape (1, 1, 32, 32), and states (1, 3, 32, 32)" in caught.value.__notes__[0]
    with pytest.raises(RuntimeError, match="should be the same") as caught:
        call(vit, X.double())
    assert "use images.to('cpu', torch.float32)" in caught.value.__notes__[0]


@notes
def test_the_note_names_the_library_of_the_model():
    with pytest.raises(ValueError, match="doesn't match model") as caught:
        explain(small_hugging_face({0: "cat", 1: "dog"}), torch.rand(1, 3, 40, 40))
    assert "AutoImageProcessor" in caught.value.__notes__[0]


def test_other_errors_of_a_model_are_left_as_they_are(vit):
    def broken(images):
        vit(images)
        raise KeyError("a mistake")

    with pytest.raises(KeyError, match="a mistake") as caught:
        explain(broken, X)
    assert not getattr(caught.value, "__notes__", [])
    assert caught.value.__cause__ is None


# --- Modes, types and devices


@pytest.mark.parametrize("method", ["fast", "saliency", InputXGradient])
def test_inside_inference_mode(vit, method, recwarn):
    method = method if isinstance(method, str) else method(vit)
    with torch.inference_mode():
        found = explain(vit, X.clone(), method=method)
    expected = explain(vit, X.clone().requires_grad_(), method=method)
    assert torch.equal(found.attributions, expected.attributions)
    assert not expected.attributions.requires_grad
    assert not recwarn.list


def test_half_precision_and_a_target_of_any_integer_type(tmp_path):
    model, images = demo.load_model().bfloat16(), demo.preprocess(demo.load_scenes().images[:1])
    found = explain(model, images.bfloat16(), torch.tensor([3], dtype=torch.uint8), method="fast")
    assert found.attributions.dtype == torch.bfloat16
    assert found.target.tolist() == [3]
    found.save(tmp_path / "figure.png")
    found.save(tmp_path / "maps.npy")
    assert np.load(tmp_path / "maps.npy").dtype == np.float32
