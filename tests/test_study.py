"""The study: runs put together, images divided, costs counted."""

import numpy as np
import pytest
from conftest import make_vit
from study import costs, halves, main, merge
from test_report import METHODS, make_rows, write_folder

from captum_reflected.errors import BenchmarkError
from captum_reflected.metrics import mean_interval
from captum_reflected.report.results import read_results

DEMO = {"model": "demo"}


def write_two(folder, **settings):
    first = write_folder(folder / "a", make_rows(12), **DEMO)
    rows = make_rows(9, methods=("attention_rollout", "reflected_relevance"), seed=1)
    second = write_folder(
        folder / "b", rows, methods=("attention_rollout", "reflected_relevance"), **DEMO | settings
    )
    return first, second


def test_runs_are_put_together_image_by_image(tmp_path):
    runs = [read_results(folder) for folder in write_two(tmp_path)]
    merged = merge(runs)
    assert merged.settings.methods == [*METHODS, "attention_rollout"]
    assert len(merged.rows) == 12
    later = runs[1].scores("reflected_relevance", "deletion")
    np.testing.assert_array_equal(merged.scores("reflected_relevance", "deletion")[:9], later)
    assert np.isnan(merged.scores("attention_rollout", "deletion")[9:]).all()
    kept = merged.scores("attention_grad_cam", "deletion")
    np.testing.assert_array_equal(kept, runs[0].scores("attention_grad_cam", "deletion"))


def test_all_images_as_one_set(tmp_path, capsys):
    folder = write_folder(tmp_path, make_rows(20), **DEMO)
    assert main([str(folder), "--no-costs", "--half", "all"]) == 0
    text = capsys.readouterr().out
    assert "demo, 20 images. " in text
    assert "for confirming" not in text


def test_no_image_is_in_both_halves(tmp_path):
    run = read_results(write_folder(tmp_path, make_rows(7)))
    choosing, confirming = halves(run).values()
    assert [row.index for row in choosing.rows] == [0, 2, 4, 6]
    assert [row.index for row in confirming.rows] == [1, 3, 5]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"model": "vit_base_patch16_224"}, "model is 'demo' in one run and 'vit_base"),
        ({"precision": "bf16"}, "precision is 'float32' in one run and 'bf16' in another"),
        (
            {"data": {"name": "photos", "images": 200, "fingerprint": "f01"}},
            "data is 'f00' in one run and 'f01'",
        ),
    ],
)
def test_runs_that_cannot_be_compared_are_refused(tmp_path, capsys, settings, message):
    folders = write_two(tmp_path, **settings)
    with pytest.raises(BenchmarkError, match=message):
        merge([read_results(folder) for folder in folders])
    assert main([str(folder) for folder in folders]) == 2
    assert message in capsys.readouterr().err


def test_runs_on_other_pictures_of_the_same_names_are_refused(tmp_path):
    runs = []
    for name, content in (("a", "one"), ("b", "two"), ("c", None)):
        (tmp_path / name).mkdir()
        rows = [{**row, "content": content} for row in make_rows(3)]
        runs.append(read_results(write_folder(tmp_path / name, rows, **DEMO)))
    assert len(merge([runs[0], runs[2]]).rows) == 3
    with pytest.raises(BenchmarkError, match="is one picture in one run and another in another"):
        merge(runs[:2])


def test_the_tables_hold_the_paired_differences(tmp_path, capsys):
    folder = write_folder(tmp_path, make_rows(20), **DEMO)
    assert main([str(folder), "--no-costs", "--against", "attention_grad_cam"]) == 0
    text = capsys.readouterr().out
    run = halves(read_results(folder))["confirming"]
    difference = run.scores("reflected_relevance", "insertion") - run.scores(
        "attention_grad_cam", "insertion"
    )
    found = mean_interval(100 * difference)
    confirming = text[text.index("demo, 10 images for confirming") :]
    assert f"{found.mean:+.2f} ± {found.half_width:.2f}".replace("-", "−") in confirming


def test_one_half_only(tmp_path, capsys):
    folder = write_folder(tmp_path, make_rows(7), **DEMO)
    assert main([str(folder), "--no-costs", "--half", "choosing"]) == 0
    text = capsys.readouterr().out
    assert "demo, 4 images for choosing" in text
    assert "confirming" not in text


def test_costs_are_counted_in_forwards():
    model = make_vit()
    found = costs(
        model, ["transformer_attribution", "rise", "random", "reflected_relevance"], (3, 32, 32)
    )
    assert "random" not in found
    assert found["rise"] == pytest.approx(1024, rel=0.01)  # and its masks are enlarged
    assert 1.5 < found["transformer_attribution"] < 3
    assert 8 < found["reflected_relevance"] < 16 + found["transformer_attribution"]


def test_the_command_writes_tables_and_a_picture(tmp_path, capsys):
    folders = [str(folder) for folder in write_two(tmp_path)]
    assert main([*folders, "--output", str(tmp_path / "study"), "--device", "cpu"]) == 0
    text = (tmp_path / "study" / "study.md").read_text()
    assert capsys.readouterr().out.strip() == text.strip()
    assert "| TransformerAttribution | 2" in text
    assert (tmp_path / "study" / "study.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("option", ["--methods", "--against"])
def test_unknown_methods(tmp_path, capsys, option):
    folder = write_folder(tmp_path, make_rows(4), **DEMO)
    assert main([str(folder), option, "magic"]) == 2
    expected = "is in none of the runs" if option == "--methods" else "is none of the methods"
    assert f"'magic' {expected}; wanted: some of reflected_relevance" in capsys.readouterr().err


def test_a_model_whose_costs_cannot_be_counted(tmp_path, capsys):
    folder = write_folder(tmp_path, make_rows(4), model="no_such_model")
    assert main([str(folder)]) == 2
    assert "--no-costs does without the model" in capsys.readouterr().err
    assert main([str(folder), "--no-costs"]) == 0
