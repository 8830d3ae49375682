"""The benchmark: its rows equal the metrics, survive anything, and bad input is refused."""

import contextlib
import io
import json
import multiprocessing
import os
import resource
import shutil
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from captum_reflected import TransformerAttribution, demo
from captum_reflected.attr.methods import METHODS
from captum_reflected.benchmark.data import choose, open_images
from captum_reflected.benchmark.rows import RowFile, are_others_writing, read_entries
from captum_reflected.benchmark.runner import run
from captum_reflected.benchmark.settings import Processes, Settings
from captum_reflected.cli.main import main
from captum_reflected.metrics import evaluate, insertion, relevance_mass_accuracy
from captum_reflected.models import load_model
from captum_reflected.report.results import read_results
from captum_reflected.report.tables import csv_table, means

QUICK = ["--methods", "raw_attention,transformer_attribution", "--metrics", "average_drop,deletion"]
SCENES = ["benchmark", "--preset", "scenes"]
TWO_SCENES = Settings(
    captum_reflected="0", model="demo", weights="", data={}, images=2,
    methods=["raw_attention"], metrics=["deletion"], target="label", precision="float32",
    batch_size=2, gallery=0,
)  # fmt: skip


def test_a_precision_is_stored_by_one_name():
    for name in ("bf16", "bfloat16", torch.bfloat16):
        assert replace(TWO_SCENES, precision=name).precision == "bf16"
    with pytest.raises(ValueError, match="precision is 'int8'; wanted: one of float32, bf16"):
        replace(TWO_SCENES, precision="int8")


@pytest.fixture(autouse=True)
def one_thread():
    """Rows are the same to the last bit where every process has as many threads."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def folder(tmp_path):
    """Four scenes as files, in folders named like their classes."""
    scenes = demo.load_scenes()
    for index in range(0, 8, 2):
        path = tmp_path / "photos" / demo.CLASS_NAMES[scenes.labels[index]] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(scenes.images[index].permute(1, 2, 0).numpy()).save(path)
    return tmp_path / "photos"


def rows_of(folder) -> dict[int, dict]:
    rows: dict[int, dict] = {}
    for entry in read_entries(Path(folder)):
        if entry is not None and entry["kind"] == "row":
            before = rows.get(entry["index"])
            if "error" not in entry or before is None or "error" in before:
                rows[entry["index"]] = entry
    return rows


# --- What the rows say


def test_rows_equal_the_metrics(tmp_path, capsys):
    arguments = [
        "--methods",
        "transformer_attribution",
        "--limit",
        "3",
        "--output",
        f"{tmp_path}/b",
    ]
    assert main([*SCENES, *arguments]) == 0
    rows = rows_of(tmp_path / "b")
    scenes, model = demo.load_scenes(), demo.load_model()
    indices = choose(20, 3)
    assert sorted(rows) == indices
    images = demo.preprocess(scenes.images[indices])
    labels = scenes.labels[indices]
    attributions = TransformerAttribution(model).attribute(images, labels)
    result = evaluate(model, images, attributions, target=labels)
    from_zero, curve = insertion(
        model, images, attributions, baselines=0, target=labels, return_curve=True
    )
    mass = relevance_mass_accuracy(attributions, masks=scenes.masks[indices])
    with torch.no_grad():
        predictions = model(images).argmax(dim=1)
    for place, index in enumerate(indices):
        row = rows[index]
        figures = row["methods"]["transformer_attribution"]
        assert row["label"] == row["target"] == labels[place]
        assert row["prediction"] == predictions[place]
        assert row["probability"] == pytest.approx(float(result.original[place]), abs=1e-5)
        for name in ("deletion", "insertion", "average_drop", "average_increase"):
            assert figures[name] == pytest.approx(float(getattr(result, name)[place]), abs=1e-5)
        assert figures["average_drop_normalized"] == pytest.approx(
            float(result.average_drop_normalized[place]), abs=1e-5
        )
        assert figures["insertion_zero"] == pytest.approx(float(from_zero[place]), abs=1e-5)
        assert figures["insertion_zero_curve"] == pytest.approx(curve[place].tolist(), abs=1e-5)
        assert figures["deletion_curve"] == pytest.approx(
            result.deletion_curve[place].tolist(), abs=1e-5
        )
        assert figures["relevance_mass_accuracy"] == pytest.approx(float(mass[place]), abs=1e-5)
    output = capsys.readouterr().out
    assert "3 images in" in output
    assert "images/s, 1 process(es) on cpu" in output


@pytest.mark.slow
def test_all_methods_on_photos(reference, tmp_path):
    """Labels from ImageNet's file names; every method and metric gives a finite figure."""
    model = ["--model", "deit_tiny_patch16_224"]
    model += ["--weights", str(reference / "deit_tiny_patch16_224.safetensors")]
    data = ["--data", str(reference / "photos"), "--limit", "1", "--target", "label"]
    methods = ["--methods", ",".join(name for name in METHODS if name != "reflected_relevance")]
    assert main(["benchmark", *model, *data, *methods, "--output", str(tmp_path / "b")]) == 0
    (row,) = rows_of(tmp_path / "b").values()
    assert row["file"].startswith("n01484850_great_white_shark")
    assert row["label"] == row["target"] == 2
    assert set(row["methods"]) == set(METHODS) - {"reflected_relevance"}
    for figures in row["methods"].values():
        assert np.isfinite(np.hstack(list(figures.values()))).all()


