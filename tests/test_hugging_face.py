"""Models of transformers and timm from local folders, offline, with tiny random weights."""

import json
import re

import numpy as np
import pytest
import timm
import torch
from conftest import make_vit
from PIL import Image
from torch import nn

from captum_reflected import TransformerAttribution
from captum_reflected.models import ModelLoadError, load_model

transformers = pytest.importorskip("transformers")

NAMES = {0: "cat", 1: "dog", 2: "teapot"}


def make_classifier(kind="ViT", seed=0, **options):
    """A tiny random image classifier of transformers; classes have names."""
    config = getattr(transformers, f"{kind}Config")(
        hidden_size=32,
        intermediate_size=64,
        num_attention_heads=4,
        num_hidden_layers=2,
        image_size=32,
        patch_size=8,
        **{
            "id2label": NAMES,
            "label2id": {name: index for index, name in NAMES.items()},
            **options,
        },
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = getattr(transformers, f"{kind}ForImageClassification")(config)
        for parameter in model.parameters():
            nn.init.normal_(parameter, std=0.2)
    return model.eval()


def make_processor(kind="ViTImageProcessor", **options):
    options = {
        "size": {"height": 32, "width": 32},
        "image_mean": [0.5, 0.4, 0.3],
        "image_std": [0.3, 0.2, 0.25],
        **options,
    }
    return getattr(transformers, kind)(**options)


def save_classifier(model, folder, processor=None):
    model.save_pretrained(folder)
    (processor or make_processor()).save_pretrained(folder)
    return folder


def random_pictures():
    make = np.random.default_rng(0).integers
    for width, height in ((32, 32), (50, 40), (31, 77), (300, 200)):
        yield Image.fromarray(make(0, 256, (height, width, 3), np.uint8))


# The random weights of BEiT are not linear after pooling.
@pytest.mark.filterwarnings("ignore:after the last recorded attention layer")
@pytest.mark.parametrize("kind", ["ViT", "DeiT", "Beit", "Dinov2"])
def test_a_classifier_in_a_folder(tmp_path, images, kind):
    model = make_classifier(kind)
    loaded = load_model(str(save_classifier(model, tmp_path)))
    torch.testing.assert_close(loaded.model(images), model(images).logits)
    assert not any(module.training for module in loaded.model.modules())
    assert loaded.num_classes == 3
    assert loaded.class_names == tuple(NAMES.values())
    assert loaded.synsets is None
    attributions = TransformerAttribution(loaded.model).attribute(images, target=1)
    expected = TransformerAttribution(lambda x: model(pixel_values=x).logits)
    torch.testing.assert_close(attributions, expected.attribute(images, target=1))


@pytest.mark.parametrize(
    "processor",
    [
        make_processor(),
        make_processor(
            "CLIPImageProcessor",
            size={"shortest_edge": 36},
            crop_size={"height": 32, "width": 32},
            resample=3,
        ),
        make_processor(do_normalize=False),
        make_processor(do_rescale=False, image_mean=[100, 110, 120], image_std=[50, 60, 70]),
    ],
    ids=["resize", "crop", "not normalised", "not rescaled"],
)
def test_the_transform_is_the_processor(tmp_path, processor):
    loaded = load_model(str(save_classifier(make_classifier(), tmp_path, processor)))
    for picture in random_pictures():
        image = loaded.transform(picture)
        expected = processor(images=picture, return_tensors="pt")["pixel_values"][0]
        assert image.shape == (3, 32, 32)
        torch.testing.assert_close(image, expected, rtol=0, atol=1e-6)
        if picture.size == (32, 32) and "crop_size" not in processor.to_dict():
            torch.testing.assert_close(
                loaded.to_pictures(image[None])[0],
                torch.from_numpy(np.asarray(picture) / np.float32(255)),
                rtol=0,
                atol=1e-4,
            )
        grey = picture.convert("L")
        torch.testing.assert_close(loaded.transform(grey), loaded.transform(grey.convert("RGB")))


def test_a_processor_that_is_not_linear():
    from captum_reflected.models.image_processor import preprocessing_of

    class Gamma:
        power = 2

        def __call__(self, images, return_tensors):
            values = torch.from_numpy(np.array(images) / np.float32(255)).permute(2, 0, 1)
            return {"pixel_values": values[None] ** self.power}

    class Exchanged(Gamma):
        """As a processor with ``do_flip_channel_order``."""

        power = 1

        def __call__(self, images, return_tensors):
            return {
                "pixel_values": super().__call__(images, return_tensors)["pixel_values"].flip(1)
            }

    for processor in (Gamma(), Exchanged()):
        name = type(processor).__name__
        with pytest.raises(
            ModelLoadError, match=f"processor {name} turns black, the colour .51, 1"
        ):
            preprocessing_of(processor)


def test_weights_of_half_precision(tmp_path, images):
    model = make_classifier()
    loaded = load_model(str(save_classifier(model.half(), tmp_path)))
    assert {parameter.dtype for parameter in loaded.model.parameters()} == {torch.float32}
    torch.testing.assert_close(loaded.model(images), model.float()(images).logits)


def test_weights_in_several_files(tmp_path, images):
    model = make_classifier()
    save_classifier(model, tmp_path)
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="50KB")
    assert not (tmp_path / "model.safetensors").exists()
    torch.testing.assert_close(load_model(str(tmp_path)).model(images), model(images).logits)


