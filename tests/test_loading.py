"""Models by name, with local weights, without unpickling anything."""

import pytest
import timm
import torch
from conftest import make_vit
from safetensors.torch import save_file

from captum_reflected.models import ModelLoadError, load_model

NAME = "vit_tiny_patch16_224"


@pytest.fixture
def weights(tmp_path):
    model = timm.create_model(NAME)
    torch.nn.init.normal_(model.head.bias)
    path = tmp_path / "weights.safetensors"
    save_file(model.state_dict(), path)
    return model, path


def test_local_weights_are_what_runs(weights):
    model, path = weights
    loaded = load_model(NAME, weights=path)
    assert not loaded.model.training
    for name, value in loaded.model.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name
    assert loaded.class_names[281].startswith("tabby")
    assert loaded.class_name(0).startswith("tench")
    assert loaded.num_classes == 1000


def test_fine_tuned_weights_bring_their_own_classes(tmp_path):
    model = timm.create_model(NAME, num_classes=5)
    torch.nn.init.normal_(model.head.weight)
    save_file(model.state_dict(), tmp_path / "five.safetensors")
    loaded = load_model(NAME, weights=tmp_path / "five.safetensors")
    assert loaded.num_classes == 5
    assert torch.equal(loaded.model.head.weight, model.head.weight)
    assert loaded.class_names is None
    assert loaded.class_name(3) == "class 3"


def test_transform_and_pictures_are_inverse(weights):
    from PIL import Image

    loaded = load_model(NAME, weights=weights[1])
    picture = Image.new("RGB", (300, 300), (255, 128, 0))
    image = loaded.transform(picture)
    assert image.shape == (3, 224, 224)
    shown = loaded.to_pictures(image[None])
    assert shown.shape == (1, 224, 224, 3)
    torch.testing.assert_close(
        shown[0, 0, 0], torch.tensor([1.0, 128 / 255, 0.0]), rtol=0, atol=1e-5
    )


def test_weights_of_another_model(tmp_path):
    save_file(make_vit().state_dict(), tmp_path / "other.safetensors")
    with pytest.raises(ModelLoadError, match=r"cannot load the weights .*other\.safetensors into"):
        load_model(NAME, weights=tmp_path / "other.safetensors")


def test_demo_model():
    loaded = load_model("demo")
    assert loaded.num_classes == len(loaded.class_names) == 10


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("vit_tini_patch16_224", r"wanted: a name that timm knows.*mean vit_tiny_patch16_224 or"),
        ("Demo", r"unknown model 'Demo'.*did you mean demo\?$"),
        ("vit_tiny_patch16_224.augre", r"tags \(augreg_in21k, .*mean .*tiny_patch16_224.augreg_in"),
        ("zzzzzzzz", r"or a folder with a model of transformers or timm$"),
        ("hf/google", r"there is no folder 'hf/google'; wanted"),
        ("./nothing", r"there is no folder './nothing'; wanted: a folder with a model of .* timm$"),
    ],
)
def test_unknown_names(name, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelLoadError, match=message):
        load_model(name)


def test_a_folder_does_not_hide_a_model_of_timm(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).mkdir()
    assert load_model(NAME, weights=weights[1]).num_classes == 1000
    with pytest.raises(ModelLoadError, match=rf"cannot read {NAME}/config.json"):
        load_model(f"./{NAME}")


def test_other_classes_than_imagenet(weights):
    """A model of 1000 classes passes for one of ImageNet until it is told the names."""
    from timm.data import ImageNetInfo

    german = [f"Klasse {i}" for i in range(1000)]
    loaded = load_model(NAME, weights=weights[1], class_names=german)
    assert (loaded.class_names, loaded.synsets) == (tuple(german), None)
    english = [name.split(",")[0] for name in ImageNetInfo().label_descriptions()]
    loaded = load_model(NAME, weights=weights[1], class_names=english)
    assert loaded.class_names[0] == "tench"
    assert loaded.synsets[0] == "n01440764"