def test_labels_of_photos_are_those_of_the_reference(reference):
    weights = reference / "deit_tiny_patch16_224.safetensors"
    model = load_model("deit_tiny_patch16_224", weights=weights)
    known = {
        entry["file"]: entry["label"]
        for entry in json.loads((reference / "photos.json").read_text())
    }
    images = open_images(str(reference / "photos"), model)
    assert dict(zip(images.files, images.labels, strict=True)) == known


@pytest.mark.slow
def test_precision_is_used_and_named(tmp_path):
    common = [*SCENES, *QUICK, "--limit", "2"]
    assert main([*common, "--output", str(tmp_path / "full")]) == 0
    assert main([*common, "--output", str(tmp_path / "half"), "--precision", "bf16"]) == 0
    full, half = rows_of(tmp_path / "full"), rows_of(tmp_path / "half")
    assert full != half
    for index, row in full.items():
        assert row["probability"] == pytest.approx(half[index]["probability"], abs=0.02)
    assert (
        json.loads((tmp_path / "half/settings.json").read_text())["settings"]["precision"] == "bf16"
    )


def test_gallery_holds_pictures_and_maps(tmp_path):
    arguments = [*SCENES, *QUICK, "--limit", "3", "--gallery", "2", "--output", str(tmp_path)]
    assert main(arguments) == 0
    files = sorted((tmp_path / "gallery").iterdir())
    assert [file.name for file in files] == ["00000000.npz", "00000006.npz"]
    scenes = demo.load_scenes()
    with np.load(files[1]) as stored:
        assert stored["methods"].tolist() == ["raw_attention", "transformer_attribution"]
        assert stored["maps"].shape == (2, 96, 96)
        assert stored["picture"].shape == (96, 96, 3)
        difference = stored["picture"].astype(int) - scenes.images[6].permute(1, 2, 0).numpy()
        assert abs(difference).max() <= 1
        assert np.array_equal(stored["mask"], scenes.masks[6])
        assert str(stored["label"]) == demo.CLASS_NAMES[scenes.labels[6]]


def test_methods_with_options(tmp_path, capsys):
    methods = ["--methods", "mask_regression:forwards=9,mask_regression,transformer_attribution"]
    arguments = [*SCENES, *methods, "--metrics", "deletion", "--limit", "2", "--output"]
    assert main([*arguments, str(tmp_path / "b")]) == 0
    for row in rows_of(tmp_path / "b").values():
        assert list(row["methods"]) == methods[1].split(",")
        assert row["methods"]["mask_regression:forwards=9"] != row["methods"]["mask_regression"]
    assert main(["report", str(tmp_path / "b")]) == 0
    assert "MaskRegression (forwards=9)" in capsys.readouterr().out


# --- Data


def test_folders_named_like_classes_are_labels(folder):
    images = open_images(str(folder), load_model("demo"))
    assert [demo.CLASS_NAMES[label] for label in images.labels] == [
        file.split("/")[0] for file in images.files
    ]


def test_labels_from_a_file(folder, tmp_path):
    """Also of an image that is not there, which is read when its turn comes, and fails."""
    names = sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*.png"))
    first = names[0]
    (tmp_path / "labels.csv").write_text(
        f"image,class\n{first[:-4]},7 10 20 30 40\nmissing.png,3\n"
    )
    images = open_images(str(folder), load_model("demo"), labels=tmp_path / "labels.csv")
    assert dict(zip(images.files, images.labels, strict=True)) == {first: 7, "missing.png": 3}


