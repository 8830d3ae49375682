"""Masks of photos: aligned with what the model sees, checked, and told apart when resumed."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from study import merge
from test_benchmark import rows_of
from timm.data import create_transform
from torchvision.transforms import CenterCrop, Compose, RandomErasing, Resize, ToTensor

from captum_reflected import TransformerAttribution, demo
from captum_reflected.benchmark.masks import IGNORED, OBJECT, MaskGeometry
from captum_reflected.cli.main import main
from captum_reflected.errors import BenchmarkError
from captum_reflected.metrics import average_precision, relevance_mass_accuracy
from captum_reflected.models import load_model
from captum_reflected.report.results import read_results

METRICS = "relevance_mass_accuracy,relevance_rank_accuracy,pointing_game,average_precision"
CHOSEN = range(0, 12, 3)


@pytest.fixture(scope="module")
def scenes():
    return demo.load_scenes()


@pytest.fixture
def folder(tmp_path, scenes):
    """Four scenes as photos, in folders named like their classes, and masks of their objects."""
    for index in CHOSEN:
        name = f"{demo.CLASS_NAMES[scenes.labels[index]]}/{index:02d}.png"
        for kind in ("photos", "masks"):
            (tmp_path / kind / name).parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.images[index].permute(1, 2, 0).numpy()).save(
            tmp_path / "photos" / name
        )
        mask = scenes.masks[index].byte().numpy() * OBJECT
        Image.fromarray(mask).save(tmp_path / "masks" / name)
    return tmp_path


def command(folder, *options, masks="masks", output="b"):
    """A run of the four scenes; options that are given once more count."""
    return main(
        [
            "benchmark", "--model", "demo", "--data", str(folder / "photos"),
            "--masks", str(folder / masks), "--methods", "transformer_attribution",
            "--metrics", METRICS, *options, "--output", str(folder / output),
        ]
    )  # fmt: skip


def mask_files(folder):
    return sorted((folder / "masks").rglob("*.png"))


def geometry(transform):
    return MaskGeometry(replace(load_model("demo"), transform=transform))


# --- Alignment


def timm_transform(**options):
    return create_transform(is_training=False, **options)


def open_clip_transform(**options):
    transform = pytest.importorskip("open_clip.transform")
    return transform.image_transform(is_train=False, **options)


TRANSFORMS = {
    "centre": lambda: timm_transform(input_size=(3, 64, 64), crop_pct=0.875),
    "larger": lambda: timm_transform(input_size=(3, 288, 288), crop_pct=1.0),
    "bicubic": lambda: timm_transform(input_size=(3, 64, 64), interpolation="bicubic"),
    "squashed": lambda: timm_transform(input_size=(3, 64, 48), crop_mode="squash"),
    "padded": lambda: timm_transform(input_size=(3, 64, 64), crop_mode="border", crop_pct=1.0),
    "not square": lambda: timm_transform(input_size=(3, 64, 96)),
    "open_clip": lambda: open_clip_transform(image_size=64),
    "open_clip padded": lambda: open_clip_transform(image_size=64, resize_mode="longest"),
    "open_clip squashed": lambda: open_clip_transform(image_size=64, resize_mode="squash"),
    "torchvision": lambda: Compose([Resize((70, 80)), CenterCrop((64, 72)), ToTensor()]),
}


@pytest.mark.parametrize("size", [(120, 90), (90, 121), (400, 300), (60, 71)])
@pytest.mark.parametrize("name", TRANSFORMS)
def test_masks_stay_on_what_is_drawn_in_the_photo(name, size):
    """The photo is its own mask: white on an ellipse and in a corner, which may be cut off."""
    transform = TRANSFORMS[name]()
    width, height = size
    x, y = np.meshgrid(np.arange(width) / width, np.arange(height) / height)
    drawn = (np.hypot((x - 0.4) / 0.3, (y - 0.55) / 0.2) < 1) | ((x > 0.7) & (y < 0.4))
    mask = Image.fromarray(drawn.astype(np.uint8) * OBJECT)
    seen = geometry(transform)(mask, size)
    assert set(seen.unique().tolist()) == {0, OBJECT}
    white, black, photo = (
        transform(Image.fromarray(np.repeat(grey[..., None], 3, axis=2).astype(np.uint8) * 255))[0]
        for grey in (drawn | True, drawn & False, drawn)
    )
    assert seen.shape == photo.shape
    share = ((photo - black) / (white - black)).nan_to_num(0, 0, 0)  # padding is no object
    assert (seen == OBJECT)[share > 0.8].all()
    assert (seen == 0)[share < 0.2].all()
    assert ((share > 0.8) | (share < 0.2)).float().mean() > 0.9


class Flip(torch.nn.Module):
    def forward(self, image):
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


class OffCentre(CenterCrop):
    """Moves the crop by one pixel."""

    def forward(self, image):
        moved = image.transform(image.size, Image.Transform.AFFINE, (1, 0, 1, 0, 1, 0))
        return super().forward(moved) if image.mode == "RGB" else super().forward(image)


OffCentre.__name__ = "CenterCrop"


@pytest.mark.parametrize(
    ("transform", "message"),
    [
        (Compose([Resize(64), CenterCrop(64), Flip(), ToTensor()]), "has the step Flip, which may"),
        (lambda image: torch.zeros(3, 64, 64), "has the step <lambda>"),
        (Compose([Resize(64), ToTensor(), RandomErasing(p=1)]), "has the step RandomErasing"),
        (Compose([Resize(64), OffCentre(64), ToTensor()]), "moves pixels in another way"),
    ],
)
def test_preprocessing_that_may_move_pixels_is_refused(transform, message):
    with pytest.raises(BenchmarkError, match=f"model 'demo': its preprocessing {message}") as found:
        geometry(transform)
    assert "wanted: only resizing, a centre crop" in str(found.value)


# --- What the rows say


def test_rows_are_those_of_masks_that_are_aligned_by_hand(folder, scenes):
    ignored = mask_files(folder)[1]
    mask = np.array(Image.open(ignored))
    mask[:, 40:60] = IGNORED
    Image.fromarray(mask).save(ignored)
    assert command(folder, "--target", "label", "--gallery", "2") == 0
    rows = rows_of(folder / "b")
    assert len(rows) == len(CHOSEN)
    for row in rows.values():
        index = int(Path(row["file"]).stem)
        images, labels = demo.preprocess(scenes.images[[index]]), scenes.labels[[index]]
        heat = TransformerAttribution(demo.load_model()).attribute(images, labels)
        seen = {"masks": scenes.masks[[index]], "ignore": torch.zeros(1, 96, 96, dtype=torch.bool)}
        if ignored.name == Path(row["file"]).name:
            seen["ignore"][..., 40:60] = True
        figures = row["methods"]["transformer_attribution"]
        assert list(figures) == METRICS.split(",")
        for metric in (average_precision, relevance_mass_accuracy):
            assert figures[metric.__name__] == pytest.approx(metric(heat, **seen).item(), abs=1e-5)
    with np.load(folder / "b/gallery/00000000.npz") as stored:
        first = int(Path(rows[0]["file"]).stem)
        assert np.array_equal(stored["mask"], scenes.masks[first])
    settings = json.loads((folder / "b/settings.json").read_text())["settings"]
    assert settings["data"]["masks"] == str(folder / "masks")


def test_masks_follow_photos_that_are_stored_turned(folder):
    """Cameras store photos as the sensor saw them, and how to turn them."""
    assert command(folder) == 0
    for path in sorted((folder / "photos").rglob("*.png")):
        picture = Image.open(path).transpose(Image.Transpose.ROTATE_90)
        exif = picture.getexif()
        exif[274] = 6  # to be turned back by 90 degrees
        picture.save(path, exif=exif)
    assert command(folder, output="turned") == 0
    for index, row in rows_of(folder / "b").items():
        assert rows_of(folder / "turned")[index]["methods"] == row["methods"]


def test_localisation_alone_runs_no_perturbed_images(folder, monkeypatch):
    def score(*_args, **_options):
        raise AssertionError("perturbed images are scored")

    monkeypatch.setattr("captum_reflected.metrics.registry.score_perturbed", score)
    assert command(folder) == 0


def test_scenes_have_masks_for_any_model(tmp_path):
    from safetensors.torch import save_file
    from timm import create_model

    torch.manual_seed(0)
    save_file(create_model("test_vit", num_classes=5).state_dict(), tmp_path / "w.safetensors")
    arguments = ["--model", "test_vit", "--weights", str(tmp_path / "w.safetensors")]
    arguments += ["--data", "scenes", "--limit", "2", "--methods", "center_gaussian"]
    arguments += ["--metrics", METRICS, "--output", str(tmp_path / "b")]
    assert main(["benchmark", *arguments]) == 0
    for row in rows_of(tmp_path / "b").values():
        assert list(row["methods"]["center_gaussian"]) == METRICS.split(",")


# --- Masks that cannot be used


def test_masks_that_cannot_be_used_fail_their_image(folder, capsys):
    paths = mask_files(folder)
    photos = folder / "photos"
    bad = {
        "size": Image.new("L", (96, 95), OBJECT),
        "empty": Image.new("L", (96, 96)),
        "ignored": Image.new("L", (96, 96), IGNORED),
        "ones": Image.fromarray(np.eye(96, dtype=np.uint8)),
        "ramp": Image.fromarray(np.arange(96 * 96).reshape(96, 96).astype(np.uint8)),
        "colours": Image.new("RGB", (96, 96), (255, 0, 0)),
    }
    for name, mask in bad.items():
        shutil.copy(photos / paths[0].relative_to(folder / "masks"), photos / f"{name}.png")
        mask.save(folder / f"masks/{name}.png")
    wide = Image.new("RGB", (400, 96))
    wide.save(photos / "outside.jpg")
    outside = np.zeros((96, 400), dtype=np.uint8)
    outside[:, :20] = OBJECT
    Image.fromarray(outside).save(folder / "masks/outside.png")
    paths[0].unlink()
    paths[1].write_bytes(b"no picture")
    black_and_white = Image.open(paths[2]).convert("1")
    black_and_white.save(paths[2])  # is as good as grey
    assert command(folder) == 0
    errors = {
        Path(row["file"]).stem: row.get("error", "") for row in rows_of(folder / "b").values()
    }
    wanted = "wanted: 255 on the object, 128 on pixels to be ignored and 0 on the background"
    expected = {
        "size": "its mask has 96 x 95 pixels; wanted: 96 x 96, the size of the photo",
        "empty": "its mask has no object; wanted: pixels of value 255",
        "ignored": "its mask has no object; wanted: pixels of value 255",
        "ones": f"its mask {folder}/masks/ones.png has the values 0, 1; {wanted}",
        "ramp": f"ramp.png has the values 0, 1, 2, 3, 4, 5, ...; {wanted}",
        "colours": "colours.png is of mode RGB; wanted: a grey picture of 8 bits, 255 on",
        "outside": "its mask has no object in the part of the photo that the model sees",
        paths[0].stem: f"its mask {paths[0]} is missing",
        paths[1].stem: f"its mask {paths[1]} cannot be read: UnidentifiedImageError",
        paths[2].stem: "",
        paths[3].stem: "",
    }
    assert errors.keys() == expected.keys()
    for name, message in expected.items():
        assert message in errors[name], name
        assert bool(message) == bool(errors[name])
    said = capsys.readouterr()
    assert "11 of 11 images finished, 9 of them failed" in said.out
    assert f"{paths[0].stem}.png: its mask {paths[0]} is missing" in said.err
    # Once there is a mask, the image is evaluated when asked to.
    shutil.copy(paths[3], paths[0])
    assert command(folder, "--retry-failed") == 0
    assert "11 of 11 images finished, 8 of them failed" in capsys.readouterr().out


def test_bad_folders_of_masks(folder, capsys):
    def says(message, *options, **places):
        assert command(folder, *options, **places) == 2
        assert message in capsys.readouterr().err
        assert not (folder / "b").exists()

    photos = folder / "photos"
    says(f"masks {folder}/nowhere is no folder", masks="nowhere")
    says(f"masks {photos} is inside the folder of the images", masks="photos")
    says(f"masks {folder}/masks go with a folder of images", "--data", "scenes")
    (folder / "empty").mkdir()
    first = sorted(photos.rglob("*.png"))[0].relative_to(photos)
    says(f"wanted: {folder}/empty/{first} for {first}", masks="empty")
    shutil.copy(photos / first, (photos / first).with_suffix(".jpg"))
    says(f"would both have the mask {folder}/masks/{first}")


# --- Runs that are resumed or combined


def test_other_masks_are_refused(folder, capsys):
    assert command(folder) == 0
    before = (folder / "b/rows-00000.jsonl").read_bytes()
    shutil.copytree(folder / "masks", folder / "moved")
    assert command(folder, masks="moved") == 0  # the same masks elsewhere
    shutil.copytree(folder / "masks", folder / "other")
    path = folder / "other" / mask_files(folder)[2].relative_to(folder / "masks")
    Image.fromarray(255 - np.array(Image.open(path))).save(path)
    assert command(folder, masks="other") == 2
    name = path.relative_to(folder / "other")
    assert f"{name} in {folder}/photos, or its mask, is not the picture" in capsys.readouterr().err
    path.unlink()
    assert command(folder, masks="other") == 2
    assert f"{name} in {folder}/photos, or its mask" in capsys.readouterr().err
    without = ["benchmark", "--model", "demo", "--data", str(folder / "photos")]
    without += ["--methods", "transformer_attribution", "--metrics", "deletion"]
    assert main([*without, "--output", str(folder / "b")]) == 2
    assert '"masks": ' in capsys.readouterr().err
    assert (folder / "b/rows-00000.jsonl").read_bytes() == before


def test_runs_with_other_masks_are_not_combined(folder):
    deletion = ["--metrics", "pointing_game,deletion"]
    assert command(folder, *deletion) == 0
    other = ["--methods", "center_gaussian"]
    assert command(folder, *deletion, *other, output="same") == 0
    for path in mask_files(folder):
        Image.fromarray(255 - np.array(Image.open(path))).save(path)
    assert command(folder, *deletion, *other, output="differs") == 0
    without = ["benchmark", "--model", "demo", "--data", str(folder / "photos"), *other]
    assert main([*without, "--metrics", "deletion", "--output", str(folder / "without")]) == 0
    runs = {name: read_results(folder / name) for name in ("b", "same", "differs", "without")}
    assert merge([runs["b"], runs["same"]]).settings.metrics == ["pointing_game", "deletion"]
    assert merge([runs["b"], runs["without"]]).settings.metrics == ["deletion"]
    for others in (["b"], ["without", "b"], ["b", "without"]):
        with pytest.raises(BenchmarkError, match="has one mask in one run and another in another"):
            merge([*(runs[name] for name in others), runs["differs"]])


# --- Only what the model gets right


def wrong_labels(folder):
    """Labels that the model predicts, except for the second image, whose name is returned."""
    images = sorted(
        path.relative_to(folder / "photos") for path in (folder / "photos").rglob("*.png")
    )
    predictions = {}
    assert command(folder, output="all") == 0
    for row in rows_of(folder / "all").values():
        predictions[row["file"]] = row["prediction"]
    lines = [
        f"{file},{(predictions[str(file)] + (place == 1)) % 10}"
        for place, file in enumerate(images)
    ]
    (folder / "labels.csv").write_text("\n".join(lines))
    return str(images[1])


def test_images_that_the_model_gets_wrong_are_skipped_and_counted(folder, capsys):
    wrong = wrong_labels(folder)
    options = ["--labels", str(folder / "labels.csv"), "--correct-only", "--batch-size", "3"]
    for _ in range(2):  # begun, and resumed
        assert command(folder, *options) == 0
        assert (
            "4 of 4 images finished, 0 of them failed, 1 skipped because the model does not "
            "predict their label" in capsys.readouterr().out
        )
    rows = rows_of(folder / "b")
    (skipped,) = [row for row in rows.values() if row.get("skipped")]
    assert skipped["file"] == wrong
    assert skipped["methods"] == {}
    everything = rows_of(folder / "all")
    for index, row in rows.items():
        if row is not skipped:
            assert row["methods"].keys() == everything[index]["methods"].keys()
    assert main(["report", str(folder / "b")]) == 0
    said = capsys.readouterr().out
    assert "1 image was skipped because the model does not predict the label" in said
    assert "Top-1 accuracy of the model: 75.0% of the 4 images" in said
    assert command(folder, *options[:2], *options[3:]) == 2
    assert "correct_only: true there, false now" in capsys.readouterr().err
    assert command(folder, *options[:2], output="wrong too") == 0
    with pytest.raises(BenchmarkError, match="correct_only is True in one run and False"):
        merge([read_results(folder / name) for name in ("b", "wrong too")])


def test_a_run_of_which_all_images_are_skipped_says_so(folder, capsys):
    wrong = wrong_labels(folder)
    label = next(
        line for line in (folder / "labels.csv").read_text().splitlines() if line.startswith(wrong)
    )
    (folder / "labels.csv").write_text(label)
    options = ["--labels", str(folder / "labels.csv"), "--correct-only"]
    assert command(folder, *options) == 2
    assert "1 of 1 images finished, 0 of them failed, 1 skipped" in capsys.readouterr().out
    assert main(["report", str(folder / "b")]) == 2
    assert "skipped because the model does not predict the label" in capsys.readouterr().err


def test_labels_have_to_be_known_to_skip_wrong_predictions(folder, capsys):
    for kind in ("photos", "masks"):
        for place, path in enumerate(sorted((folder / kind).glob("*/"))):
            path.rename(folder / kind / f"unknown{place}")
    assert command(folder, "--correct-only") == 2
    assert "--correct-only is given, and the classes of the images in" in capsys.readouterr().err
