"""The command, run as a user runs it."""

import io
import json
import os
import re
import resource
import shutil
import subprocess
import sys
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from captum_reflected import __version__, demo
from captum_reflected._writing import write_whole
from captum_reflected.attr.methods import METHODS, QUALITIES
from captum_reflected.benchmark import data, settings
from captum_reflected.cli import names
from captum_reflected.cli.main import _COMMANDS, main
from captum_reflected.cli.photo_files import find_photos, result_names
from captum_reflected.cli.targets import find_classes
from captum_reflected.errors import UsageError
from captum_reflected.metrics.registry import METRICS
from captum_reflected.models import DEFAULT_TEMPLATES, DEMO_MODEL, load_model
from captum_reflected.models.fitting import FITS
from captum_reflected.visualization.overlay import HEAT_COLORS, OPACITY

SCENES = sorted(
    path
    for path in (Path(demo.__file__).parent / "scenes").glob("*.png")
    if not path.name.endswith(".mask.png")
)


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def only(folder, pattern):
    (path,) = folder.glob(pattern)
    return path


def test_installed_command_teaches():
    command = shutil.which("captum-reflected")
    command = [command] if command else [sys.executable, "-m", "captum_reflected"]
    helped = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
    assert "captum-reflected demo" in helped.stdout
    assert "captum-reflected explain photo.jpg" in helped.stdout
    version = subprocess.run([*command, "--version"], capture_output=True, text=True, check=True)
    assert version.stdout.split()[-1] == __version__


@pytest.mark.slow
def test_demo_writes_a_figure_and_says_how_much_falls_on_the_object(capsys, tmp_path):
    figure = tmp_path / "new" / "demo.png"
    code, out, _ = run(capsys, "demo", "--output", figure)
    assert code == 0
    shares = {
        line.split("  ")[1].strip(): float(line.split()[-1].rstrip("%"))
        for line in out.splitlines()
        if line.endswith("%")
    }
    assert list(shares) == [
        "BalancedRelevance",
        "MaskRegression",
        "TransformerAttribution",
        "ReflectedRelevance",
        "IntegratedGradients",
        "(area of the object)",
    ]
    area = shares["(area of the object)"]
    assert 5 < area < 20
    assert shares["BalancedRelevance"] > shares["TransformerAttribution"] > 1.5 * area
    assert shares["MaskRegression"] > 1.5 * area
    assert shares["ReflectedRelevance"] > 1.5 * area
    assert shares["TransformerAttribution"] > 1.5 * area
    assert np.asarray(Image.open(figure)).std() > 10


@pytest.mark.parametrize("method", METHODS)
def test_explain_scenes(capsys, tmp_path, method):
    code, out, _ = run(
        capsys, "explain", *SCENES[:3], "--model", "demo", "--method", method,
        "--output", tmp_path, "--batch-size", 2,
    )  # fmt: skip
    assert code == 0
    for scene in SCENES[:3]:
        heat = np.load(only(tmp_path, f"{scene.stem}.*.{method}.npy"))
        assert heat.shape == (96, 96)
        assert heat.dtype == np.float32
        assert heat.max() > heat.min()
        picture = np.asarray(Image.open(only(tmp_path, f"{scene.stem}.*.{method}.png")))
        assert picture.std() > 10
        overlay = Image.open(only(tmp_path, f"{scene.stem}.*.{method}.overlay.png"))
        assert overlay.size == Image.open(scene).size
        assert str(scene) in out
    assert len(re.findall(r"^ +\d+\.\d%  [a-z ]+ \(\d\)$", out, re.MULTILINE)) == 15


def test_files_hold_the_key_however_a_method_is_written(capsys, tmp_path):
    code, _, _ = run(
        capsys, "explain", SCENES[0], "--model", "demo", "--output", tmp_path,
        "--method", "rollout,RawAttention,attention_rollout,reflected:reflect=rows",
    )  # fmt: skip
    assert code == 0
    keys = ["attention_rollout", "raw_attention", "reflected_relevance.reflect=rows"]
    written = {".".join(path.name.split(".")[2:]) for path in tmp_path.iterdir()}
    assert written == {
        f"{'+'.join(keys)}.png",
        *(f"{key}.{end}" for key in keys for end in ("overlay.png", "npy")),
    }