def test_timm_datasets(folder, tmp_path):
    data = ["--data", "torch/image_folder", "--data-root", str(folder)]
    arguments = ["benchmark", "--model", "demo", *data, *QUICK, "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    rows = rows_of(tmp_path / "b")
    # The folders are named like the model's classes, whose numbers are not those of the folders.
    names = sorted(path.name for path in folder.iterdir())
    labels = [row["label"] for _, row in sorted(rows.items())]
    assert [demo.CLASS_NAMES[label] for label in labels] == names
    assert labels != [0, 1, 2, 3]
    assert rows[0]["file"] == "00000000"


def test_a_limit_is_spread_evenly():
    assert choose(50000, 4) == [0, 12500, 25000, 37500]
    assert choose(3, 9) == [0, 1, 2]


def test_halves_of_the_images_share_none(tmp_path):
    for half, indices in (("choosing", [0, 6, 12]), ("confirming", [1, 7, 13])):
        arguments = [*SCENES, *QUICK, "--half", half, "--limit", "3"]
        assert main([*arguments, "--output", str(tmp_path / half)]) == 0
        assert sorted(rows_of(tmp_path / half)) == indices


def test_the_same_data_by_another_path_goes_on(folder, tmp_path, capsys):
    (tmp_path / "link").symlink_to(folder)
    for data in (folder, tmp_path / "link"):
        arguments = ["--model", "demo", "--data", str(data), *QUICK]
        assert main(["benchmark", *arguments, "--output", str(tmp_path / "b")]) == 0
    assert "0 images in" in capsys.readouterr().out
    next(folder.rglob("*.png")).unlink()
    assert main(["benchmark", *arguments, "--output", str(tmp_path / "b")]) == 2
    assert "fingerprint" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("finished", [True, False])
@pytest.mark.parametrize("kind", ["folder", "timm"])
def test_pictures_that_were_replaced_under_their_names_are_refused(
    folder, tmp_path, capsys, kind, finished
):
    data = ["--data", str(folder)]
    if kind == "timm":
        data = ["--data", "torch/image_folder", "--data-root", str(folder)]
    arguments = ["benchmark", "--model", "demo", *data, *QUICK, "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    rows = tmp_path / "b/rows-00000.jsonl"
    if not finished:
        rows.write_bytes(b"".join(rows.read_bytes().splitlines(keepends=True)[:3]))
    before = rows.read_bytes()
    paths = sorted(folder.rglob("*.png"))
    place = next(iter(rows_of(tmp_path / "b")))
    path, name = paths[place], rows_of(tmp_path / "b")[place]["file"]
    content = path.read_bytes()
    shutil.copy(paths[place - 1], path)
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert f"{name} in " in error
    assert "is not the picture that its row in" in error
    assert "another --output for the new ones" in error
    assert rows.read_bytes() == before
    path.write_bytes(b"no picture at all")
    assert main(arguments) == 2
    assert f"{name} in " in capsys.readouterr().err
    # The same content again, of another time.
    path.write_bytes(content)
    assert main(arguments) == 0
    assert rows.read_bytes().startswith(before)
    assert len(rows_of(tmp_path / "b")) == 4


def test_files_that_were_not_touched_are_not_read_again(folder, tmp_path, monkeypatch):
    arguments = ["benchmark", "--model", "demo", "--data", str(folder), *QUICK]
    arguments += ["--output", str(tmp_path / "b")]
    assert main(arguments) == 0

    def read(path):
        raise AssertionError(path)

    monkeypatch.setattr("captum_reflected.benchmark.data.read_picture", read)
    assert main(arguments) == 0


def test_a_row_of_no_image_is_refused(tmp_path, capsys):
    arguments = [*SCENES, *QUICK, "--limit", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    with (tmp_path / "rows-00000.jsonl").open("a") as file:
        file.write('{"kind": "row", "index": 20, "file": "x", "methods": {}}\n')
    assert main(arguments) == 2
    assert "holds a row of image 20, and scenes has images 0 to 19" in capsys.readouterr().err


def test_the_readmes_first_command_goes_on(tmp_path, monkeypatch):
    """Its output has the name of the embedded scenes, and is not taken for them."""
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main([*SCENES, *QUICK, "--limit", "2", "--output", "scenes"]) == 0
    assert len(rows_of("scenes")) == 2


def test_unreadable_images_are_rows_too(folder, tmp_path, capsys):
    good = next(folder.rglob("*.png"))
    content = good.read_bytes()
    (folder / "cut.png").write_bytes(content[: len(content) // 2])
    (folder / "empty.jpg").write_bytes(b"")
    (folder / "text.jpeg").write_text("no picture")
    (folder / "dangling.png").symlink_to(folder / "nothing")
    (folder / "line\nbreak é.png").write_bytes(content)
    arguments = ["benchmark", "--model", "demo", "--data", str(folder), *QUICK]
    arguments += ["--batch-size", "3", "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    rows = rows_of(tmp_path / "b")
    errors = {row["file"]: row["error"] for row in rows.values() if "error" in row}
    assert set(errors) == {"cut.png", "empty.jpg", "text.jpeg"}
    assert "UnidentifiedImageError" in errors["text.jpeg"]
    assert "line\nbreak é.png" in {row["file"] for row in rows.values()}
    said = capsys.readouterr()
    assert "8 of 8 images finished, 3 of them failed" in said.out
    assert "failed: empty.jpg: UnidentifiedImageError" in said.err
    # Mended, they are evaluated when asked to.
    before = (tmp_path / "b/rows-00000.jsonl").read_bytes()
    (folder / "cut.png").write_bytes(content)
    assert main(arguments) == 0
    assert (tmp_path / "b/rows-00000.jsonl").read_bytes() == before
    assert main([*arguments, "--retry-failed"]) == 0
    rows = rows_of(tmp_path / "b")
    assert {row["file"] for row in rows.values() if "error" in row} == {"empty.jpg", "text.jpeg"}


def test_outputs_that_are_not_finite_are_named(tmp_path):
    weights = demo.load_model().state_dict()
    weights["head.weight"] = torch.full_like(weights["head.weight"], float("nan"))
    model = load_model("demo")
    model.model.load_state_dict(weights)
    images = open_images("scenes", model)
    progress = run(model, images, TWO_SCENES, tmp_path, Processes())
    assert (progress.finished, progress.failed) == (2, 2)
    assert {row["error"] for row in rows_of(tmp_path).values()} == {
        "the model's output is not finite"
    }


def test_outputs_for_parts_of_an_image_that_are_not_finite_fail_the_method(tmp_path):
    """Half precision may overflow on some of the versions that metrics make of an image."""
    model = load_model("demo")

    def overflow(module, inputs, output):
        is_blank = (inputs[0] == 0).flatten(1).all(dim=1, keepdim=True)
        return torch.where(is_blank, torch.nan, output)

    model.model.register_forward_hook(overflow)
    images = open_images("scenes", model)
    assert run(model, images, TWO_SCENES, tmp_path, Processes()).failed == 0
    for row in rows_of(tmp_path).values():
        reason = "the model's output for parts of the image is not finite"
        assert row["methods"] == {"raw_attention": {"error": reason}}


def test_a_run_without_any_result_fails(folder, tmp_path, capsys):
    for path in folder.rglob("*.png"):
        path.write_bytes(b"")
    arguments = ["benchmark", "--model", "demo", "--data", str(folder), *QUICK]
    assert main([*arguments, "--output", str(tmp_path / "b")]) == 2
    assert "4 of 4 images finished, 4 of them failed" in capsys.readouterr().out
    assert main(["report", str(tmp_path / "b")]) == 2
    assert "none of the 4 images" in capsys.readouterr().err


def test_a_run_is_reported(tmp_path, capsys):
    arguments = [*SCENES, *QUICK, "--limit", "4", "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    assert main(["report", str(tmp_path / "b")]) == 0
    said = capsys.readouterr().out
    rows = rows_of(tmp_path / "b").values()
    for name in ("raw_attention", "transformer_attribution"):
        mean = np.mean([row["methods"][name]["deletion"] for row in rows])
        assert f"{100 * mean:.2f}" in said
    page = (tmp_path / "b/report/report.html").read_text(encoding="utf-8")
    assert "TransformerAttribution" in page
    assert (tmp_path / "b/report/gallery.png").stat().st_size > 10_000


# --- Nothing is lost


def test_a_file_cut_anywhere_keeps_its_whole_rows(tmp_path):
    rows = [{"index": index, "value": "é" * index} for index in range(3)]
    with RowFile(tmp_path, 0, {"environment": {}}) as file:
        for row in rows:
            file.append([row])
    path = tmp_path / "rows-00000.jsonl"
    whole = path.read_bytes()
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        # A last line that lacks its line break alone is whole.
        complete = max(0, (whole[:size] + b"\n").count(b"}\n") - 1)
        assert sorted(rows_of(tmp_path)) == list(range(complete)), size
        with RowFile(tmp_path, 0, {"environment": {}}) as file:
            file.append(rows[complete:])
        assert [rows_of(tmp_path)[index]["value"] for index in range(3)] == ["", "é", "éé"]


def launch(arguments, rank, count):
    """One process of a run, in a process of its own."""
    signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in the background
    torch.set_num_threads(1)
    if count > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count),
        }  # fmt: skip
    with contextlib.redirect_stdout(io.StringIO()) as said:
        code = main(arguments)
    Path(f"{arguments[-1]}.{rank}.txt").write_text(said.getvalue())
    os._exit(code)


@pytest.fixture(scope="module")
def start():
    """Starts a run with a number of processes; imports are done once."""
    context = multiprocessing.get_context("forkserver")
    # The command imports these only where it needs them, which every process would do again.
    context.set_forkserver_preload(
        [
            __name__,
            "captum_reflected.cli.benchmark",
            "captum_reflected.benchmark.runner",
            "safetensors.torch",
            "timm",
            "torch._dynamo",
        ]
    )

    def start(arguments, count=1, ranks=None):
        processes = [
            context.Process(target=launch, args=(arguments, rank, count))
            for rank in ranks or range(count)
        ]
        for process in processes:
            process.start()
        return processes

    return start


def finish(processes) -> list[int]:
    for process in processes:
        process.join(120)
    return [process.exitcode for process in processes]


@pytest.mark.slow
def test_killed_at_any_moment_it_carries_on(start, tmp_path):
    """Thirty-two kills, one process and two in turn; the rows are those of undisturbed runs."""
    arguments = [*SCENES, *QUICK, "--metrics", "average_drop", "--gallery", "2", "--output"]
    for name in ("warm-up", "whole"):  # the first one waits for the imports
        began = time.monotonic()
        assert finish(start([*arguments, str(tmp_path / name)])) == [0]
        seconds = time.monotonic() - began
    random = np.random.default_rng(0)
    kills = runs = 0
    while kills < 32:
        folder = tmp_path / f"killed-{runs}"
        codes = [None]
        while set(codes) != {0}:
            processes = start([*arguments, str(folder)], count=1 + kills % 2)
            time.sleep(random.uniform(0, seconds))
            # Stopped first, so that none sees the end of another.
            for number in (signal.SIGSTOP, signal.SIGKILL):
                for process in processes:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(process.pid, number)
            codes = finish(processes)
            assert set(codes) <= {0, -signal.SIGKILL}
            kills += -signal.SIGKILL in codes
        assert_same_run(folder, tmp_path / "whole")
        runs += 1


def assert_same_run(folder, whole):
    """Every image exactly once, with the same figures and the same pictures."""
    assert rows_of(folder) == rows_of(whole)
    kinds = []
    for path in folder.glob("rows-*.jsonl"):
        for line in path.read_bytes().split(b"\n"):
            with contextlib.suppress(ValueError):  # torn
                kinds.append(json.loads(line)["kind"])
    assert kinds.count("row") == len(rows_of(whole)) == 20
    for file in (whole / "gallery").iterdir():
        with np.load(file) as expected, np.load(folder / "gallery" / file.name) as stored:
            assert np.array_equal(stored["maps"], expected["maps"])


def test_two_processes_give_the_rows_of_one(start, tmp_path):
    arguments = [*SCENES, *QUICK, "--limit", "7", "--batch-size", "2", "--output"]
    assert finish(start([*arguments, str(tmp_path / "one")])) == [0]
    assert finish(start([*arguments, str(tmp_path / "two")], count=2)) == [0, 0]
    assert rows_of(tmp_path / "one") == rows_of(tmp_path / "two")
    assert len(list((tmp_path / "two").glob("rows-*.jsonl"))) == 2


def test_readers_change_nothing(tmp_path):
    arguments = [*SCENES, *QUICK, "--limit", "5", "--output"]
    assert main([*arguments, str(tmp_path / "own")]) == 0
    assert main([*arguments, str(tmp_path / "read"), "--workers", "2"]) == 0
    assert rows_of(tmp_path / "own") == rows_of(tmp_path / "read")


def test_the_first_process_waits_for_the_others_and_counts_their_images(start, tmp_path):
    """Uneven shares: the second of two processes begins later, and has as many blocks."""
    arguments = [*SCENES, *QUICK, "--limit", "5", "--output", str(tmp_path / "b")]
    (first,) = start(arguments, count=2, ranks=[0])
    while len(rows_of(tmp_path / "b")) < 3:
        assert first.is_alive()
        time.sleep(0.05)
    time.sleep(1)
    assert first.is_alive()
    assert not are_others_writing(tmp_path / "b", 0)
    (second,) = start(arguments, count=2, ranks=[1])
    assert finish([first, second]) == [0, 0]
    said = [(tmp_path / f"b.{rank}.txt").read_text() for rank in range(2)]
    assert said[0].startswith("5 images in")
    assert "5 of 5 images finished, 0 of them failed" in said[0]
    assert said[1] == ""
    assert len((tmp_path / "b/rows-00001.jsonl").read_text().splitlines()) == 1 + 2


def test_a_process_that_never_comes_is_not_waited_for_without_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("captum_reflected.benchmark.runner.PATIENCE", 0.1)
    arguments = [*SCENES, *QUICK, "--limit", "5", "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    assert "3 of 5 images finished" in capsys.readouterr().out
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert main(arguments) == 0
    assert "2 images in" in capsys.readouterr().out
    assert len(rows_of(tmp_path / "b")) == 5


def test_nodes_that_do_not_share_the_folder(tmp_path, monkeypatch, capsys):
    """As the second node sees it: the first has begun, and there is nothing here."""
    monkeypatch.setattr("captum_reflected.benchmark.settings.PATIENCE", 0.1)
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main([*SCENES, *QUICK, "--output", str(tmp_path / "b")]) == 2
    assert "process 1 has not seen" in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_a_full_disk_is_said_and_rows_are_kept(tmp_path, capfd):
    arguments = [*SCENES, *QUICK, "--gallery", "0", "--output", str(tmp_path / "b")]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (5000, before[1]))
        assert main(arguments) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    error = capfd.readouterr().err
    assert "cannot write" in error
    assert "File too large" in error
    assert "run the same command again" in error
    kept = rows_of(tmp_path / "b")
    assert 0 < len(kept) < 20
    assert main(arguments) == 0
    assert rows_of(tmp_path / "b").items() >= kept.items()
    assert len(rows_of(tmp_path / "b")) == 20


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_it_says_what_is_kept(start, tmp_path, number):
    arguments = [*SCENES, *QUICK, "--output", str(tmp_path / "b")]
    (process,) = start(arguments)
    while not rows_of(tmp_path / "b"):
        assert process.is_alive()
        time.sleep(0.02)
    os.kill(process.pid, number)
    assert finish([process]) == [130]
    assert 0 < len(rows_of(tmp_path / "b")) < 20


def test_one_run_at_a_time_in_a_folder(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("captum_reflected.benchmark.rows.LOCK_TIMEOUT", 0.1)
    arguments = [*SCENES, *QUICK, "--limit", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    for rank in (0, 7):  # one of this start's files, and one of a start with more processes
        with RowFile(tmp_path, rank, {}):
            assert main(arguments) == 2
        assert "is being written by another process" in capsys.readouterr().err
    assert main(arguments) == 0


# --- Bad input


BAD = {
    "no model": (["--data", "scenes"], "--model is missing; wanted: --model, or a --preset"),
    "no data": (["--model", "demo"], "--data is missing"),
    "no data for the paper": (["--preset", "paper-table1"], "--data is missing"),
    "unknown model": (["--model", "vit_tiny", "--data", "scenes"], "unknown model 'vit_tiny'"),
    "weights of the demo": (
        ["--preset", "scenes", "--weights", "x.safetensors"], "has its own weights",
    ),
    "pickled weights": (
        ["--model", "deit_tiny_patch16_224", "--weights", "x.pth", "--data", "scenes"],
        "weights is x.pth; wanted: a .safetensors file",
    ),
    "classes of the demo": (
        ["--preset", "scenes", "--classes", "a,b"], "has classes of its own",
    ),
    "device": (["--preset", "scenes", "--device", "cuda:99"], "device 'cuda:99' cannot be used"),
    "data missing": (["--model", "demo", "--data", "nowhere"], "data 'nowhere' is no folder"),
    "data is a file": (["--model", "demo", "--data", __file__], "is no folder; wanted: a folder"),
    "stream": (["--model", "demo", "--data", "tfds/imagenet2012"], "without random access"),
    "timm without a root": (
        ["--model", "demo", "--data", "torch/image_folder"], "timm cannot open dataset",
    ),
    "timm unknown": (
        ["--model", "demo", "--data", "torch/none", "--data-root", "."],
        "Unknown torchvision dataset none",
    ),
    "labels of scenes": (
        ["--preset", "scenes", "--labels", "x.csv"], "go with a folder of images",
    ),
}  # fmt: skip


@pytest.mark.parametrize(("arguments", "message"), BAD.values(), ids=BAD)
def test_bad_arguments(arguments, message, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert main(["benchmark", *arguments]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("--preset", "table3"),
        ("--methods", "magic"),
        ("--methods", "all,reflected_relevance"),
        ("--methods", "mask_regression:forwards=none"),
        ("--methods", "attention_grad_cam:keep=4"),
        ("--methods", ""),
        ("--metrics", "accuracy"),
        ("--target", "auto"),
        ("--half", "odd"),
        ("--precision", "int8"),
        ("--limit", "0"),
        ("--limit", "many"),
        ("--batch-size", "0"),
        ("--workers", "-1"),
        ("--gallery", "1.5"),
    ],
)
def test_bad_values(option, value, capsys):
    with pytest.raises(SystemExit) as exit:
        main([*SCENES, option, value])
    assert exit.value.code == 2
    assert option in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (None, "cannot read the labels"),
        (b"a.png,\xff\xfe", "cannot read the labels"),
        (b"image,class\na.png,10\n", "line 2 of the labels"),
        (b"image,class\na.png,zebra\n", "one of the 10 classes of model 'demo'"),
        (b"image,class\na.png\n", "line 2 of the labels"),
        (b"a.png,1\na.png,1\n", "name 'a.png' twice"),
        (b"image,class\n", "holds no images"),
    ],
)
def test_bad_labels(folder, tmp_path, capsys, labels, message):
    path = tmp_path / "labels.csv"
    if labels is not None:
        path.write_bytes(labels)
    arguments = ["--model", "demo", "--data", str(folder), "--labels", str(path)]
    assert main(["benchmark", *arguments, "--output", str(tmp_path / "b")]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "b").exists()


def test_bad_folders(folder, tmp_path, capsys):
    def says(message, *arguments):
        assert main(["benchmark", "--model", "demo", *QUICK, *arguments]) == 2
        assert message in capsys.readouterr().err

    empty = tmp_path / "empty"
    empty.mkdir()
    says("holds no images; wanted: files that end in", "--data", str(empty))
    (empty / "notes.txt").write_text("no image")
    says("holds no images", "--data", str(empty))
    shutil.copy(next(folder.rglob("*.png")), empty / "0.png")
    says("the classes of the images in", "--data", str(empty), "--target", "label")
    says(
        "metrics pointing_game need masks of the objects, and data",
        "--data", str(empty), "--metrics", "pointing_game",
    )  # fmt: skip
    says("is inside the folder of the images", "--data", str(folder), "--output", str(folder / "b"))
    says("is a file; wanted: a folder", "--data", "scenes", "--output", str(empty / "0.png"))
    says("Not a directory", "--data", "scenes", "--output", str(empty / "0.png" / "b"))


def test_a_class_beyond_the_models_is_a_failed_row(tmp_path):
    """A dataset may tell an image's class only together with the image, and no names."""
    model = load_model("demo")
    scenes = open_images("scenes", model)

    def read(index):
        picture, _, content = scenes.read(index)
        return picture, 10 if index else 3, content

    progress = run(model, replace(scenes, read=read), TWO_SCENES, tmp_path, Processes())
    assert (progress.finished, progress.failed) == (2, 1)
    (error,) = [row["error"] for row in rows_of(tmp_path).values() if "error" in row]
    assert error == "its class 10 is none of the model's 10"


@pytest.mark.slow
def test_classes_of_a_dataset_that_are_not_the_models_are_not_known(tmp_path, capsys):
    """Its numbers count its own classes; taken for the model's they would be others."""
    for number in range(12):
        (tmp_path / f"data/{number:02d}").mkdir(parents=True)
        Image.new("RGB", (96, 96), (20 * number, 0, 0)).save(tmp_path / f"data/{number:02d}/0.png")
    data = ["--data", "torch/image_folder", "--data-root", str(tmp_path / "data")]
    arguments = ["benchmark", "--model", "demo", *data, *QUICK, "--output", str(tmp_path / "b")]
    assert main(arguments) == 0
    assert {row["label"] for row in rows_of(tmp_path / "b").values()} == {None}
    assert main([*arguments[:-1], str(tmp_path / "c"), "--target", "label"]) == 2
    assert {row["error"] for row in rows_of(tmp_path / "c").values()} == {"its class is not known"}
    shutil.rmtree(tmp_path / "data/11")
    shutil.rmtree(tmp_path / "data/10")
    assert main([*arguments[:-1], str(tmp_path / "d")]) == 0  # as many as the model has
    assert [rows_of(tmp_path / "d")[index]["label"] for index in range(10)] == list(range(10))


def test_other_settings_are_refused_and_shown(tmp_path, capsys):
    arguments = [*SCENES, "--limit", "2", "--output", str(tmp_path / "b")]
    assert main([*arguments, *QUICK]) == 0
    before = (tmp_path / "b/rows-00000.jsonl").read_bytes()
    changed = ["--methods", "raw_attention", "--metrics", "deletion", "--precision", "bf16"]
    assert main([*arguments, *changed, "--target", "predicted"]) == 2
    error = capsys.readouterr().err
    assert 'methods: ["raw_attention", "transformer_attribution"] there, ["raw_attention"]' in error
    assert 'precision: "float32" there, "bf16" now' in error
    assert 'target: "label" there, "predicted" now' in error
    assert (tmp_path / "b/rows-00000.jsonl").read_bytes() == before


def test_a_run_with_earlier_names_is_resumed_and_reported(tmp_path, capsys):
    """No row is computed twice, and all rows count for the methods as they are called now."""
    earlier = ["reflected:reflect=rows", "rollout", "grad_cam", "RawAttention"]
    now = [
        "reflected_relevance:reflect=rows",
        "attention_rollout",
        "attention_grad_cam",
        "raw_attention",
    ]
    common = [*SCENES, "--limit", "2", "--gallery", "1", "--metrics", "deletion"]
    common += ["--output", str(tmp_path)]
    assert main([*common, "--methods", ",".join(now)]) == 0
    expected = rows_of(tmp_path)
    assert all(list(row["methods"]) == now for row in expected.values())
    # As an earlier version left it, killed before the last image.
    settings, rows = tmp_path / "settings.json", tmp_path / "rows-00000.jsonl"
    for name, old in zip(now, earlier, strict=True):
        for file in (settings, rows):
            file.write_text(file.read_text().replace(f'"{name}"', f'"{old}"'))
    for file in (tmp_path / "gallery").iterdir():
        with np.load(file) as stored:
            arrays = dict(stored)
        np.savez(file, **arrays | {"methods": np.array(earlier)})
    first = "".join(rows.read_text().splitlines(keepends=True)[:2])  # after the header
    rows.write_text(first)
    capsys.readouterr()

    assert main([*common, "--methods", ",".join(earlier)]) == 0
    assert "1 images in" in capsys.readouterr().out
    assert rows.read_text().startswith(first)
    assert rows.read_text().count('"kind": "row"') == 2
    (last,) = [row for row in rows_of(tmp_path).values() if list(row["methods"]) == now]
    assert last == expected[last["index"]]
    assert main([*common, "--methods", ",".join(now)]) == 0
    assert "0 images in" in capsys.readouterr().out

    results = read_results(tmp_path)
    assert results.settings.methods == now
    for method in now:
        scores = [row["methods"][method]["deletion"] for _, row in sorted(expected.items())]
        assert results.scores(method, "deletion").tolist() == scores
    assert all(list(example.maps) == now for example in results.gallery)
    written = [line.partition(",")[0] for line in csv_table(means(results)).splitlines()]
    assert written == ["method", *now]


def test_other_weights_are_refused(tmp_path, capsys):
    torch.manual_seed(0)
    for name in ("one", "two"):
        model = timm.create_model("test_vit", num_classes=5)
        save_file(model.state_dict(), tmp_path / f"{name}.safetensors")
    common = ["benchmark", "--model", "test_vit", "--data", "scenes", "--limit", "1", *QUICK]
    common += ["--output", str(tmp_path / "b"), "--weights"]
    assert main([*common, str(tmp_path / "one.safetensors")]) == 0
    assert main([*common, str(tmp_path / "two.safetensors")]) == 2
    assert "  weights: " in capsys.readouterr().err


def test_a_model_that_a_method_does_not_suit(tmp_path, capsys):
    model = timm.create_model("test_resnet", num_classes=5)
    save_file(model.state_dict(), tmp_path / "resnet.safetensors")
    common = ["benchmark", "--model", "test_resnet", "--data", "scenes", "--limit", "1"]
    common += ["--weights", str(tmp_path / "resnet.safetensors"), "--output", str(tmp_path / "b")]
    assert main([*common, "--methods", "raw_attention"]) == 2
    assert "method 'raw_attention' does not suit model 'test_resnet'" in capsys.readouterr().err


def test_a_model_without_classes(tmp_path, capsys):
    model = timm.create_model("test_vit", num_classes=1)
    save_file(model.state_dict(), tmp_path / "one.safetensors")
    common = ["benchmark", "--model", "test_vit", "--data", "scenes"]
    assert main([*common, "--weights", str(tmp_path / "one.safetensors")]) == 2
    assert "model 'test_vit' has 1 classes; wanted: a classifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("settings.json", "{", "does not hold a benchmark's settings"),
        ("settings.json", "[]", "does not hold a benchmark's settings"),
        ("settings.json", '{"version": 2, "settings": {}}', "is of version 2; wanted: version 1"),
        ("rows-00000.jsonl", "", "holds rows and no settings.json"),
    ],
)
def test_damaged_folders_are_refused(tmp_path, capsys, file, content, message):
    (tmp_path / file).write_text(content)
    assert main([*SCENES, *QUICK, "--output", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err


def test_rows_of_another_version_are_refused(tmp_path, capsys):
    arguments = [*SCENES, *QUICK, "--limit", "1", "--output", str(tmp_path)]
    assert main(arguments) == 0
    (tmp_path / "rows-00001.jsonl").write_text('{"kind": "header", "version": 9}\n')
    assert main(arguments) == 2
    assert "is of version 9; wanted: version 1" in capsys.readouterr().err
