"""The demo scenes tell the truth about themselves, and the shipped files match the code."""

from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
import train_demo
from safetensors import safe_open
from safetensors.torch import load_file

from captum_reflected.demo import (
    CLASS_NAMES,
    generate_scenes,
    load_model,
    load_scenes,
    preprocess,
)
from captum_reflected.demo import (
    scenes as scenes_module,
)

FRESH_SEED = 987_654_321
SHIPPED_MODEL = Path(str(files("captum_reflected.demo") / "model.safetensors"))


def same(first, second):
    return all(
        torch.equal(getattr(first, part), getattr(second, part))
        for part in ("images", "masks", "labels")
    )


def shipped_facts():
    with safe_open(SHIPPED_MODEL, framework="pt") as stored:
        return stored.metadata()


@pytest.fixture(scope="module")
def model():
    return load_model()


@pytest.fixture(scope="module")
def fresh():
    return generate_scenes(500, seed=FRESH_SEED)


@torch.no_grad()
def share_right(model, inputs, labels):
    return (model(inputs).argmax(1) == labels).double().mean().item()


def test_shapes_and_types():
    scenes = generate_scenes(7, seed=3, size=64)
    assert scenes.images.shape == (7, 3, 64, 64)
    assert scenes.images.dtype == torch.uint8
    assert scenes.masks.shape == (7, 64, 64)
    assert scenes.masks.dtype == torch.bool
    assert scenes.labels.shape == (7,)
    assert scenes.labels.dtype == torch.int64


def test_same_seed_same_bytes_whatever_the_global_state():
    np.random.seed(1)
    torch.manual_seed(1)
    first = generate_scenes(20, seed=5)
    np.random.seed(2)
    torch.manual_seed(2)
    numpy_state, torch_state = np.random.get_state()[1].copy(), torch.get_rng_state()
    second = generate_scenes(20, seed=5)
    assert same(first, second)
    assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert not torch.equal(first.images, generate_scenes(20, seed=6).images)


@pytest.mark.parametrize("count", [40, 47])
def test_classes_are_balanced_and_shuffled(count):
    labels = generate_scenes(count, seed=8).labels
    counts = torch.bincount(labels, minlength=len(CLASS_NAMES))
    assert counts.max() - counts.min() <= 1
    assert counts.sum() == count
    assert not torch.equal(labels, torch.arange(count) % len(CLASS_NAMES))


def test_mask_is_exactly_where_the_texture_shows(monkeypatch):
    """Painting the object in its one colour, then in its other, changes the mask and no more."""
    painted = []
    for colour in (0.0, 1.0):
        for name in CLASS_NAMES:
            monkeypatch.setitem(
                scenes_module._TEXTURES, name, lambda u, v, colour=colour: 0 * (u + v) + colour
            )
        painted.append(generate_scenes(60, seed=11))
    assert torch.equal(painted[0].masks, painted[1].masks)
    changed = (painted[0].images != painted[1].images).any(1)
    assert torch.equal(changed, painted[0].masks)

    # One flat colour, but for faint noise: no distractor lies over any part of the object.
    for image, mask in zip(painted[0].images, painted[0].masks, strict=True):
        inside = image[:, mask].float()
        assert (inside - inside.median(1, keepdim=True).values).abs().max() < 20


def test_object_size_and_place(fresh):
    for mask in fresh.masks:
        rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
        across = max(rows[-1] - rows[0], columns[-1] - columns[0]).item() + 1
        assert 20 <= across <= 47
        border = mask.clone()
        border[1:-1, 1:-1] = False
        assert not border.any()


def test_outlines_do_not_tell_the_class(fresh):
    areas = fresh.masks.flatten(1).sum(1).double()
    means = torch.stack([areas[fresh.labels == label].mean() for label in range(10)])
    assert (means / areas.mean() - 1).abs().max() < 0.25


def test_shipped_scenes_are_what_the_generator_makes():
    seed = train_demo.split_seed(int(shipped_facts()["seed"]), "sample")
    shipped = load_scenes()
    assert same(shipped, generate_scenes(train_demo.SAMPLE_COUNT, seed=seed))
    assert torch.bincount(shipped.labels).tolist() == [2] * len(CLASS_NAMES)


def test_shipped_files_are_small():
    assert SHIPPED_MODEL.stat().st_size <= 2.5e6
    pictures = list((SHIPPED_MODEL.parent / "scenes").glob("*.png"))
    assert len(pictures) == 2 * train_demo.SAMPLE_COUNT
    assert sum(picture.stat().st_size for picture in pictures) < 1e6


def test_split_seeds_never_meet():
    splits = ("train", "test", "sample")
    seeds = [train_demo.split_seed(seed, split) for seed in range(20) for split in splits]
    assert len(set(seeds)) == len(seeds)
    assert FRESH_SEED not in seeds


@pytest.mark.slow
def test_shipped_model_is_as_accurate_as_recorded(model):
    facts = shipped_facts()
    seed = train_demo.split_seed(int(facts["seed"]), "test")
    test = generate_scenes(int(facts["test_scenes"]), seed=seed)
    right = sum(
        share_right(model, preprocess(images), labels) * len(labels)
        for images, labels in zip(test.images.split(250), test.labels.split(250), strict=True)
    )
    assert not model.training
    assert abs(right / len(test.labels) - float(facts["test_accuracy"])) <= 1e-3
    assert float(facts["test_accuracy"]) >= 0.97


def test_shipped_model_answers_from_the_object(model, fresh):
    inputs, on_object = preprocess(fresh.images), fresh.masks[:, None]
    assert share_right(model, inputs * on_object, fresh.labels) >= 0.9
    assert share_right(model, inputs * ~on_object, fresh.labels) <= 0.25


def test_timm_prepares_input_as_preprocess_does(model):
    config = timm.data.resolve_model_data_config(model)
    assert config["input_size"] == (3, 96, 96)
    assert config["crop_pct"] == 1.0
    transform = timm.data.create_transform(**config, is_training=False)
    image = load_scenes().images[0]
    from torchvision.transforms.functional import to_pil_image

    torch.testing.assert_close(transform(to_pil_image(image)), preprocess(image[None])[0])


@pytest.mark.slow
def test_training_works_and_is_reproducible(tmp_path, capsys):
    before = torch.get_rng_state()
    options = ["--epochs", "2", "--scenes", "48", "--test-scenes", "20", "--batch-size", "16"]
    for folder, seed in (("a", "4"), ("b", "4"), ("c", "5")):
        train_demo.main([*options, "--seed", seed, "--output", str(tmp_path / folder)])
    assert torch.equal(torch.get_rng_state(), before)
    assert "test accuracy" in capsys.readouterr().out

    first, second, other = (load_file(tmp_path / name / "model.safetensors") for name in "abc")
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["head.weight"], other["head.weight"])
    assert len(list((tmp_path / "a" / "scenes").glob("*.mask.png"))) == train_demo.SAMPLE_COUNT
