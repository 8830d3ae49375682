"""Methods compared on the same images: what is run, the table, and the files."""

import csv
import io

import pytest
import torch
from captum.attr import InputXGradient
from matplotlib.figure import Figure
from PIL import Image

from captum_reflected import BalancedRelevance, Comparison, MaskRegression, compare, demo, explain
from captum_reflected.explanations.score_table import score_tables
from captum_reflected.metrics import evaluate, mean_interval
from captum_reflected.metrics.perturbation import blur
from captum_reflected.metrics.registry import METRICS, score_maps
from captum_reflected.visualization.notebook_figure import figure_bytes

METHODS = ["fast", "transformer_attribution"]
NAMES = ["balanced_relevance", "transformer_attribution"]
KEYS = [key for key, metric in METRICS.items() if not metric.needs_masks]
# Versions of an image along three curves of 28 steps between their ends, and its higher half.
VERSIONS_OF_A_MAP = 3 * 27 + 1


@pytest.fixture(scope="module")
def model():
    return demo.load_model()


@pytest.fixture(scope="module")
def scenes():
    found = demo.load_scenes()
    return demo.preprocess(found.images[:3]), found.labels[:3]


@pytest.fixture(scope="module")
def compared(model, scenes):
    return compare(model, scenes[0], METHODS, scenes[1], class_names=demo.CLASS_NAMES)


def test_what_all_maps_share_is_run_once(model, scenes):
    image = scenes[0][:1]
    rows = []

    def counted(images):
        rows.extend(images)
        return model(images)

    compare(counted, image, ["random", "center_gaussian"])
    # The whole, the empty and the blurred image belong to no map; the whole one is also predicted.
    assert len(rows) == 1 + 3 + 2 * VERSIONS_OF_A_MAP
    for shared, times in ((image[0], 2), (torch.zeros_like(image[0]), 1), (blur(image)[0], 1)):
        assert sum(torch.equal(row, shared) for row in rows) == times


def test_scores_are_what_the_metrics_say(model, scenes, compared):
    images, labels = scenes
    assert list(compared.scores) == NAMES
    for name, explanation in compared.explanations.items():
        expected = evaluate(model, images, explanation.attributions, target=labels)
        for key in set(KEYS) - {"insertion_zero"}:
            torch.testing.assert_close(compared.scores[name][key], getattr(expected, key))
        alone = explain(model, images, labels, method=name)
        torch.testing.assert_close(explanation.attributions, alone.attributions)
        assert torch.equal(explanation.probability, alone.probability)


def test_several_maps_are_scored_like_each_alone(model, scenes):
    images, labels = scenes[0][:2], scenes[1][:2]
    torch.manual_seed(0)
    maps = torch.rand(2, 2, 96, 96)
    masks = torch.rand(2, 96, 96) > 0.5
    keys = ["deletion", "average_increase", "relevance_mass_accuracy"]
    together = score_maps(model, images, maps, labels, keys, masks)
    for place, of_map in enumerate(maps):
        alone = score_maps(model, images, of_map, labels, keys, masks)
        assert set(alone) == set(together) == {*keys, "deletion_curve"}
        for key, values in alone.items():
            torch.testing.assert_close(together[key][place], values)


def test_methods_with_titles_of_their_own(model, scenes):
    image = scenes[0][:1]
    fewer = MaskRegression(model, forwards=6)
    found = compare(model, image, {"6": fewer, "plain": InputXGradient(model), "c": "fast"})
    assert list(found.scores) == list(found.explanations) == ["6", "plain", "c"]
    assert [one.title for one in found.explanations.values()] == ["6", "plain", "c"]
    assert found.explanations["c"].method == "balanced_relevance"
    assert "\n| plain" in found.table
    by_class = explain(model, image, method=BalancedRelevance)
    assert torch.equal(by_class.attributions, found.explanations["c"].attributions)
    own = type("BalancedRelevance", (InputXGradient,), {})  # is not recognised by its name
    by_class = explain(model, image, method=own)
    plain = found.explanations["plain"].attributions
    assert torch.equal(by_class.attributions, plain)
    alone = explain(model, image, method=fewer)
    assert (alone.method, alone.title) == (
        "mask_regression:forwards=6",
        "MaskRegression (forwards=6)",
    )
    assert torch.equal(
        found.explanations["c"].attributions,
        BalancedRelevance(model).attribute(image, found.explanations["c"].target)[:, 0],
    )


def test_methods_that_cannot_be_compared(model, scenes):
    def never(images):
        raise AssertionError("the model must not run")

    with pytest.raises(ValueError, match=r"has BalancedRelevance twice; wanted: .* a dictionary"):
        compare(never, scenes[0], ["fast", "balanced_relevance"])
    with pytest.raises(ValueError, match="did you mean attention_rollout"):
        compare(never, scenes[0], ["fast", "rolout"])
    for methods in ("fast", [], {}):
        with pytest.raises(ValueError, match=r"methods is .*; wanted: a list"):
            compare(never, scenes[0], methods)


def synthetic_scores(count):
    torch.manual_seed(0)
    return {
        title: {key: torch.rand(count).double() + shift for key in KEYS}
        for title, shift in (("A", 0), ("B", 5), ("C", 0))
    }