def test_classes_without_names(tmp_path):
    model = make_classifier(id2label={0: "LABEL_0", 1: "LABEL_1"}, label2id=None)
    folder = str(save_classifier(model, tmp_path))
    assert load_model(folder).class_names is None
    assert load_model(folder, class_names=["a", "b"]).class_names == ("a", "b")
    with pytest.raises(ModelLoadError, match=r"has 3 name\(s\), but model .* has 2 classes; want"):
        load_model(folder, class_names=["a", "b", "c"])


def test_classes_of_which_some_have_no_name(tmp_path):
    folder = save_classifier(make_classifier(), tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["id2label"] = {"0": "cat", "1": "dog", "5": "teapot"}
    (folder / "config.json").write_text(json.dumps(config))
    assert load_model(str(folder)).class_names is None


def test_imagenet_is_recognised_by_its_names(tmp_path):
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    right = info.label_descriptions()
    for names, synsets in ((right, tuple(info.label_names())), (sorted(right), None)):
        model = make_classifier(
            id2label=dict(enumerate(names)), label2id={name: 0 for name in names}
        )
        loaded = load_model(str(save_classifier(model, tmp_path)))
        assert loaded.class_names == tuple(names)
        assert loaded.synsets == synsets


def test_a_model_without_a_trained_classifier(tmp_path):
    model = transformers.ViTModel(make_classifier().config)
    with pytest.raises(ModelLoadError, match=r"lack classifier.bias, classifier.weight, which wo"):
        load_model(str(save_classifier(model, tmp_path)))


def test_folders_that_hold_no_model(tmp_path):
    folder = save_classifier(make_classifier(), tmp_path / "vit-flowers")
    with pytest.raises(ModelLoadError, match=r"vit-flower'; wanted.*did you mean vit-flowers\?$"):
        load_model(str(tmp_path / "vit-flower"))
    with pytest.raises(
        ModelLoadError, match=r"no folder 'google/vit'; wanted: .*or hf:google/vit f"
    ):
        load_model("google/vit")
    with pytest.raises(ModelLoadError, match=r"weights is a.safetensors; wanted: none"):
        load_model(str(folder), weights="a.safetensors")
    with pytest.raises(ModelLoadError, match=r"model.safetensors' is a file; wanted: a folder"):
        load_model(str(folder / "model.safetensors"))
    with pytest.raises(ModelLoadError, match="has classes of its own"):
        load_model(str(folder), classes=["a"])
    (folder / "preprocessor_config.json").rename(folder / "elsewhere.json")
    with pytest.raises(ModelLoadError, match=r"has no preprocessor_config.json in"):
        load_model(str(folder))
    torch.save({}, folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"has no model.safetensors in .*pickles"):
        load_model(str(folder))
    for content in ("[]", "{", None):
        (folder / "config.json").unlink()
        if content is not None:
            (folder / "config.json").write_text(content)
        with pytest.raises(ModelLoadError, match=r"config.json of model"):
            load_model(str(folder))


def test_a_type_that_transformers_cannot_classify_with(tmp_path):
    config = {"model_type": "gpt2", "architectures": ["GPT2Model"]}
    save_classifier(make_classifier(), tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ModelLoadError, match="wanted: an image classifier of transformers"):
        load_model(str(tmp_path))


@pytest.mark.parametrize("labels", [True, False])
def test_a_folder_of_timm(tmp_path, images, labels):
    """As timm's push to the hub writes it: its own form of config.json."""
    from timm.models import save_for_hf

    model = make_vit(num_classes=3)
    model.pretrained_cfg = {
        **timm.get_pretrained_cfg("vit_tiny_patch16_224").to_dict(),
        "architecture": "vit_tiny_patch16_224",
        "input_size": (3, 32, 32),
        "fixed_input_size": True,
        "mean": (0.5, 0.4, 0.3),
    }
    sizes = {"patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 4}
    names = {"label_names": ["cat", "dog", "teapot"]} if labels else {}
    save_for_hf(
        model,
        str(tmp_path),
        model_config={"num_classes": 3, **names},
        model_args=sizes,
        safe_serialization=True,
    )
    for name in (str(tmp_path), f"local-dir:{tmp_path}"):
        loaded = load_model(name)
        torch.testing.assert_close(loaded.model(images), model(images))
        assert loaded.class_names == (("cat", "dog", "teapot") if labels else None)
        assert loaded.transform(Image.new("RGB", (50, 40))).shape == (3, 32, 32)
        assert loaded.mean.tolist() == pytest.approx([0.5, 0.4, 0.3])
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match=r"has no model.safetensors in"):
        load_model(str(tmp_path))


def test_a_model_of_timm_in_the_wrapper_of_transformers(tmp_path):
    config = transformers.TimmWrapperConfig(
        architecture="vit_tiny_patch16_224",
        model_args={"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 2, "num_heads": 4},
        pretrained_cfg={"input_size": (3, 32, 32), "mean": (0.5, 0.4, 0.3)},
        id2label=NAMES,
        label2id={name: index for index, name in NAMES.items()},
    )
    wrapper = transformers.TimmWrapperForImageClassification(config).eval()
    wrapper.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    images = torch.randn(2, 3, 32, 32)
    torch.testing.assert_close(loaded.model(images), wrapper(pixel_values=images).logits)
    assert loaded.class_names == tuple(NAMES.values())


def test_a_picture_from_the_command(tmp_path):
    """The command takes a folder like any other name."""
    from captum_reflected.cli.main import main

    folder = save_classifier(make_classifier(), tmp_path / "model")
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), np.uint8)).save(
        tmp_path / "photo.png"
    )
    arguments = ["--model", str(folder), "--target", "dog", "--output", str(tmp_path)]
    assert main(["explain", str(tmp_path / "photo.png"), "--device", "cpu", *arguments]) == 0
    (saved,) = tmp_path.glob("photo.*.mask_regression.npy")
    assert np.isfinite(np.load(saved)).all()


def test_photos_of_several_sizes_that_are_not_resized(tmp_path, capsys):
    """A model that takes them explains them; of another one, the error names the size."""
    from captum_reflected.cli.main import main

    for name, picture in zip("abcd", random_pictures(), strict=True):
        picture.resize((48, 40) if name == "c" else (32, 32)).save(tmp_path / f"{name}.png")
    photos = [str(tmp_path / f"{name}.png") for name in "abcd"]
    processor = make_processor(do_resize=False)
    out = tmp_path / "out"
    for kind, code in (("Dinov2", 0), ("ViT", 2)):
        folder = save_classifier(make_classifier(kind), tmp_path / kind, processor)
        arguments = ["--model", str(folder), "--quality", "fast", "--device", "cpu"]
        assert main(["explain", *photos, *arguments, "--output", str(out / kind)]) == code
    shapes = [np.load(path).shape for path in sorted((out / "Dinov2").glob("*.npy"))]
    assert shapes == [(32, 32), (32, 32), (40, 48), (32, 32)]
    assert re.search(r"fails on images of shape \(3, 40, 48\), which its", capsys.readouterr().err)
