"""The explorer's page: what it says is what the attributors compute, and it works in a browser."""

import functools
import json
import re
import time
from dataclasses import replace
from html.parser import HTMLParser

import chromium
import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit
from PIL import Image

from captum_reflected import (
    BalancedRelevance,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
    demo,
)
from captum_reflected.attr.methods import METHODS
from captum_reflected.cli.main import main
from captum_reflected.exploration import explorer
from captum_reflected.exploration.explorer_page import DEFAULT_METHODS, ExplorerPage
from captum_reflected.exploration.measuring import ClassMeasurements, Measurements, measure
from captum_reflected.exploration.page import MOST_BYTES, html_page
from captum_reflected.inputs.batch import make_batch
from captum_reflected.metrics import deletion, insertion

HOSTILE = "</script><img src=x onerror=\"document.title='hacked'\">&amp;{{7*7}}\n'"
GRID = (12, 12)
TOKENS = 144


@pytest.fixture(scope="module")
def scene():
    """The demo model, one of its scenes as model input, and its class."""
    scenes = demo.load_scenes()
    return demo.load_model(), demo.preprocess(scenes.images[:1]), int(scenes.labels[0])


@pytest.fixture(scope="module")
def measured(scene):
    model, image, target = scene
    names = [HOSTILE if index == target else name for index, name in enumerate(demo.CLASS_NAMES)]
    return measure(model, image, target, methods=DEFAULT_METHODS, classes=2, class_names=names)


@pytest.fixture(scope="module")
def reflection(scene, measured):
    """What ReflectedRelevance finds for both classes."""
    model, image, _ = scene
    classes = torch.tensor([one.index for one in measured.classes])
    return ReflectedRelevance(model).reflect(image.expand(2, -1, -1, -1), classes)


# -- the numbers -------------------------------------------------------------------------


def test_the_explained_class_comes_first_then_the_likeliest(scene, measured):
    model, image, target = scene
    probabilities = model(image).softmax(-1)[0]
    probabilities[target] = 2
    assert [one.index for one in measured.classes] == probabilities.topk(2).indices.tolist()