def test_the_table_has_intervals_from_ten_images_on():
    metrics = [METRICS[key] for key in KEYS]
    (means,) = score_tables(synthetic_scores(9), metrics)
    assert "Mean of 9 images, in percent. This is too few for intervals" in means.caption
    assert "From 10 images on" in means.caption
    many, _ = score_tables(synthetic_scores(30), metrics)
    assert "too narrow" not in many.caption
    assert "±" not in means.markdown
    scores = synthetic_scores(10)
    means, differences = score_tables(scores, metrics)
    assert "Intervals of Average increase, which is 0 or 1" in means.caption
    found = mean_interval(scores["A"]["deletion"])
    assert f"{100 * found.mean:.2f} ± {100 * found.half_width:.2f}" in means.rows[1]
    paired = mean_interval(scores["C"]["deletion"] - scores["A"]["deletion"])
    assert paired.half_width > abs(paired.mean)
    cells = {line[0]: line[1:] for line in differences.rows}
    assert (
        cells["C"][0].lstrip("+−")
        == f"{100 * abs(paired.mean):.2f} ± {100 * paired.half_width:.2f}"
    )
    assert all(cell.startswith("**+") for cell in cells["B"])
    assert "<b>+" in differences.html
    assert "*" not in differences.html
    assert "Difference from A on the same images" in differences.caption
    assert len({len(line) for line in means.markdown.splitlines()[2:]}) == 1  # columns line up


def test_values_without_an_interval_are_said():
    scores = {title: {"average_increase": torch.ones(12)} for title in "AB"}
    scores["A"]["average_increase"] = torch.zeros(12)
    means, differences = score_tables(scores, [METRICS["average_increase"]])
    assert [line[1] for line in means.rows[1:]] == ["0.00", "100.00"]
    assert differences.rows[1][1] == "+100.00"  # not bold: 12 equal values do not tell the spread
    assert "the same number for all images" in differences.caption
    scores["A"]["average_increase"] = torch.full((12,), float("nan"))
    means, _ = score_tables(scores, [METRICS["average_increase"]])
    assert means.rows[1][1] == "–"
    assert "not finite" in means.caption


def test_files(compared, tmp_path):
    for kind in ("png", "jpg", "pdf", "svg"):
        compared.save(tmp_path / f"figure.{kind}")
        assert (tmp_path / f"figure.{kind}").stat().st_size > 5000
    compared.save(tmp_path / "table.md")
    assert (tmp_path / "table.md").read_text("utf-8") == f"{compared.table}\n"
    compared.save(str(tmp_path / "scores.CSV"))
    with (tmp_path / "scores.CSV").open(encoding="utf-8", newline="") as file:
        lines = list(csv.DictReader(file))
    assert [line["method"] for line in lines] == [name for name in NAMES for _ in range(3)]
    for line in lines:
        image, explanation = int(line["image"]), compared.explanations[line["method"]]
        assert int(line["target"]) == explanation.target[image]
        assert line["class"] == demo.CLASS_NAMES[int(line["target"])]
        assert float(line["probability"]) == explanation.probability[image]
        for key in KEYS:
            assert float(line[key]) == compared.scores[line["method"]][key][image]
    with pytest.raises(
        ValueError, match=r"f\.gif; wanted: .*\.png, \.jpg, \.pdf, \.svg, \.md or \.csv"
    ):
        compared.save(tmp_path / "f.gif")
    with pytest.raises(OSError, match=r"none.table\.md"):
        compared.save(tmp_path / "none" / "table.md")


def test_a_notebook_shows_figure_and_table(compared):
    assert len([axes for axes in compared.figure.axes if axes.get_images()]) == 3 * 3
    shown = compared._repr_html_()
    assert shown.count("<img ") == 1
    assert shown.count("<table>") == 1
    assert "Mean of 3 images" in repr(compared)
    assert "first" not in shown
    assert compared.figure._repr_png_().startswith(b"\x89PNG")


def test_a_notebook_shows_the_first_of_many_images(model, scenes):
    many = explain(model, scenes[0][:1].expand(18, -1, -1, -1), method="random")
    assert "and 2 more" in repr(many)
    shown = many._repr_html_()
    assert "The first 16 of 18 images; <code>.plot()</code> has all of them." in shown
    assert len(shown) < 2_000_000
    several = Comparison({"A": many}, {"A": {key: torch.zeros(18) for key in KEYS}})
    assert "The first 16 of 18 images; <code>.figure</code>" in several._repr_html_()


def test_images_of_an_explanation(model, scenes):
    found = explain(model, scenes[0], scenes[1], method="fast", class_names=demo.CLASS_NAMES)
    assert [len(found[:2]), len(found[-1]), len(list(found))] == [2, 1, 3]
    assert torch.equal(found[-1].attributions, found.attributions[2:])
    assert repr(found[1]) == "\n".join(repr(found).splitlines()[::2])
    with pytest.raises(IndexError):
        _ = found[3]


def test_figures_longer_than_matplotlib_draws():
    picture = Image.open(io.BytesIO(figure_bytes(Figure(figsize=(0.1, 700)), "png")))
    assert 60_000 < picture.height < 2**16