def test_target_by_number_and_by_name(capsys, tmp_path):
    heats = []
    for target in ("5", demo.CLASS_NAMES[5].upper(), "auto"):
        code, out, _ = run(
            capsys, "explain", SCENES[0], "--model", "demo", "--target", target,
            "--output", tmp_path / target,
        )  # fmt: skip
        assert code == 0
        folder = tmp_path / target
        heats.append(np.load(only(folder, f"{SCENES[0].stem}.*.mask_regression.npy")))
        if target != "auto":
            assert f"explained: {demo.CLASS_NAMES[5]}" in out
    assert np.array_equal(heats[0], heats[1])
    assert not np.array_equal(heats[0], heats[2])


def test_broken_images_are_named_and_the_others_done(capsys, tmp_path):
    broken = tmp_path / "broken.jpg"
    broken.write_bytes(b"no image")
    cut = tmp_path / "cut.png"
    cut.write_bytes(SCENES[0].read_bytes()[:500])
    missing = tmp_path / "missing.jpg"
    code, out, err = run(
        capsys, "explain", broken, missing, SCENES[0], cut, "--model", "demo",
        "--method", "transformer_attribution", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 2
    for path in (broken, missing, cut):
        assert (
            len(
                re.findall(
                    rf"^captum-reflected: cannot read {re.escape(str(path))}: ", err, re.MULTILINE
                )
            )
            == 1
        )
    assert "Traceback" not in err
    assert only(tmp_path / "out", f"{SCENES[0].stem}.*.npy").is_file()
    assert str(SCENES[0]) in out


def test_grey_transparent_and_rotated_images(capsys, tmp_path):
    picture = Image.open(SCENES[0])
    picture.convert("L").save(tmp_path / "grey.png")
    picture.convert("RGBA").save(tmp_path / "alpha.png")
    turned = picture.rotate(90, expand=True)
    exif = Image.Exif()
    exif[0x0112] = 6  # shown turned by 90 degrees clockwise
    turned.save(tmp_path / "turned.png", exif=exif)
    code, _, _ = run(
        capsys, "explain", *(tmp_path / f"{name}.png" for name in ("grey", "alpha", "turned")),
        SCENES[0], "--model", "demo", "--method", "transformer_attribution", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    upright = np.load(only(tmp_path, f"{SCENES[0].stem}.*.npy"))
    for name in ("alpha", "turned"):
        heat = np.load(only(tmp_path, f"{name}.*.npy"))
        np.testing.assert_allclose(heat, upright, rtol=1e-4, atol=1e-6)


def test_16_bit_images_are_not_clipped_to_white(capsys, tmp_path):
    grey = np.asarray(Image.open(SCENES[0]).convert("L"))
    Image.fromarray(grey).save(tmp_path / "eight.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    code, _, _ = run(
        capsys, "explain", tmp_path / "eight.png", tmp_path / "sixteen.png", "--model", "demo",
        "--method", "transformer_attribution", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    eight, sixteen = (np.load(only(tmp_path, f"{name}.*.npy")) for name in ("eight", "sixteen"))
    np.testing.assert_allclose(sixteen, eight, rtol=1e-4, atol=1e-6)


def test_images_that_no_model_can_see(capsys, tmp_path):
    Image.new("L", (5000, 1)).save(tmp_path / "thin.png")
    Image.new("F", (50, 50)).save(tmp_path / "float.tiff")
    code, _, err = run(
        capsys, "explain", tmp_path / "thin.png", tmp_path / "float.tiff", "--model", "demo",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 2
    assert "thin.png: it is 5000 x 1 pixels; wanted: sides of at most 100 to 1" in err
    assert "float.tiff: its pixels are of mode F; wanted: 8 or 16 bits per channel" in err


@pytest.mark.slow
def test_names_that_the_terminal_cannot_spell(tmp_path):
    photo = tmp_path / "h\u00e4nd.png"
    shutil.copy(SCENES[0], photo)
    done = subprocess.run(
        [sys.executable, "-m", "captum_reflected", "explain", str(photo), "--model", "demo",
         "--method", "transformer_attribution", "--output", str(tmp_path)],
        env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "h\\xe4nd.png" in done.stdout


def test_images_of_one_name_do_not_overwrite_each_other(capsys, tmp_path):
    other = tmp_path / SCENES[0].name
    shutil.copy(SCENES[1], other)
    code, _, _ = run(
        capsys, "explain", SCENES[0], other, "--model", "demo",
        "--method", "transformer_attribution", "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0
    assert len(list((tmp_path / "out").glob("*.npy"))) == 2


def test_names_of_results_never_collide():
    """Folders are in the names where they have to be; case alone is no difference."""
    paths = [Path("a/Cat.png"), Path("b/cat.png"), Path("dog.png")]
    assert result_names(paths) == ["a_Cat", "b_cat", "dog"]
    paths = [Path("x/a/cat.png"), Path("y/a/cat.png"), Path("z/b/cat.png")]
    assert result_names(paths) == ["x_a_cat", "y_a_cat", "b_cat"]
    assert result_names([Path("cat.png"), Path("cat.jpg")]) == ["cat-png", "cat-jpg"]
    paths = [Path("a_b/c.png"), Path("a/b_c.png"), Path("b/c.png"), Path("b_c.png")]
    names = result_names(paths)
    assert len({name.casefold() for name in names}) == len(names)


EXPLAIN = ["--model", "demo", "--method", "transformer_attribution"]


def test_a_name_too_long_drops_that_image_alone(capsys, tmp_path):
    """Its file can be read; that of its map would be longer than the system allows."""
    photo = tmp_path / f"{'n' * 250}.png"
    shutil.copy(SCENES[1], photo)
    code, out, err = run(
        capsys, "explain", SCENES[0], photo, SCENES[2], *EXPLAIN, "--output", tmp_path / "out"
    )
    assert code == 2
    assert f"captum-reflected: cannot write the map of {photo}: [Errno 36] File name too" in err
    assert str(photo) not in out
    files = [path.name for path in (tmp_path / "out").iterdir()]
    assert len(files) == 2 * 3
    assert all(name.startswith((SCENES[0].stem, SCENES[2].stem)) for name in files)


def test_a_number_is_a_class_of_this_number(tmp_path):
    """Not one whose name is a number, unless there is no such class."""
    loaded = load_model("demo", class_names=["3", "2", "1", "0", "2008", *"56789"])
    for text, classes in (
        ("3", [3]), ("3,1", [3, 1]), ("2008", [4]), ("0,2008", [0, 4]), ("03", [3])
    ):  # fmt: skip
        assert find_classes(text, loaded) == classes
    for text in ("2009", "-1", "200"):
        with pytest.raises(UsageError, match="is out of range"):
            find_classes(text, loaded)


@contextmanager
def small_disk():
    """Files larger than 5000 bytes cannot be written, as where a disk is full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_said_with_the_path_and_leaves_nothing_half(capsys, tmp_path):
    out = tmp_path / "out"
    with small_disk():
        code, _, err = run(capsys, "explain", SCENES[0], *EXPLAIN, "--output", out)
    assert code == 2
    wanted = rf"File too large: '{re.escape(str(out / SCENES[0].stem))}\..*png'"
    assert re.search(wanted, err)
    assert list(out.iterdir()) == []


def test_what_was_there_stays_where_the_disk_is_full(tmp_path):
    path = tmp_path / "map.png"
    path.write_bytes(b"before")
    with small_disk(), pytest.raises(OSError, match=r"File too large: .*map\.png"):
        write_whole(path, bytes(6000))
    assert [file.read_bytes() for file in tmp_path.iterdir()] == [b"before"]


def test_files_are_written_through_links_and_to_devices(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    write_whole(tmp_path / "link", b"new")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "file").read_bytes() == b"new"
    device = Path("/dev/full")
    if device.exists():
        with pytest.raises(OSError, match="No space left on device: '/dev/full'"):
            write_whole(device, b"x")
        assert not device.is_file()


def test_outputs_that_are_not_finite_are_no_maps(capsys, tmp_path, monkeypatch):
    loaded = load_model("demo")
    torch.nn.init.constant_(loaded.model.head.bias, float("nan"))
    monkeypatch.setattr("captum_reflected.cli.run_explain.load_from", lambda *_: loaded)
    code, out, err = run(
        capsys, "explain", SCENES[0], "--model", "demo", "--method", "raw_attention",
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 2
    assert f"no map of {SCENES[0]}: the model's output holds NaN or infinite values" in err
    assert "explained:" not in out
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["--model", "vit_tinny_patch16_224"],
            r"unknown model 'vit_tinny_.*did you mean vit_tiny_",
        ),
        (["--model", "demo", "--weights", "fake.safetensors"], r"has its own weights"),
        (
            ["--class-names", "no.txt"],
            r"cannot read the class names no\.txt: there is no such file",
        ),
        (["--weights", "no.safetensors"], r"no\.safetensors does not exist"),
        (["--weights", "weights.bin"], r"weights is weights\.bin; wanted: a \.safetensors file"),
        (["--weights", "fake.safetensors"], r"is not a safetensors file"),
        (["--model", "demo", "--target", "10"], r"target 10 is out of range.*classes 0 to 9"),
        (["--model", "demo", "--target", "cat"], r"target 'cat' names 0 of the 10 classes"),
        (["--model", "demo", "--target", "diagonals"], r"names 2 of the 10 classes.*rising"),
        (["--model", "demo", "--target", " "], r"target is blank"),
        (["--model", "demo", "--target", "9" * 5000], r"is out of range"),
        (["--model", "demo", "--device", "meta"], r"device 'meta' cannot be used"),
        (["--model", "demo", "--device", "toaster"], r"device 'toaster' cannot be used"),
        (
            ["--model", "demo", "--output", "fake.safetensors"],
            r"output fake\.safetensors cannot be a folder, since fake\.safetensors is a file",
        ),
        (["--model", "demo", "--output", "weights.bin/a/b"], r"since .*weights\.bin is a file"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_bad_arguments_are_one_clear_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "fake.safetensors").write_bytes(b"nothing")
    (tmp_path / "weights.bin").write_bytes(b"nothing")
    code, _, err = run(capsys, "explain", SCENES[0], *arguments)
    assert code == 2
    (line,) = [line for line in err.splitlines() if line.startswith("captum-reflected:")]
    assert re.search(message, line)
    assert "Traceback" not in err


def test_folders_and_patterns(capsys, tmp_path):
    photos = tmp_path / "photos"
    (photos / "inside").mkdir(parents=True)
    for scene, name in zip(SCENES, ("a.png", "b.png", "inside/c.png"), strict=False):
        shutil.copy(scene, photos / name)
    (photos / "notes.txt").write_text("no image")
    out = tmp_path / "out"
    code, printed, _ = run(capsys, "explain", photos, *EXPLAIN, "--output", out)
    assert code == 0
    assert {path.name[0] for path in out.iterdir()} == {"a", "b"}
    assert "2 images in" in printed
    code, printed, _ = run(capsys, "explain", photos / "**/*.png", *EXPLAIN, "--output", out)
    assert code == 0
    assert {path.name[0] for path in out.iterdir()} == {"a", "b", "c"}
    assert printed.count(" (replaced)") == 2 * 3
    for text, message in (
        ("", "image is ''; wanted: a file, a folder or a pattern"),
        (tmp_path / "*.jpg", "no file fits the pattern"),
        (out / "none", None),
        (tmp_path, "holds no image; wanted: images directly inside"),
    ):
        code, _, err = run(capsys, "explain", text, *EXPLAIN, "--output", out)
        assert code == 2
        assert message is None or message in err


@pytest.mark.parametrize("words", [["demo"], ["speed", "--random-weights"]])
def test_an_output_that_cannot_be_written_is_said_before_any_work(
    capsys, tmp_path, monkeypatch, words
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "file").write_text("not a folder")
    for output, message in (
        ("folder.png", "the output folder.png is a folder; wanted: a file"),
        ("file/a.png", "the output file cannot be a folder, since file is a file"),
    ):
        code, out, err = run(capsys, *words, "--output", output)
        assert (code, out) == (2, "")
        assert message in err
    assert (tmp_path / "file").read_text() == "not a folder"


def test_a_closed_output_is_said(capsys, tmp_path, monkeypatch):
    """As by ``| head -1``: the error names no system call."""
    reading, writing = os.pipe()
    os.close(reading)
    with monkeypatch.context() as patch, os.fdopen(writing, "wb", buffering=0) as closed:
        patch.setattr(sys, "stdout", io.TextIOWrapper(closed, write_through=True))
        code, _, err = run(capsys, "explain", *SCENES[:2], *EXPLAIN, "--output", tmp_path)
        sys.stdout.detach()
    assert code == 2
    assert "captum-reflected: stopped, since its output was closed; files already" in err
    assert len(list(tmp_path.iterdir())) == 3


def test_one_file_by_several_paths_is_one_photo(tmp_path, monkeypatch):
    """And no path gives the results a hidden name."""
    for folder in ("a/x", "x", "y"):
        (tmp_path / folder).mkdir(parents=True)
    for file in ("x/1.png", "a/x/1.png", "y/2.png"):
        shutil.copy(SCENES[0], tmp_path / file)
    (tmp_path / "y" / "3.png").symlink_to("2.png")
    (tmp_path / "y" / "lost.png").symlink_to("nowhere.png")
    monkeypatch.chdir(tmp_path / "a")
    found = find_photos(["../y", "../y/2.png", "x/../../y/2.png", "../x/1.png", "x/1.png"])
    paths = ["../y/2.png", "../y/3.png", "../y/lost.png", "../x/1.png", "x/1.png"]
    assert [str(path) for path in found] == paths
    assert result_names(found)[:3] == ["2", "3", "lost"]
    assert result_names(found)[3:] == [f"{tmp_path.name}_x_1", "a_x_1"]
    # A link that leads elsewhere is another place.
    (tmp_path / "a" / "link").symlink_to(tmp_path / "y")
    assert len(find_photos(["link/../x/1.png", "x/1.png"])) == 2


def test_several_targets_and_methods_are_one_figure(capsys, tmp_path):
    methods = "transformer_attribution,raw_attention,mask_regression:forwards=9"
    code, printed, _ = run(
        capsys, "explain", SCENES[0], "--model", "demo", "--top", 2, "--method", methods,
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    assert len(list(tmp_path.glob("*.npy"))) == len(list(tmp_path.glob("*.overlay.png"))) == 6
    assert len(list(tmp_path.glob("*.png"))) == 7
    assert "and beside it 12 files of single maps" in printed
    code, printed, _ = run(
        capsys, "explain", SCENES[0], "--model", "demo", "--target", "rings, 3,zigzag", "--method",
        methods, "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    stem = "transformer_attribution+raw_attention+mask_regression.forwards=9"
    assert only(tmp_path, f"*.6+3+9.{stem}.png").is_file()
    explained = re.findall(r"explained: (.*) \(\d\), +\d+\.\d%", printed)
    assert explained == ["rings", "falling diagonals", "zigzag"]


def test_the_whole_photo_or_its_centre(capsys, tmp_path):
    """A wide photo is cropped, which is said; padded and squashed, it is seen as a whole."""
    wide = tmp_path / "wide.png"
    Image.open(SCENES[0]).resize((240, 96)).save(wide)
    maps = {}
    for fit in ("crop", "pad", "squash"):
        out = tmp_path / fit
        code, printed, _ = run(capsys, "explain", wide, *EXPLAIN, "--fit", fit, "--output", out)
        assert code == 0
        assert ("the model sees 40% of this photo" in printed) == (fit == "crop")
        assert Image.open(only(out, "*.overlay.png")).size == (240, 96)
        maps[fit] = np.load(only(out, "*.npy"))
    assert not np.array_equal(maps["pad"], maps["squash"])


def test_a_photo_that_cannot_be_fitted_drops_that_photo_alone(capsys, tmp_path):
    Image.new("RGB", (1, 1)).save(tmp_path / "dot.png")
    out = tmp_path / "out"
    code, printed, err = run(
        capsys, "explain", SCENES[0], tmp_path / "dot.png", *EXPLAIN, "--output", out
    )
    assert code == 2
    assert f"cannot fit {tmp_path / 'dot.png'}: where the model sees this photo of 1 pixels" in err
    assert str(SCENES[0]) in printed
    assert len(list(out.glob("*.npy"))) == 1


def test_style_of_the_overlay(capsys, tmp_path):
    pictures = []
    for options in ([], ["--alpha", "0"], ["--cmap", "viridis"]):
        out = tmp_path / str(len(pictures))
        code, _, _ = run(capsys, "explain", SCENES[0], *EXPLAIN, *options, "--output", out)
        assert code == 0
        pictures.append(np.asarray(Image.open(only(out, "*.overlay.png"))))
    assert np.array_equal(pictures[1], np.asarray(Image.open(SCENES[0]).convert("RGB")))
    assert not np.array_equal(pictures[0], pictures[2])
    code, _, err = run(capsys, "explain", SCENES[0], *EXPLAIN, "--cmap", "infern")
    assert code == 2
    assert "cmap is 'infern'; wanted: a colour map of matplotlib" in err


def test_class_names_of_a_fine_tuned_model(capsys, tmp_path):
    names = tmp_path / "names.txt"
    names.write_text("".join(f"kind {letter}\n" for letter in "abcdefghij"))
    code, out, err = run(
        capsys, "explain", SCENES[0], *EXPLAIN, "--class-names", names, "--target", "kind c",
        "--output", tmp_path / "out",
    )  # fmt: skip
    assert code == 0, err
    assert "explained: kind c" in out
    assert only(tmp_path / "out", "*.2-kind-c.*.npy").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["explian", "x"], "unknown command 'explian'.*did you mean explain"),
        (["explain", "x", "--tagret", "3"], "unknown arguments: --tagret 3; did you mean --target"),
        (["explain", "x", "--method", "reflectd"], "did you mean reflected_relevance"),
        (["explain", "x", "--method", "reflected_relevance:reflct=rows"], "did you mean reflect"),
        (
            ["explain", "x", "--method", "mask_regression:forwards=9,precision=bf16"],
            "wanted: a colon between options, mask_regression:forwards=9:precision=bf16",
        ),
        (["explain", "x", "--top", "2", "--target", "3"], "not allowed with argument"),
        (["explain", "x", "--alpha", "2"], "'2' is not a number from 0 to 1"),
        (["benchmark", "--metrics", "deltion"], "did you mean deletion"),
    ],
)
def test_what_may_have_been_meant(capsys, words, message):
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 2
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize("command", [[], *([name] for name in _COMMANDS)])
def test_help_needs_no_torch(command):
    """It takes seconds to import."""
    code = (
        "import sys\nfrom captum_reflected.cli.main import main\n"
        f"try: main({[*command, '--help']!r})\nexcept SystemExit: pass\n"
        "assert not {'torch', 'numpy', 'matplotlib'} & {*sys.modules}"
    )
    subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)


def test_the_names_that_help_lists_are_the_registries():
    assert list(names.METHOD_NAMES) == list(METHODS)
    assert list(names.QUALITY_NAMES) == list(QUALITIES)
    assert names.FIT_NAMES == FITS
    assert list(names.METRIC_NAMES) == list(METRICS)
    assert [name for name in METRICS if METRICS[name].needs_masks] == [*names.METRICS_WITH_MASKS]
    assert names.TARGET_NAMES == settings.TARGETS
    assert names.HALF_NAMES == data.HALVES
    assert names.PRECISION_NAMES == settings.PRECISIONS
    assert (names.DEMO_MODEL, names.SCENES) == (DEMO_MODEL, data.SCENES)
    assert (names.DEFAULT_TEMPLATE,) == DEFAULT_TEMPLATES
    assert (names.DEFAULT_CMAP, names.DEFAULT_ALPHA) == (HEAT_COLORS, OPACITY)


def test_demo_writes_png_only(capsys, tmp_path):
    code, _, err = run(capsys, "demo", "--output", tmp_path / "demo.txt")
    assert code == 2
    assert "demo.txt; wanted: a file that ends in .png" in err


@pytest.mark.parametrize(
    "arguments", [["--batch-size", "0"], ["--batch-size", "x"], ["--method", "magic"], []]
)
def test_usage_errors(capsys, arguments):
    with pytest.raises(SystemExit) as stopped:
        main(["explain", *(["photo.jpg"] if arguments else []), *arguments])
    assert stopped.value.code == 2
    assert "usage: captum-reflected explain" in capsys.readouterr().err


def test_a_model_that_cannot_be_explained(capsys, tmp_path):
    import timm

    weights = tmp_path / "resnet.safetensors"
    save_file(timm.create_model("resnet18").state_dict(), weights)
    code, _, err = run(
        capsys, "explain", SCENES[0], "--model", "resnet18", "--weights", weights,
        "--output", tmp_path,
    )  # fmt: skip
    assert code == 2
    assert "no self-attention was seen" in err


def test_real_photos_with_local_weights(capsys, tmp_path, reference):
    """The predictions are the recorded ones, and the pictures are written."""
    entries = json.loads((reference / "images.json").read_text())[:3]
    code, out, _ = run(
        capsys, "explain", *(reference / "images" / entry["file"] for entry in entries),
        "--model", "deit_tiny_patch16_224",
        "--weights", reference / "deit_tiny_patch16_224.safetensors",
        "--method", "transformer_attribution", "--output", tmp_path,
    )  # fmt: skip
    assert code == 0
    reports = out.split(str(reference / "images"))[1:]
    for entry, report in zip(entries, reports, strict=True):
        first = report.splitlines()[1]
        assert first.endswith(f"({entry['prediction']})")
        assert abs(float(first.split("%")[0]) - 100 * entry["probability"]) < 0.1
        stem = entry["file"].rsplit(".", 1)[0]
        assert np.load(only(tmp_path, f"{stem}.*.npy")).shape == (224, 224)