@pytest.mark.parametrize("place", [0, 1])
def test_relevance_and_scores_are_those_of_reflected_relevance(scene, measured, reflection, place):
    model, image, _ = scene
    one = measured.classes[place]
    with torch.no_grad():
        logit = float(model(image)[0, one.index])
    assert one.logit == pytest.approx(logit, abs=1e-4)
    relevance = reflection.relevance[place, -TOKENS:, -TOKENS:]
    scale = relevance.max()
    torch.testing.assert_close(one.relevance / scale, relevance / scale, rtol=0, atol=1e-5)
    torch.testing.assert_close(one.scores, reflection.scores[place], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize(
    ("number", "attributor"),
    list(
        enumerate([MaskRegression, BalancedRelevance, TransformerAttribution, ReflectedRelevance])
    ),
)
def test_maps_are_those_of_the_attributors(scene, measured, place, number, attributor):
    model, image, _ = scene
    one = measured.classes[place]
    heat = attributor(model).attribute(image, one.index, interpolate_mode="nearest")[0, 0]
    expected = heat.reshape(GRID[0], 8, GRID[1], 8)[:, 4, :, 4].flatten()
    assert measured.methods[number] == attributor.__name__
    span = expected.max() - expected.min()
    torch.testing.assert_close(one.maps[number] / span, expected / span, rtol=0, atol=1e-4)
    ordered = one.maps[number][one.orders[number]]
    assert sorted(one.orders[number].tolist()) == list(range(TOKENS))
    assert (ordered.diff() <= 0).all()


def test_curves_are_those_of_the_metrics(scene, measured):
    model, image, _ = scene
    assert [measured.counts[step] for step in (0, 7, 14, 21, 28)] == [0, 36, 72, 108, 144]
    for one in measured.classes:
        for number, order in enumerate(one.orders):
            # Without ties, whose order differs between tokens and pixels.
            ranked = torch.empty(TOKENS)
            ranked[order] = -torch.arange(TOKENS, dtype=torch.float)
            heat = ranked.reshape(1, 1, *GRID).repeat_interleave(8, 2).repeat_interleave(8, 3)
            for metric, curve in ((deletion, one.deletion), (insertion, one.insertion)):
                _, expected = metric(
                    model, image, heat, target=one.index, pixels_per_step=36 * 64, return_curve=True
                )
                torch.testing.assert_close(curve[number, ::7], expected[0], rtol=1e-3, atol=1e-5)


def test_layers_add_up_to_the_relevance(scene, measured):
    model, image, target = scene
    one = measured.classes[0]
    torch.testing.assert_close(measured.partial[-1], one.relevance)
    assert len(measured.partial) == len(model.blocks)
    assert (measured.partial.diff(dim=0) >= -1e-7).all()  # flow only grows
    heat = TransformerAttribution(model).attribute(image, target, interpolate_mode="nearest")
    torch.testing.assert_close(
        one.output_rows[-1], heat[0, 0, 4::8, 4::8].flatten(), rtol=1e-3, atol=1e-6
    )
    # From the definition, in double precision.
    factors = TransformerAttribution(model).layer_relevance(make_batch(image, target, None)).layers
    product = torch.eye(TOKENS + 1, dtype=torch.float64)
    for layer, factor in enumerate(factors):
        product = (torch.eye(TOKENS + 1, dtype=torch.float64) + factor[0].double()) @ product
        exact = product.float()
        torch.testing.assert_close(measured.partial[layer], exact[1:, 1:], rtol=1e-4, atol=1e-6)
        torch.testing.assert_close(one.output_rows[layer], exact[0, 1:], rtol=1e-4, atol=1e-6)


def test_methods_may_have_options_and_need_not_be_ours():
    model, image = make_vit(), torch.rand(3, 32, 32)
    methods = ["mask_regression:forwards=9", "input_x_gradient"]
    found = measure(model, image, 3, methods=methods, classes=1)
    assert found.methods == ("MaskRegression (forwards=9)", "InputXGradient")
    one = found.classes[0]
    heat = MaskRegression(model, forwards=9).attribute(image[None], 3, interpolate_mode="nearest")
    torch.testing.assert_close(one.maps[0], heat[0, 0, 4::8, 4::8].flatten(), rtol=1e-4, atol=1e-5)
    pixels = METHODS["input_x_gradient"].explain(model, image[None], torch.tensor([3]))[0]
    means = pixels.reshape(4, 8, 4, 8).mean(dim=(1, 3)).flatten()
    torch.testing.assert_close(one.maps[1], means, rtol=1e-4, atol=1e-7)
    assert one.name == "class 3"
    assert found.counts == tuple(range(17))  # fewer tokens than steps


# -- bad input ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"image": torch.rand(2, 3, 32, 32)}, "batch of 2 images; wanted: one"),
        ({"image": torch.rand(4, 32, 32)}, "wanted: (B, 3, H, W) or (B, 1, H, W)"),
        ({"mean": [0.5] * 3}, "mean is given and std is not"),
        ({"mean": [0.5] * 2, "std": [1] * 3}, "3 finite numbers"),
        ({"mean": [9.0] * 3, "std": [1.0] * 3}, "wanted: from 0 to 1"),
        ({"methods": []}, "at least one"),
        ({"methods": ["nothing"]}, "method is 'nothing'"),
        ({"class_names": ["a"]}, "1 class_names, and the model has 7 classes"),
        ({"target": 7}, "wanted: a class from 0 to 6"),
        ({"target": (1, 2)}, "wanted: the index of one class"),
        ({"classes": 0}, "classes"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"model": make_vit(), "image": torch.rand(3, 32, 32), **change}
    with pytest.raises(ValueError, match=re.escape(message)):
        explorer(**arguments)


def test_a_model_without_classes_is_refused():
    with pytest.raises(ValueError, match=r"wanted: logits of shape \(1, C\), C of 2 or more"):
        explorer(make_vit(num_classes=1), torch.rand(3, 32, 32))


# -- the file ----------------------------------------------------------------------------


class Elements(HTMLParser):
    """All elements of a page, by name."""

    def __init__(self, text):
        super().__init__()
        self.found = []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.found.append((tag, dict(attributes)))


@pytest.fixture(scope="module")
def page(measured):
    return html_page(measured, title=HOSTILE)


def test_the_page_holds_everything_and_names_are_escaped(page):
    found = Elements(page).found
    names = [tag for tag, _ in found]
    assert "img" not in names  # that of the hostile name; the script makes the page's own
    assert names.count("script") == 3
    for tag, attributes in found:
        assert "style" not in attributes
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src") is None
        assert tag != "a"
        if tag == "link":
            assert attributes["href"] == "data:,"


def test_a_notebook_shows_the_page_in_a_frame_without_rights():
    image = torch.rand(1, 3, 32, 32)
    made = explorer(make_vit(), image, 3, methods=["transformer_attribution"], classes=1)
    shown = Elements(made._repr_html_()).found
    assert [tag for tag, _ in shown] == ["iframe"]
    assert shown[0][1]["sandbox"] == "allow-scripts"
    assert shown[0][1]["srcdoc"] == made.html
    assert repr(made) == f"ExplorerPage('class 3', {len(made.html.encode()):,} bytes)"


@functools.cache
def invented(grid):
    """Measurements of random numbers, which zlib cannot make smaller, unlike those of a model."""
    tokens = grid[0] * grid[1]
    generator = torch.Generator().manual_seed(0)

    def some(*shape):
        return torch.rand(shape, generator=generator)

    picture = some(1, 3, 9, 9)
    picture = F.interpolate(picture, scale_factor=14 * grid[0] / 9, mode="bilinear")[0]
    maps = some(4, tokens)
    one = ClassMeasurements(
        index=0, name="a class", logit=1.0, probability=0.5, relevance=some(tokens, tokens),
        scores=some(tokens), output_rows=some(12, tokens), maps=maps,
        orders=maps.argsort(descending=True), deletion=some(4, 29), insertion=some(4, 29),
    )  # fmt: skip
    return Measurements(
        grid_size=grid, picture=picture.permute(1, 2, 0), blurred=picture.permute(1, 2, 0) / 2,
        ground=some(3), methods=("A",) * 4, counts=tuple(range(29)), classes=(one,) * 5,
        first_layer=0, partial=some(1, tokens, tokens).expand(12, -1, -1),
    )  # fmt: skip


@functools.cache
def large_page(grid):
    return html_page(invented(grid), title="large")


@pytest.mark.parametrize(
    ("grid", "said"),
    [
        ((37, 37), ["fit into the page for 1 of 5 classes", "only after the last layer"]),
        (
            (48, 48),
            [
                "the mean over blocks of 2 × 2 patches",
                "fit into the page for 1 of 5 classes",
                "only after the last layer",
            ],
        ),
        ((14, 14), []),
    ],
)
def test_a_page_stays_below_3_mb_and_says_what_was_left_out(grid, said):
    found = large_page(grid)
    assert len(found.encode()) <= MOST_BYTES < 3_000_000
    assert found.count("Reduced:") == len(said)
    for words in said:
        assert words in found


def test_a_page_says_that_nothing_flows_between_patches():
    # In the last layer, relevance flows into the class token only, and here it is the only layer.
    image = torch.rand(3, 32, 32)
    options = {"methods": ["transformer_attribution"], "classes": 1}
    said = "Nothing flows between patches for class"
    assert said in explorer(make_vit(depth=1), image, **options).html
    assert said not in explorer(make_vit(depth=2), image, **options).html


def test_the_start_layer_is_that_of_all_methods_that_roll_out():
    model, image = make_vit(), torch.rand(3, 32, 32)
    methods = ["transformer_attribution", "transformer_attribution:start_layer=0"]
    found = measure(model, image, 1, methods=methods, classes=1, start_layer=1)
    assert (found.first_layer, len(found.partial)) == (1, 2)
    for values, start in zip(found.classes[0].maps, (1, 0), strict=True):
        attributor = TransformerAttribution(model, start_layer=start)
        heat = attributor.attribute(image[None], 1, interpolate_mode="nearest")
        torch.testing.assert_close(values, heat[0, 0, 4::8, 4::8].flatten())


# -- the command -------------------------------------------------------------------------


def test_the_command_writes_a_page(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    picture = demo.load_scenes().images[0].permute(1, 2, 0).numpy()
    Image.fromarray(picture).save("a <b>.png")
    assert (
        main(["explore", "a <b>.png", "--model", "demo", "--top", "1", "--methods", "rollout"]) == 0
    )
    written = tmp_path / "explorations" / "a <b>.html"
    assert "a &lt;b&gt;.png, demo" in written.read_text("utf-8")
    printed = capsys.readouterr()
    assert str(written.relative_to(tmp_path)) in printed.out
    # What will be run is said first, and one bar counts just that.
    images = TOKENS + 2 * (1 + 27)
    assert printed.err.startswith(f"{images} masked images will be run: for 1 class, ")
    assert f" {images}/{images} [" in printed.err
    assert set(re.findall(r"(\w[\w ]*):\s+100%", printed.err)) == {"maps", "masked images"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.png", "--model", "demo"], "cannot read missing.png"),
        (["missing.png", "--model", "demo", "--output", "a.png"], "a file that ends in .html"),
    ],
)
def test_the_command_names_what_is_wrong(tmp_path, capsys, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert main(["explore", *arguments]) == 2
    assert message in capsys.readouterr().err


# -- in the browser ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def browser():
    if chromium.PROGRAM is None:
        pytest.skip("the program chromium is not installed")
    with chromium.Chromium() as started:
        yield started


@pytest.fixture(scope="module")
def file(page, tmp_path_factory):
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page, encoding="utf-8")
    return path.as_uri()


@pytest.fixture
def tab(browser, file):
    opened = browser.open(file)
    opened.wait_for("window.explorer")
    yield opened
    # Nothing went wrong, and nothing was asked for but the file and the pictures inside it.
    assert opened.events("Runtime.exceptionThrown") == []
    assert opened.events("Runtime.consoleAPICalled") == []
    assert opened.events("Log.entryAdded") == []
    addresses = [event["request"]["url"] for event in opened.events("Network.requestWillBeSent")]
    assert addresses[0] == file
    assert all(address.startswith("data:image/jpeg;") for address in addresses[1:])
    assert opened.run("document.title") == HOSTILE.replace("\n", "\\n") + ": explorer"
    opened.close()


FRAMES = "new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(() => done(1))))"


def picture(tab, selector):
    """The content of a canvas, after what was asked for is painted."""
    tab.run(FRAMES)
    return tab.run(f"document.querySelector({json.dumps(selector)}).toDataURL()")


def text(tab, identifier):
    tab.run(FRAMES)
    return tab.run(f"document.getElementById('{identifier}').textContent")


def centre(tab, row, column):
    """Where a patch, counted from 1, is on the screen."""
    box = tab.run(
        "(({x, y, width, height}) => [x, y, width, height])(stage.getBoundingClientRect())"
    )
    return (
        box[0] + box[2] * (column - 0.5) / GRID[1],
        box[1] + box[3] * (row - 0.5) / GRID[0],
    )


def shown(score):
    return f"{score:.2f}".replace("-", "\u2212")


def choose(tab, name, value):
    tab.run(f"document.querySelector('input[name={name}][value=\"{value}\"]').click()")


VIEWS = ["photo", "into", "from", "reflected", "output", "map"]


def test_pointing_at_a_patch_changes_every_picture_and_what_is_said(tab, measured):
    one = measured.classes[0]
    tab.point(*centre(tab, 3, 4))
    pictures = {view: picture(tab, f"[data-view={view}]") for view in VIEWS}
    large, layer = picture(tab, "#stage"), picture(tab, ".layer canvas")
    tab.point(*centre(tab, 9, 8))
    assert all(picture(tab, f"[data-view={view}]") != pictures[view] for view in VIEWS)
    assert picture(tab, "#stage") != large
    assert picture(tab, ".layer canvas") != layer
    patch = 8 * GRID[1] + 7
    place = one.orders[0].tolist().index(patch) + 1
    assert text(tab, "fact-patch") == "row 9, col. 8"
    assert text(tab, "fact-score") == f"scores\u00a0{shown(one.scores[patch])}"
    assert text(tab, "fact-place").startswith(str(place))
    said = f"Patch row 9, column 8: {text(tab, 'fact-place')} in the map of MaskRegression."
    tab.wait_for(f"says.textContent.startsWith({json.dumps(said)})")


def test_a_click_holds_the_patch_until_escape(tab):
    x, y = centre(tab, 3, 4)
    for kind in ("mousePressed", "mouseReleased"):
        tab.point(x, y, kind, button="left", clickCount=1)
    tab.point(*centre(tab, 9, 8))
    assert text(tab, "fact-patch") == "row 3, col. 4"
    tab.press("Escape")
    tab.point(*centre(tab, 9, 9))
    assert text(tab, "fact-patch") == "row 9, col. 9"


def touch(tab, *points):
    """A finger goes down at the first point, over the others, and up."""
    kinds = ["touchStart", *["touchMove"] * (len(points) - 1)]
    for kind, (x, y) in zip(kinds, points, strict=True):
        tab.call("Input.dispatchTouchEvent", type=kind, touchPoints=[{"x": x, "y": y}])
    tab.call("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])


def test_a_tap_holds_a_patch_and_a_second_one_releases_it(tab):
    tab.call("Emulation.setTouchEmulationEnabled", enabled=True)
    for row, column in [(5, 6), (8, 3)]:
        touch(tab, centre(tab, row, column))
        tab.wait_for(f"explorer.state.patch === {(row - 1) * GRID[1] + column - 1}")
        assert text(tab, "scale-name") == "Flow out of this patch"
        assert tab.run("explorer.state.held && hint.hidden && !document.all['hint-held'].hidden")
    touch(tab, centre(tab, 8, 3))
    tab.wait_for("!explorer.state.held")
    assert text(tab, "scale-name").startswith("Final map of")
    assert tab.run("!hint.hidden")


def test_a_finger_chooses_when_it_slides_across_and_not_when_it_scrolls(tab):
    tab.call("Emulation.setTouchEmulationEnabled", enabled=True)
    touch(tab, *(centre(tab, 3, column) for column in (3, 4, 6, 9)))
    tab.wait_for(f"explorer.state.held && explorer.state.patch === {2 * GRID[1] + 8}")
    x, y = centre(tab, 9, 4)
    touch(tab, *((x, y - distance) for distance in range(0, 300, 30)))
    tab.wait_for("scrollY > 100")
    assert text(tab, "fact-patch") == "row 3, col. 9"


def test_arrow_keys_move_the_patch_and_stop_at_the_edge(tab):
    tab.point(*centre(tab, 2, 2))
    tab.run("stage.focus()")
    for key, expected in [
        ("ArrowRight", "row 2, col. 3"), ("ArrowDown", "row 3, col. 3"),
        ("ArrowLeft", "row 3, col. 2"), ("ArrowUp", "row 2, col. 2"), ("ArrowUp", "row 1, col. 2"),
        ("ArrowUp", "row 1, col. 2"), ("End", "row 1, col. 12"), ("ArrowRight", "row 1, col. 12"),
        ("Home", "row 1, col. 1"),
    ]:  # fmt: skip
        tab.press(key)
        assert text(tab, "fact-patch") == expected
    assert tab.run("stage.matches(':focus-visible')")
    assert tab.run("getComputedStyle(stage).outlineStyle") == "solid"


def test_values_on_the_page_are_as_exact_as_it_says(tab, measured):
    one = measured.classes[0]
    said = tab.run("document.body.textContent")
    error = float(re.search(r"largest rounding error on this page is ([\d.]+)\s%", said)[1]) / 100
    shown = tab.run(
        f"Array.from({{length: {TOKENS}}}, (_, from) => Array.from({{length: {TOKENS}}}, "
        "(_, into) => explorer.relevance(from, into)))"
    )
    exact = one.relevance.T  # [from, into]
    off = ~torch.eye(TOKENS, dtype=torch.bool)
    largest = torch.where(off, exact, 0).amax(dim=1, keepdim=True)
    shares = ((torch.tensor(shown) - exact).abs() / largest)[off]
    assert error - 1e-4 < shares.max() <= error + 1e-4
    torch.testing.assert_close(torch.tensor(shown).diagonal(), exact.diagonal())
    # After the first layer.
    first = torch.tensor(tab.run("explorer.values('into', 0)"))
    patch = tab.run("explorer.state.patch")
    expected = measured.partial[0][:, patch].clone()
    expected[patch] = 0
    assert (first - expected).abs().max() <= (error + 1e-4) * expected.max()
    received = torch.tensor(tab.run("explorer.values('from')"))
    exact_received = one.relevance[patch].clone()
    exact_received[patch] = 0
    assert ((received - exact_received).abs() <= (error + 1e-4) * largest[:, 0]).all()
    row = torch.tensor(tab.run("explorer.values('output', 1)"))
    exact_row = one.output_rows[1]
    assert (row - exact_row).abs().max() <= (exact_row.max() - exact_row.min()) / 509
    assert tab.run("explorer.scores()") == one.scores.tolist()


def test_reflected_images_are_those_that_were_scored(tab, measured, reflection):
    masks = reflection.masks[0].flatten(1)
    shown = torch.tensor([tab.run(f"explorer.mask({token})") for token in range(0, TOKENS, 13)])
    torch.testing.assert_close(shown, masks[::13], rtol=0, atol=5e-3)
    # The picture: the photo where the mask is 1, the colour of 0 where it is 0.
    token = int(masks.mean(dim=1).argmax())
    tab.point(*centre(tab, token // GRID[1] + 1, token % GRID[1] + 1))
    pixels = {}
    for view in ("photo", "reflected"):
        choose(tab, "view", view)
        tab.run(FRAMES)
        # The pixel in the middle of each patch, from a copy that is made for reading.
        pixels[view] = torch.tensor(
            tab.run(
                "(() => { const copy = new OffscreenCanvas(stage.width, stage.height)"
                ".getContext('2d', {willReadFrequently: true}); copy.drawImage(stage, 0, 0);"
                f"return Array.from({{length: {TOKENS}}}, (_, token) => [...copy.getImageData("
                f"((token % {GRID[1]}) + 0.5) * stage.width / {GRID[1]},"
                f"(Math.floor(token / {GRID[1]}) + 0.5) * stage.height / {GRID[0]}, 1, 1).data]);"
                "})()"
            )
        )[:, :3].float()
    ground, mask = 255 * measured.ground, masks[token][:, None]
    difference = pixels["reflected"] - (ground + mask * (pixels["photo"] - ground))
    assert mask.max() > 0.5
    assert difference.abs().max() <= 3


def test_buttons_choose_class_method_and_view(tab, measured):
    seen = {picture(tab, "#stage")}
    for view in ["into", "from", "reflected", "output", "photo"]:
        choose(tab, "view", view)
        seen.add(picture(tab, "#stage"))
    assert len(seen) == 6
    tab.point(*centre(tab, 6, 6))
    patch = 5 * GRID[1] + 5
    choose(tab, "method", 2)
    place = measured.classes[0].orders[2].tolist().index(patch) + 1
    assert text(tab, "fact-place").startswith(f"{place}")
    assert text(tab, "fact-place-more").replace("\u200b", "") == "TransformerAttribution"
    choose(tab, "class", 1)
    score = shown(measured.classes[1].scores[patch])
    assert text(tab, "fact-score") == f"scores\u00a0{score}"
    choose(tab, "view", "reflected")
    whole = shown(measured.classes[1].logit)
    assert text(tab, "stage-text").endswith(f"Score {score}; whole photo {whole}.")
    most = tab.run(f"Math.max(...explorer.mask({patch}))")
    assert text(tab, "stage-text").startswith(f"At most {100 * most:.1f}\u00a0% of any patch")
    choose(tab, "view", "into")
    assert "stored for </script>" in text(tab, "layers-text")
    assert text(tab, "layers-text").startswith("Flow into the output, after each layer.")
    choose(tab, "layer", 1)
    assert tab.run("document.querySelector('input[name=view]:checked').value") == "output"


def test_a_layer_is_shown_on_the_photo(tab):
    choose(tab, "view", "map")
    choose(tab, "layer", 0)
    assert text(tab, "scale-name") == "Flow out of this patch, after layer 1"
    first = picture(tab, "#stage")
    choose(tab, "layer", 2)
    assert picture(tab, "#stage") != first


def test_the_slider_shows_the_measured_probability(tab, measured):
    one = measured.classes[0]
    for kind in ("deletion", "insertion"):
        choose(tab, "curve", kind)
        pictures = set()
        for step in (0, 5, len(measured.counts) - 1):
            tab.run(f"count.value = {step}, count.dispatchEvent(new Event('input'))")
            probability = getattr(one, kind)[0][step]
            assert text(tab, "test-probability") == f"{100 * probability:.1f}\u00a0%"
            assert f"the {measured.counts[step]} highest of 144" in text(tab, "test-text")
            assert f"{measured.counts[step]} of 144" in tab.run("count.ariaValueText")
            pictures.add(picture(tab, "#test-picture"))
        assert len(pictures) == 3
    areas = 100 * torch.trapezoid(one.insertion, torch.tensor(measured.counts) / TOKENS)
    assert tab.run("[...areas.children].map((entry) => entry.textContent)") == [
        f"{method}\u00a0{area:.1f}\u00a0%"
        for method, area in zip(measured.methods, areas, strict=True)
    ]


def test_the_photo_shows_the_map_until_a_patch_is_pointed_at(tab):
    """And what the patch flows into meanwhile, unless another view was chosen."""
    assert text(tab, "scale-name").startswith("Final map of")
    tab.point(*centre(tab, 6, 6))
    assert text(tab, "scale-name") == "Flow out of this patch"
    tab.point(1, 1)
    assert text(tab, "scale-name").startswith("Final map of")
    choose(tab, "view", "from")
    tab.point(*centre(tab, 3, 3))
    tab.point(1, 1)
    assert text(tab, "scale-name") == "Flow into this patch"
    choose(tab, "method", 1)
    assert text(tab, "scale-name") == "Final map of BalancedRelevance"


def test_by_keyboard_alone(tab):
    choose(tab, "view", "into")
    tab.run("document.querySelector('input[name=view]:checked').focus()")
    before = picture(tab, "#stage")
    tab.press("ArrowRight", windowsVirtualKeyCode=39)
    assert picture(tab, "#stage") != before
    assert tab.run("document.activeElement.value") == "from"


@pytest.mark.parametrize("width", [390, 820, 1600])
def test_nothing_is_wider_than_the_screen(tab, width):
    tab.resize(width, 800)
    tab.run(FRAMES)
    assert tab.run("document.documentElement.scrollWidth") == width
    wide = tab.run(
        "[...document.querySelectorAll('main *')].filter((e) => e.getClientRects().length && "
        "!e.closest('.spoken, .pill') && "  # a row of buttons scrolls inside itself
        f"e.getBoundingClientRect().right > {width} + 0.5)"
        ".map((e) => e.outerHTML.slice(0, 80))"
    )
    assert wide == []


@pytest.fixture(scope="module")
def plain_tab(browser, measured, tmp_path_factory):
    """The page with names as they usually are."""
    classes = [
        replace(one, name=name)
        for one, name in zip(measured.classes, ("espresso", "chocolate sauce"), strict=True)
    ]
    path = tmp_path_factory.mktemp("plain") / "plain.html"
    found = html_page(replace(measured, classes=tuple(classes)), title="coffee.png, deit_tiny")
    path.write_text(found, encoding="utf-8")
    opened = browser.open(path.as_uri())
    opened.wait_for("window.explorer")
    yield opened
    opened.close()


@pytest.mark.parametrize("width", [390, 1280])
def test_nothing_moves_while_one_points_and_chooses(plain_tab, width):
    tab = plain_tab
    tab.resize(width, 900)
    tab.run(FRAMES)
    places = set()
    for name, values in {
        "view": VIEWS, "class": [1, 0], "method": [2, 0], "layer": [0, 1], "curve": ["insertion"],
    }.items():  # fmt: skip
        for value in values:
            choose(tab, name, value)
            tab.point(*centre(tab, 12, 12))
            tab.run(FRAMES)
            places.add(
                tab.run(
                    "JSON.stringify([...document.querySelectorAll('canvas, input, h2')]"
                    ".map((e) => e.getBoundingClientRect()).map((box) => [box.x, box.y + scrollY]))"
                )
            )
    assert len(places) == 1


@pytest.mark.parametrize("height", [720, 900])
def test_the_photo_and_the_hint_are_on_the_first_screen_or_close(plain_tab, height):
    tab = plain_tab
    tab.resize(1280, height)
    tab.run(FRAMES)
    assert tab.run("stage.getBoundingClientRect().bottom") <= max(height, 760)
    assert "← ↑ ↓ →" in tab.run("hint.innerText")
    assert "finger" not in tab.run("hint.innerText")


def test_screen_readers_get_a_name_for_every_control(tab):
    nodes = tab.call("Accessibility.getFullAXTree")["nodes"]
    roles = {"radio", "slider", "application", "image", "radiogroup"}
    controls = [node for node in nodes if node.get("role", {}).get("value") in roles]
    assert len(controls) > 20
    assert [node for node in controls if not node["name"].get("value")] == []


def test_a_large_grid_is_shown_in_blocks_and_without_what_is_not_stored(browser, tmp_path):
    large = invented((48, 48))
    path = tmp_path / "large.html"
    path.write_text(large_page((48, 48)), encoding="utf-8")
    opened = browser.open(path.as_uri())
    opened.wait_for("window.explorer")
    # Patch (4, 6) flows into the block of rows 10 and 11, columns 20 and 21.
    column = large.classes[0].relevance[:, 4 * 48 + 6].reshape(48, 48)
    shown = opened.run(f"explorer.relevance({4 * 48 + 6}, {11 * 48 + 20})")
    assert shown == pytest.approx(float(column[10:12, 20:22].mean()), abs=4e-3)
    choose(opened, "view", "into")
    choose(opened, "class", 1)
    disabled = "[...document.querySelectorAll('input[name=view]:disabled')].map((e) => e.value)"
    assert opened.run(disabled) == ["into", "from", "reflected"]
    assert text(opened, "scale-name") == "Flow into the output"
    assert text(opened, "text-into") == "not stored for this class"
    choose(opened, "class", 0)
    assert opened.run(disabled) == []
    assert text(opened, "text-into") == "column of R"
    assert opened.events("Runtime.exceptionThrown") == []
    opened.close()


@pytest.mark.parametrize(
    "attempt",
    [
        "fetch('http://127.0.0.1:9/').catch(() => 0)",
        "new Image().src = 'http://127.0.0.1:9/'",
        "document.body.append(Object.assign(document.createElement('script'), {text: 'hacked=1'}))",
        "document.body.setAttribute('onclick', 'hacked = 1'), document.body.click()",
        "document.body.setAttribute('style', 'color: red')",
    ],
)
def test_the_policy_refuses_what_the_page_does_not_hold(browser, file, attempt):
    opened = browser.open(file)
    refused = opened.run(
        "new Promise((done) => { document.addEventListener('securitypolicyviolation', (event) => "
        f"done(event.effectiveDirective)); {attempt}; setTimeout(() => done('nothing'), 5000); }})"
    )
    assert refused != "nothing"
    assert opened.run("typeof hacked") == "undefined"
    # Chromium announces the request of an image before it refuses it.
    announced = {
        event["requestId"]
        for event in opened.events("Network.requestWillBeSent")
        if event["request"]["url"].startswith("http")
    }
    failed = opened.events("Network.loadingFailed")
    assert announced <= {e["requestId"] for e in failed if e.get("blockedReason") == "csp"}
    opened.close()


@pytest.mark.parametrize("dark", [False, True])
def test_texts_have_enough_contrast(browser, file, dark):
    opened = browser.open(file, dark=dark)
    opened.wait_for("window.explorer")
    assert opened.lowest_contrast() >= 4.5
    opened.close()


def test_dark_where_the_reader_wants_it_dark(browser, file):
    grounds = []
    for dark in (False, True):
        opened = browser.open(file, dark=dark)
        grounds.append(opened.run("getComputedStyle(document.body).backgroundColor"))
        opened.close()
    assert grounds == ["rgb(251, 251, 250)", "rgb(20, 23, 26)"]


def test_on_paper_it_is_light(browser, file):
    opened = browser.open(file, dark=True)
    opened.call(
        "Emulation.setEmulatedMedia",
        media="print",
        features=[{"name": "prefers-color-scheme", "value": "dark"}],
    )
    assert opened.run("getComputedStyle(document.body).color") == "rgb(31, 35, 40)"
    opened.close()


def test_it_works_in_a_notebooks_frame(browser, measured, tmp_path):
    made = ExplorerPage(html_page(measured, title="notebook"), "notebook")
    path = tmp_path / "notebook.html"
    path.write_text(f"<!DOCTYPE html><title>notebook</title>{made._repr_html_()}", "utf-8")
    opened = browser.open(path.as_uri())
    before = opened.screenshot(whole=False)
    end = time.monotonic() + 20
    while opened.screenshot(whole=False) == before and time.monotonic() < end:
        time.sleep(0.1)
    opened.point(300, 500)
    time.sleep(0.1)
    first = opened.screenshot(whole=False)
    opened.point(400, 600)
    time.sleep(0.3)
    assert opened.screenshot(whole=False) != first
    assert opened.events("Runtime.exceptionThrown") == []
    opened.close()
