"""Dual encoders as classifiers: open_clip and transformers, offline, with tiny random models."""

import json
import shutil
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from PIL import Image
from safetensors.torch import save_file
from torch import nn

from captum_reflected import ReflectedRelevance, TokenLayout, TransformerAttribution
from captum_reflected.attr.methods import METHODS
from captum_reflected.models import (
    FEW_TEMPLATES,
    ModelLoadError,
    ZeroShotClassifier,
    load_model,
    prompts,
)

NAMES = ["a dog", "a cat", "a teapot"]
TEMPLATES = ["a photo of {}.", "a drawing of {}."]
NAME = "tiny-zero-shot"
SIGMOID = "tiny-zero-shot-sigmoid"
CAPTIONING = "tiny-zero-shot-coca"

# Told rather than inferred: these tests are not about finding the tokens.
LAYOUTS = {
    "open_clip": TokenLayout(1, (4, 4)),
    "clip": TokenLayout(1, (4, 4)),
    "siglip": TokenLayout(0, (4, 4), "mean"),
}


@pytest.fixture(scope="session")
def open_clip(tmp_path_factory):
    """open_clip, with two tiny models registered."""
    open_clip = pytest.importorskip("open_clip")
    folder = tmp_path_factory.mktemp("open_clip")
    config = {
        "embed_dim": 24,
        "vision_cfg": {
            "image_size": 32,
            "layers": 3,
            "width": 32,
            "head_width": 8,
            "patch_size": 8,
        },
        "text_cfg": {
            "context_length": 32,
            "vocab_size": 49408,
            "width": 16,
            "heads": 2,
            "layers": 2,
        },
    }
    (folder / f"{NAME}.json").write_text(json.dumps(config))
    (folder / f"{SIGMOID}.json").write_text(json.dumps({**config, "init_logit_bias": -10}))
    captioning = {
        **config,
        "vision_cfg": {**config["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 4},
        "text_cfg": {**config["text_cfg"], "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {"width": 16, "heads": 2, "layers": 1, "context_length": 32},
        "custom_text": True,
    }
    captioning["vision_cfg"]["output_tokens"] = True
    (folder / f"{CAPTIONING}.json").write_text(json.dumps(captioning))
    open_clip.add_model_config(folder)
    return open_clip


@pytest.fixture(scope="session")
def weights(open_clip, tmp_path_factory):
    """A local file of random weights large enough to tell classes apart."""
    file = tmp_path_factory.mktemp("weights") / "tiny.safetensors"
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = open_clip.create_model(NAME)
        for name, parameter in model.named_parameters():
            if name != "logit_scale":
                nn.init.normal_(parameter, std=0.2)
    save_file(model.state_dict(), file)
    return file


@pytest.fixture(scope="session")
def tokenizer():
    """A word-level tokenizer, built from nothing."""
    transformers = pytest.importorskip("transformers")
    tokenizers = pytest.importorskip("tokenizers")
    words = ["<pad>", "<unk>", "</s>", "a", "dog", "cat", "teapot", "photo", "of", "drawing", "."]
    vocabulary = {word: index for index, word in enumerate(words)}
    raw = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    raw.post_processor = tokenizers.processors.TemplateProcessing(
        single="$A </s>", special_tokens=[("</s>", vocabulary["</s>"])]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", unk_token="<unk>", eos_token="</s>"
    )


def make_hugging_face(kind):
    transformers = pytest.importorskip("transformers")
    shared = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4}
    text = {
        **shared,
        "num_hidden_layers": 2,
        "vocab_size": 16,
        "max_position_embeddings": 16,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    vision = {**shared, "num_hidden_layers": 3, "image_size": 32, "patch_size": 8}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        if kind == "clip":
            config = transformers.CLIPConfig(
                text_config={**text, "attention_dropout": 0.5},
                vision_config=vision,
                projection_dim=24,
            )
            model = transformers.CLIPModel(config)
        else:
            config = transformers.SiglipConfig(
                text_config={**text, "projection_size": 32}, vision_config=vision
            )
            model = transformers.SiglipModel(config)
        for name, parameter in model.named_parameters():
            if not name.startswith("logit"):
                nn.init.normal_(parameter, std=0.2)
    return model.eval()


@pytest.fixture
def classifier(weights):
    return ZeroShotClassifier.from_open_clip(NAME, weights, NAMES, TEMPLATES)


@pytest.fixture(params=LAYOUTS)
def family(request, tokenizer):
    """A classifier of every family, and its token layout."""
    if request.param == "open_clip":
        made = request.getfixturevalue("classifier")
    else:
        made = ZeroShotClassifier.from_hugging_face(
            make_hugging_face(request.param), NAMES, TEMPLATES, tokenizer=tokenizer
        )
    return made, LAYOUTS[request.param]


def test_logits_are_scaled_cosine_similarities():
    images, texts = torch.randn(2, 5), torch.randn(3, 5)
    classifier = ZeroShotClassifier(lambda x: x, texts, 10.0, logit_bias=-1.0)
    expected = torch.stack(
        [
            torch.stack([10 * torch.cosine_similarity(i, t, dim=0) - 1 for t in texts])
            for i in images
        ]
    )
    torch.testing.assert_close(classifier(images), expected)
    assert classifier.num_classes == 3
    assert classifier.class_names is None
    assert classifier.recommended_start_layer == 0


def test_features_of_another_dtype_than_the_texts():
    classifier = ZeroShotClassifier(lambda x: x, torch.randn(3, 5))
    assert classifier(torch.randn(2, 5, dtype=torch.bfloat16)).dtype == torch.bfloat16


@pytest.mark.parametrize("name", [NAME, SIGMOID, CAPTIONING])
def test_logits_of_open_clip(open_clip, images, name):
    torch.manual_seed(3)
    classifier = ZeroShotClassifier.from_open_clip(name, None, NAMES, ["{}"])
    torch.manual_seed(3)
    model = open_clip.create_model(name).eval()
    with torch.no_grad():
        texts = model.encode_text(open_clip.get_tokenizer(name)(NAMES), normalize=True)
        expected = model.logit_scale.exp() * model.encode_image(images, normalize=True) @ texts.T
        if name == SIGMOID:
            expected = expected + model.logit_bias
    torch.testing.assert_close(classifier(images), expected)
    assert not classifier.training
    assert not classifier.image_tower.training


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_logits_of_transformers(images, tokenizer, kind):
    model = make_hugging_face(kind)
    classifier = ZeroShotClassifier.from_hugging_face(model, NAMES, ["{}"], tokenizer=tokenizer)
    padding = {"clip": {"padding": True}, "siglip": {"padding": "max_length", "max_length": 16}}
    texts = tokenizer(NAMES, return_token_type_ids=False, return_tensors="pt", **padding[kind])
    expected = model(pixel_values=images, **texts).logits_per_image
    torch.testing.assert_close(classifier(images), expected)


def test_templates_are_averaged_as_in_clip(open_clip, weights, monkeypatch):
    """open_clip's own zero-shot weights; also where classes take several forwards."""
    templates = open_clip.OPENAI_IMAGENET_TEMPLATES[:4]
    names = open_clip.IMAGENET_CLASSNAMES[:7]
    monkeypatch.setattr(prompts, "_TEXTS_PER_FORWARD", 12)
    classifier = ZeroShotClassifier.from_open_clip(NAME, weights, names, templates)
    model = open_clip.create_model(NAME, str(weights)).eval()
    expected = open_clip.build_zero_shot_classifier(
        model, open_clip.get_tokenizer(NAME), names, templates
    )
    torch.testing.assert_close(classifier.text_features, expected.T)


def test_templates_of_several_directions():
    """Normalise each, mean, normalise: long features do not weigh more."""
    features = {"x dog": [3.0, 0.0], "y dog": [0.0, 1.0], "x {y}": [1.0, 0.0], "y {y}": [2.0, 0.0]}
    made = prompts.class_features(
        lambda texts: torch.tensor([features[text] for text in texts]),
        ["dog", "{y}"],
        ["x {}", lambda name: f"y {name}"],
    )
    torch.testing.assert_close(made, torch.tensor([[0.5**0.5, 0.5**0.5], [1.0, 0.0]]))


def test_all_imagenet_classes_load(open_clip, weights):
    """Two of open_clip's names stand there twice."""
    names = open_clip.IMAGENET_CLASSNAMES
    with pytest.raises(ValueError, match="'missile', 'sunglasses' given more than once"):
        ZeroShotClassifier.from_open_clip(NAME, weights, names)
    made = ZeroShotClassifier.from_open_clip(NAME, weights, names, allow_duplicates=True)
    assert made.num_classes == 1000


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_text_tower_runs_once(images, tokenizer, kind):
    model = make_hugging_face(kind)
    calls = []
    model.text_model.register_forward_hook(lambda *_: calls.append(1))
    classifier = ZeroShotClassifier.from_hugging_face(
        model, NAMES, FEW_TEMPLATES, tokenizer=tokenizer
    )
    assert len(calls) == 1
    classifier(images)
    assert len(calls) == 1
    assert "text_features" in dict(classifier.named_buffers())
    assert not classifier.text_features.requires_grad
    assert not any("text_model" in name for name, _ in classifier.named_modules())


def test_open_clip_keeps_only_the_image_tower(classifier):
    assert not any("token_embedding" in name for name, _ in classifier.named_parameters())


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_the_model_stays_as_it_was(tokenizer, kind):
    model = make_hugging_face(kind).train()
    model.vision_model.eval()
    for parameter in model.text_model.parameters():
        parameter.requires_grad_(False)
    modes = [module.training for module in model.modules()]
    grads = [parameter.requires_grad for parameter in model.parameters()]
    state = {name: value.clone() for name, value in model.state_dict().items()}

    def make(tokenizer):
        return ZeroShotClassifier.from_hugging_face(model, NAMES, tokenizer=tokenizer)

    # Dropout in the text tower is off while texts are encoded.
    torch.testing.assert_close(make(tokenizer).text_features, make(tokenizer).text_features)
    with pytest.raises(ZeroDivisionError):
        make(lambda *_, **__: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    assert [parameter.requires_grad for parameter in model.parameters()] == grads
    torch.testing.assert_close(model.state_dict(), state, rtol=0, atol=0)


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_transformers_from_a_local_folder(tmp_path, images, tokenizer, kind):
    model = make_hugging_face(kind)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    loaded = ZeroShotClassifier.from_hugging_face(tmp_path, NAMES)
    given = ZeroShotClassifier.from_hugging_face(model, NAMES, tokenizer=tokenizer)
    torch.testing.assert_close(loaded(images), given(images))
    assert not loaded.training


@pytest.mark.parametrize("kind", ["clip", "siglip"])
def test_load_model_of_transformers(tmp_path, images, tokenizer, hub, kind):
    """From a folder and from the hub, with the preprocessing of its image processor."""
    folder = hub.folder / "someone" / "tiny"
    model = make_hugging_face(kind)
    processor = make_image_processor(kind)
    for part in (model, tokenizer, processor):
        part.save_pretrained(folder)
    given = ZeroShotClassifier.from_hugging_face(model, NAMES, TEMPLATES, tokenizer=tokenizer)
    assert given.preprocessing is None
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    expected = processor(images=picture, return_tensors="pt")["pixel_values"]
    for name in (str(folder), "hf:someone/tiny"):
        loaded = load_model(name, classes=NAMES, templates=TEMPLATES)
        torch.testing.assert_close(loaded.model(images), given(images))
        torch.testing.assert_close(loaded.transform(picture)[None], expected, rtol=0, atol=1e-6)
        assert loaded.mean.tolist() == pytest.approx(processor.image_mean, abs=1e-5)
        assert loaded.std.tolist() == pytest.approx(processor.image_std, abs=1e-5)
        assert (loaded.class_names, loaded.num_classes) == (tuple(NAMES), 3)
        assert not loaded.model.training
    with pytest.raises(ModelLoadError, match="needs classes; wanted: the class names"):
        load_model(str(folder))
    with pytest.raises(ModelLoadError, match=r"wanted: the names as classes \(--classes\)"):
        load_model(str(folder), class_names=NAMES)
    with pytest.raises(ModelLoadError, match="'a dog' given more than once"):
        load_model(str(folder), classes=["a dog", "a dog"])
    for file in folder.glob("*processor_config.json"):
        file.unlink()
    with pytest.raises(ModelLoadError, match=r"has no preprocessor_config.json"):
        load_model(str(folder), classes=NAMES)


def make_image_processor(kind):
    transformers = pytest.importorskip("transformers")
    if kind == "clip":
        return transformers.CLIPImageProcessor(
            size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32}
        )
    return transformers.SiglipImageProcessor(size={"height": 32, "width": 32})


def test_a_processor_holds_tokenizer_and_preprocessing(images, tokenizer):
    class Processor:
        pass

    processor = Processor()
    processor.tokenizer = tokenizer
    processor.image_processor = make_image_processor("clip")
    model = make_hugging_face("clip")
    made, without = (
        ZeroShotClassifier.from_hugging_face(model, NAMES, tokenizer=given)
        for given in (processor, tokenizer)
    )
    torch.testing.assert_close(made(images), without(images))
    mean = processor.image_processor.image_mean
    assert made.preprocessing.mean.tolist() == pytest.approx(mean, abs=1e-5)
    assert without.preprocessing is None


@pytest.mark.parametrize("method", [TransformerAttribution, ReflectedRelevance])
def test_our_attributors(family, images, method):
    classifier, layout = family
    attributor = method(classifier, token_layout=layout)
    first, second = attributor.attribute(images, 0), attributor.attribute(images, 1)
    assert first.shape == images.shape
    assert first.isfinite().all()
    assert not torch.allclose(first, second)


def test_integrated_gradients(family, images):
    classifier, _ = family
    attributor = IntegratedGradients(classifier)
    first = attributor.attribute(images, target=0, n_steps=4)
    second = attributor.attribute(images, target=1, n_steps=4)
    assert first.isfinite().all()
    assert not torch.allclose(first, second)


def test_recommended_start_layer(family):
    """The last of three layers for CLIP; all of them where no convention is known."""
    classifier, layout = family
    is_clip = layout.num_prefix_tokens == 1
    assert classifier.recommended_start_layer == (2 if is_clip else 0)


def test_methods_start_where_the_model_recommends(classifier, images):
    target = torch.zeros(len(images), dtype=torch.long)
    last = TransformerAttribution(classifier, start_layer=2).attribute(images, 0)[:, 0]
    every = TransformerAttribution(classifier, start_layer=0).attribute(images, 0)[:, 0]
    torch.testing.assert_close(TransformerAttribution(classifier).attribute(images, 0)[:, 0], last)
    explain = METHODS["transformer_attribution"].explain
    torch.testing.assert_close(explain(classifier, images, target), last)
    torch.testing.assert_close(explain(classifier, images, target, start_layer=0), every)
    assert not torch.allclose(last, every)


def test_load_model(open_clip, weights):
    loaded = load_model(f"open_clip:{NAME}", weights=weights, classes=NAMES, templates=TEMPLATES)
    assert loaded.class_names == tuple(NAMES)
    assert loaded.num_classes == 3
    assert not loaded.model.training
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8))
    _, _, transform = open_clip.create_model_and_transforms(NAME)
    image = loaded.transform(picture)
    torch.testing.assert_close(image, transform(picture))
    assert tuple(image.shape) == (3, 32, 32)
    assert tuple(loaded.mean.tolist()) == pytest.approx(open_clip.OPENAI_DATASET_MEAN)
    assert tuple(loaded.std.tolist()) == pytest.approx(open_clip.OPENAI_DATASET_STD)
    pictures = loaded.to_pictures(image[None])
    assert pictures.min() >= 0
    assert pictures.max() <= 1


def test_imagenet_classes_by_name(open_clip, weights):
    """Two of the names occur twice; an image's class is its place among ImageNet's synsets."""
    loaded = load_model(f"open_clip:{NAME}", weights=weights, classes="imagenet")
    assert loaded.class_names == tuple(open_clip.IMAGENET_CLASSNAMES)
    assert loaded.num_classes == len(loaded.synsets) == 1000
    assert loaded.synsets[2] == "n01484850"
    assert loaded.class_names[2] == "great white shark"


@pytest.fixture
def tag(open_clip, monkeypatch):
    """A pretrained tag of the tiny model, trained in its own way."""
    from open_clip import pretrained

    config = {
        "hf_hub": "someone/tiny/",
        "quick_gelu": True,
        "mean": (0.5, 0.4, 0.3),
        "std": (0.3, 0.3, 0.3),
        "interpolation": "bilinear",
        "resize_mode": "squash",
    }
    monkeypatch.setitem(pretrained._PRETRAINED, NAME, {"laion": config})
    return config


@pytest.mark.parametrize("local", [False, True])
def test_a_tag_brings_its_activation_and_preprocessing(open_clip, weights, tag, images, hub, local):
    put_on(hub, weights, "open_clip_model.safetensors")
    loaded = load_model(
        f"open_clip:{NAME}/laion", weights=weights if local else None, classes=NAMES
    )
    assert loaded.mean.tolist() == pytest.approx(tag["mean"])
    assert loaded.model.preprocessing.transform.transforms[0].size == (32, 32)
    model = open_clip.create_model(NAME, str(weights), force_quick_gelu=True).eval()
    features = F.normalize(model.encode_image(images), dim=-1)
    scale = model.logit_scale.exp()
    torch.testing.assert_close(
        loaded.model(images), scale * features @ loaded.model.text_features.T
    )


@pytest.mark.parametrize(
    ("stored", "file"),
    [
        ("someone/tiny/", "open_clip_model.safetensors"),
        ("someone/tiny/pytorch_model.bin", "pytorch_model.safetensors"),
    ],
)
def test_only_safetensors_are_downloaded(open_clip, weights, tag, hub, monkeypatch, stored, file):
    monkeypatch.setitem(tag, "hf_hub", stored)
    for pickle in ("open_clip_pytorch_model.bin", "pytorch_model.bin"):
        put_on(hub, weights, pickle)
    with pytest.raises(ModelLoadError, match=rf"cannot download {file} of someone/tiny: .*wanted"):
        ZeroShotClassifier.from_open_clip(NAME, "laion", NAMES)
    put_on(hub, weights, file)
    loaded = ZeroShotClassifier.from_open_clip(NAME, "laion", NAMES)
    hub.stop()
    cached = ZeroShotClassifier.from_open_clip(NAME, "laion", NAMES)
    torch.testing.assert_close(cached.state_dict(), loaded.state_dict(), rtol=0, atol=0)
    assert not any(path.endswith(".bin") for path in hub.asked)
    monkeypatch.setitem(tag, "hf_hub", "someone/other/")
    with pytest.raises(ModelLoadError, match=r"cannot be reached .*; wanted: .*--weights"):
        ZeroShotClassifier.from_open_clip(NAME, "laion", NAMES)


def put_on(hub, weights, file):
    folder = hub.folder / "someone" / "tiny"
    folder.mkdir(parents=True, exist_ok=True)
    shutil.copy(weights, folder / file)


@pytest.mark.parametrize(
    ("arguments", "options", "error", "message"),
    [
        ((None, torch.ones(2, 3)), {}, TypeError, "image_tower is a NoneType; wanted: a module"),
        ((abs, [[1.0]]), {}, TypeError, r"text_features is \[\[1.0\]\]; wanted: a floating"),
        ((abs, torch.ones(2, 3).long()), {}, TypeError, "a tensor of torch.int64; wanted"),
        ((abs, torch.ones(3)), {}, ValueError, r"shape \(3,\); wanted: \(C, D\)"),
        ((abs, torch.ones(0, 3)), {}, ValueError, r"shape \(0, 3\).*at least one class"),
        ((abs, torch.full((2, 3), torch.nan)), {}, ValueError, "NaN or infinite"),
        ((abs, torch.eye(2, 3) * torch.tensor([[1], [0]])), {}, ValueError, "row of zeros"),
        ((abs, torch.ones(2, 3), 0), {}, ValueError, "logit_scale is 0; wanted: a number greater"),
        ((abs, torch.ones(2, 3), -1.0), {}, ValueError, "logit_scale is -1.0"),
        ((abs, torch.ones(2, 3), float("nan")), {}, ValueError, "logit_scale is nan"),
        ((abs, torch.ones(2, 3), "100"), {}, ValueError, "logit_scale is '100'"),
        ((abs, torch.ones(2, 3)), {"logit_bias": None}, ValueError, "logit_bias is None"),
        ((abs, torch.ones(2, 3), 1.0, ["a"]), {}, ValueError, r"\(2, 3\) and there are 1 class"),
        ((abs, torch.ones(2, 3), 1.0, []), {}, ValueError, "class names is empty"),
        ((abs, torch.ones(2, 3), 1.0, ["a", "a"]), {}, ValueError, "'a' given more than once"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_constructor(arguments, options, error, message):
    with pytest.raises(error, match=message):
        ZeroShotClassifier(*arguments, **options)


def test_a_name_given_twice_on_purpose():
    made = ZeroShotClassifier(abs, torch.ones(2, 3), 1.0, ["a", "a"], allow_duplicates=True)
    assert made.class_names == ("a", "a")


@pytest.mark.parametrize(
    ("output", "error", "message"),
    [
        (torch.ones(2, 4), ValueError, r"returned shape \(2, 4\); wanted: .*\(B, 3\)"),
        (torch.ones(2, 5, 3), ValueError, r"returned shape \(2, 5, 3\)"),
        ((torch.ones(2, 3), None), TypeError, r"returned a tuple; wanted: a tensor of features"),
    ],
    ids=range(3),
)
def test_image_features(output, error, message):
    with pytest.raises(error, match=message):
        ZeroShotClassifier(lambda _: output, torch.ones(2, 3))(torch.zeros(2, 3, 8, 8))


@pytest.mark.parametrize(
    ("names", "templates", "error", "message"),
    [
        ([], ["{}"], ValueError, "class names is empty"),
        ("dog,cat", ["{}"], TypeError, "class names are 'dog,cat'; wanted: a list"),
        (["dog", 1], ["{}"], TypeError, "class name 1 is a int"),
        (["dog", " "], ["{}"], ValueError, "class name ' ' is blank"),
        (["dog", "cat", "dog"], ["{}"], ValueError, "'dog' given more than once; wanted: each"),
        (["dog"], [], ValueError, "templates is empty"),
        (["dog"], "a {}", TypeError, "templates is 'a {}'; wanted: a list"),
        (
            ["dog"],
            ["a photo"],
            ValueError,
            "template 'a photo'; wanted: a text with {} for the class name",
        ),
        (["dog"], ["{}", 7], TypeError, "template 7; wanted: a text with {}"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("library", ["open_clip", "hugging_face"])
def test_names_and_templates(library, names, templates, error, message):
    model = {"open_clip": (NAME, None), "hugging_face": (nn.Identity(),)}[library]
    with pytest.raises(error, match=message):
        getattr(ZeroShotClassifier, f"from_{library}")(*model, names, templates)


@pytest.mark.parametrize(
    ("name", "pretrained", "options", "message"),
    [
        ("ViT-B-33", None, {}, "unknown model 'ViT-B-33'.*did you mean .*ViT-B-32"),
        ("vit-b-32", None, {}, r"unknown model 'vit-b-32'.*did you mean ViT-B-32 or"),
        ("ViT-B-32", "opena", {}, r"'opena'; wanted: a tag .*; did you mean openai\?$"),
        ("zzzz", None, {}, r"unknown model 'zzzz'; wanted: one of open_clip.list_models\(\)$"),
        (NAME, "openai", {}, r"'openai'; wanted: a tag of model 'tiny-zero-shot' \(it has none\)"),
        ("ViT-B-32", "gpt", {}, r"'gpt'; wanted: a tag .*\(openai, .*local .safetensors file$"),
        (NAME, "tiny.pt", {}, "'tiny.pt'; wanted: a tag.*or a local .safetensors file"),
        (NAME, "no.safetensors", {}, "weights file no.safetensors does not exist"),
        (NAME, None, {"weights": "tiny.bin"}, "weights is tiny.bin; wanted: a .safetensors file"),
        (NAME, "b.safetensors", {"weights": "a.safetensors"}, r"wanted: a tag .*\(it has none\)$"),
    ],
)
def test_open_clip_names_and_weights(open_clip, name, pretrained, options, message):
    with pytest.raises(ModelLoadError, match=message):
        ZeroShotClassifier.from_open_clip(name, pretrained, NAMES, **options)


def test_weights_of_another_model(tmp_path, open_clip, weights):
    save_file({"head.weight": torch.zeros(2, 2)}, tmp_path / "head.safetensors")
    with pytest.raises(ModelLoadError, match=r"with the weights .*head.safetensors: .*Missing key"):
        ZeroShotClassifier.from_open_clip(NAME, tmp_path / "head.safetensors", NAMES)
    torch.save(open_clip.create_model(NAME).state_dict(), tmp_path / "pickle.safetensors")
    with pytest.raises(ModelLoadError, match=r"with the weights .*pickle.safetensors"):
        ZeroShotClassifier.from_open_clip(NAME, tmp_path / "pickle.safetensors", NAMES)


def test_models_of_transformers_that_are_not_taken(tmp_path, tokenizer):
    transformers = pytest.importorskip("transformers")
    with pytest.raises(TypeError, match=r"tokenizer is None; wanted: .* of the CLIPModel"):
        ZeroShotClassifier.from_hugging_face(make_hugging_face("clip"), NAMES)
    with pytest.raises(ModelLoadError, match=r"a Identity is a model of type None; wanted: .*clip"):
        ZeroShotClassifier.from_hugging_face(nn.Identity(), NAMES, tokenizer=tokenizer)
    with pytest.raises(ModelLoadError, match=r"cannot load '.*nothing'; wanted: a CLIP or SigLIP"):
        ZeroShotClassifier.from_hugging_face(tmp_path / "nothing", NAMES)
    transformers.ViTConfig().save_pretrained(tmp_path)
    with pytest.raises(ModelLoadError, match="of type 'vit'; wanted: one of transformers' clip, s"):
        ZeroShotClassifier.from_hugging_face(str(tmp_path), NAMES)


def test_pickles_of_transformers_are_refused(tmp_path, tokenizer):
    model = make_hugging_face("clip")
    model.config.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="safetensors"):
        ZeroShotClassifier.from_hugging_face(tmp_path, NAMES)


@pytest.mark.parametrize(
    ("package", "load"),
    [
        ("open_clip", lambda: ZeroShotClassifier.from_open_clip(NAME, None, NAMES)),
        ("transformers", lambda: ZeroShotClassifier.from_hugging_face("openai/clip", NAMES)),
    ],
)
def test_a_missing_package_is_named(monkeypatch, package, load):
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ModelLoadError, match=r'pip install "captum-reflected\[clip\]"'):
        load()


@pytest.fixture
def photo(tmp_path):
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


@pytest.fixture
def explain(open_clip, photo, capsys):
    """Runs ``captum-reflected explain`` on the photo; its status and what it printed."""
    from captum_reflected.cli.main import main

    def run(*arguments):
        status = main(
            ["explain", str(photo), "--output", str(photo.parent), "--device", "cpu", *arguments]
        )
        return status, "".join(capsys.readouterr())

    return run


def heat(photo, target, method="transformer_attribution"):
    (path,) = photo.parent.glob(f"photo.{target}-*.{method}.npy")
    return np.load(path)


def test_command(explain, photo, weights):
    model = ["--model", f"open_clip:{NAME}", "--weights", str(weights)]
    model += ["--classes", "a dog, a cat", "--method", "transformer_attribution"]
    status, text = explain(*model, "--templates", TEMPLATES[0], "--target", "dog")
    assert status == 0
    assert "explained: a dog" in text
    assert "a cat (1)" in text
    assert "rolled out from layer 2 on" in text
    dog = heat(photo, 0)
    assert dog.shape == (32, 32)
    assert explain(*model, "--templates", TEMPLATES[0], "--target", "cat")[0] == 0
    assert not np.allclose(dog, heat(photo, 1))
    assert explain(*model, *["--templates", "{}", "--templates", "not {}"])[0] == 0
    status, text = explain(
        *model, "--templates", TEMPLATES[0], "--target", "dog", "--start-layer", "0"
    )
    assert status == 0
    assert "rolled out" not in text
    assert not np.allclose(dog, heat(photo, 0))


@pytest.mark.parametrize("method", METHODS)
def test_command_with_every_method(explain, photo, weights, method):
    status, _ = explain(
        *["--model", f"open_clip:{NAME}", "--weights", str(weights), "--method", method],
        *["--classes", "dog,cat", "--target", "cat"],
    )
    assert status == 0
    assert np.isfinite(heat(photo, 1, method)).all()


TINY = ["--model", f"open_clip:{NAME}", "--weights"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([*TINY, "W"], "needs classes; wanted: the class names"),
        (["--model", f"open_clip:{NAME}", "--classes", "a,b"], "names no pretrained weights"),
        ([*TINY, "W", "--classes", "a,,b"], "class name '' is blank"),
        ([*TINY, "W", "--classes", "a,a"], "'a' given more than once"),
        (
            [*TINY, "W", "--classes", "a", "--templates", "photo"],
            "wanted: a text with {} for the class name",
        ),
        ([*TINY, "w.pt", "--classes", "a"], "w.pt; wanted: a .safetensors file"),
        (["--model", "open_clip:nothing/openai", "--classes", "a"], "unknown model 'nothing'"),
        ([*TINY, "W", "--classes", "a,b", "--target", "c"], "'c' names 0 of the 2 classes"),
        (
            [
                *TINY,
                "W",
                "--classes",
                "a,b",
                "--start-layer",
                "3",
                "--method",
                "reflected_relevance",
            ],
            "start_layer is 3; wanted",
        ),
        (["--model", "demo", "--classes", "a,b"], "model 'demo' has classes of its own"),
        (["--model", "deit_tiny_patch16_224", "--templates", "{}"], "has classes of its own"),
        (
            ["--start-layer", "1", "--method", "integrated_gradients"],
            "takes no start layer; wanted: one of reflected_relevance, transformer_attribution",
        ),
    ],
)
def test_command_says_what_is_wrong(explain, weights, arguments, message):
    status, text = explain(*(str(weights) if part == "W" else part for part in arguments))
    assert status == 2
    assert message in text
