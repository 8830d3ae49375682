"""Deletion, insertion, average drop and increase: published curves, and the slow way."""

import inspect

import pytest
import torch

from captum_reflected import TransformerAttribution, metrics
from captum_reflected.metrics import (
    average_drop,
    average_increase,
    blur,
    deletion,
    evaluate,
    insertion,
    rank_pixels,
)

TARGETS = [2, 5, 0]


@pytest.fixture
def attributions(vit, images):
    return TransformerAttribution(vit).attribute(images, TARGETS)


def published_map(golden, photos, deit):
    """The photos with published RISE curves, and the maps that these score."""
    names = [key.split("/")[0] for key in golden if key.endswith("rise_deletion_zero_auc")]
    inputs = torch.stack([photos[name] for name in names])
    with torch.no_grad():
        targets = deit(inputs).argmax(dim=1)
    rows = torch.stack(
        [
            golden[f"{name}/{target}/gradient_relevance"][0, 1:].reshape(1, 14, 14)
            for name, target in zip(names, targets.tolist(), strict=True)
        ]
    )
    maps = torch.nn.functional.interpolate(rows, (224, 224), mode="bilinear")
    return names, inputs, targets, maps


@pytest.mark.slow
def test_rise_curves_of_the_published_code(golden, photos, deit):
    names, inputs, targets, maps = published_map(golden, photos, deit)
    assert len(names) == 3
    blurred = evaluate(deit, inputs, maps, target=targets)
    from_zero, zero_curve = insertion(
        deit,
        inputs,
        maps,
        baselines=0,
        target=targets,
        return_curve=True,
        max_examples_per_batch=29,
    )
    for row, name in enumerate(names):
        for kind, area, curve in (
            ("deletion_zero", blurred.deletion, blurred.deletion_curve),
            ("insertion_blur", blurred.insertion, blurred.insertion_curve),
            ("insertion_zero", from_zero, zero_curve),
        ):
            assert abs(float(area[row]) - float(golden[f"{name}/rise_{kind}_auc"])) <= 1e-3
            expected = golden[f"{name}/rise_{kind}_curve"].float()
            assert curve[row].shape == expected.shape
            assert (curve[row] - expected)[[0, -1]].abs().max() <= 1e-4


def slow_curve(model, image, heat, target, step, baseline, keep):
    """One image, one pixel at a time: what the metric says in words."""
    order = heat.flatten().argsort(descending=True, stable=True).tolist()
    height, width = heat.shape
    scores = []
    for count in [*range(0, height * width, step), height * width]:
        seen = (baseline if keep else image).clone()
        for pixel in order[:count]:
            y, x = divmod(pixel, width)
            seen[:, y, x] = (image if keep else baseline)[:, y, x]
        with torch.no_grad():
            scores.append(model(seen[None]).softmax(dim=1)[0, target])
    return torch.stack(scores)


@pytest.mark.parametrize("baseline", [0.0, 0.6, "blur", "tensor", "function"])
def test_curves_are_what_the_words_say(vit, images, attributions, baseline):
    given = {
        "tensor": torch.full_like(images, 0.3),
        "function": lambda x: x.mean(dim=(2, 3), keepdim=True).expand_as(x),
    }.get(baseline, baseline)
    filled = {
        "blur": blur(images),
        "tensor": given,
        "function": images.mean(dim=(2, 3), keepdim=True).expand_as(images),
    }.get(baseline, torch.full_like(images, baseline if isinstance(baseline, float) else 0))
    options = {"pixels_per_step": 100, "return_curve": True, "max_examples_per_batch": 5}
    removed, removed_curve = deletion(
        vit, images, attributions, baselines=given, target=TARGETS, **options
    )
    inserted, inserted_curve = insertion(
        vit, images, attributions, baselines=given, target=TARGETS, **options
    )
    fractions = torch.tensor([*range(0, 1024, 100), 1024]) / 1024
    for row, target in enumerate(TARGETS):
        heat = attributions[row].sum(dim=0)
        for keep, curve, area in (
            (False, removed_curve, removed),
            (True, inserted_curve, inserted),
        ):
            expected = slow_curve(vit, images[row], heat, target, 100, filled[row], keep)
            torch.testing.assert_close(curve[row], expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(
                area[row], torch.trapezoid(expected, fractions), rtol=1e-4, atol=1e-5
            )


def test_drop_and_increase_are_equations_5_and_6(vit, images, attributions):
    with torch.no_grad():
        original = vit(images).softmax(dim=1)[range(3), TARGETS]
        ranks = rank_pixels(attributions.sum(dim=1))
        kept = vit(images * (ranks < 512).unsqueeze(1)).softmax(dim=1)[range(3), TARGETS]
    drop = average_drop(vit, images, attributions, target=TARGETS)
    torch.testing.assert_close(drop, (original - kept).clamp(min=0))
    torch.testing.assert_close(
        average_drop(vit, images, attributions, target=TARGETS, normalize=True), drop / original
    )
    increase = average_increase(vit, images, attributions, target=TARGETS)
    assert increase.tolist() == (kept > original).float().tolist()
    # Strict: an image that only shows what is kept anyway does not rise. One row a forward,
    # since a row's last digits may depend on its place in the batch.
    same = images * (ranks < 512).unsqueeze(1)
    rise = average_increase(vit, same, attributions, target=TARGETS, max_examples_per_batch=1)
    assert rise.sum() == 0


def test_evaluate_equals_the_single_metrics_with_no_forward_twice(vit, images, attributions):
    seen = []

    def forward(x):
        seen.append(x.clone())
        return vit(x)

    result = evaluate(forward, images, attributions, target=TARGETS)
    single = {
        "deletion": deletion(vit, images, attributions, target=TARGETS),
        "insertion": insertion(vit, images, attributions, target=TARGETS),
        "average_drop": average_drop(vit, images, attributions, target=TARGETS),
        "average_drop_normalized": average_drop(
            vit, images, attributions, target=TARGETS, normalize=True
        ),
        "average_increase": average_increase(vit, images, attributions, target=TARGETS),
    }
    for name, expected in single.items():
        torch.testing.assert_close(getattr(result, name), expected)
    rows = torch.cat(seen)
    # 28 steps: 29 points of deletion, 28 more of insertion, one for drop and increase.
    steps = result.fractions.numel() - 1
    assert len(rows) == 3 * (2 * steps + 2)
    originals = sum(bool(torch.equal(row, image)) for row in rows for image in images)
    assert originals == 3


def test_logits_instead_of_probabilities(vit, images, attributions):
    _, curve = deletion(vit, images, attributions, target=TARGETS, score="logit", return_curve=True)
    with torch.no_grad():
        torch.testing.assert_close(curve[:, 0], vit(images)[range(3), TARGETS])


@pytest.mark.parametrize("rows", [1, 4, 1000])
def test_results_do_not_depend_on_the_batch(vit, images, attributions, rows):
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return vit(x)

    expected = evaluate(vit, images, attributions, target=TARGETS)
    result = evaluate(forward, images, attributions, target=TARGETS, max_examples_per_batch=rows)
    assert max(sizes) <= rows
    torch.testing.assert_close(result.deletion_curve, expected.deletion_curve)
    torch.testing.assert_close(result.insertion_curve, expected.insertion_curve)
    alone = evaluate(vit, images[1:2], attributions[1:2], target=TARGETS[1])
    torch.testing.assert_close(alone.insertion[0], expected.insertion[1])


def test_additional_forward_args_follow_their_image(vit, images, attributions):
    shift = torch.tensor([0.0, 1.0, -1.0])
    together = evaluate(
        lambda x, s, name: vit(x + s[:, None, None, None]),
        images, attributions, target=TARGETS, additional_forward_args=(shift, "name"),
        max_examples_per_batch=7,
    )  # fmt: skip
    alone = evaluate(lambda x: vit(x + 1), images[1:2], attributions[1:2], target=TARGETS[1])
    torch.testing.assert_close(together.deletion[1], alone.deletion[0])


@pytest.mark.parametrize("wrong", [-1, 7])
@pytest.mark.parametrize("metric", [evaluate, deletion, insertion, average_drop, average_increase])
def test_a_target_out_of_range_of_any_image_is_found(vit, images, attributions, metric, wrong):
    """Also of one that the first forward does not see; -1 would be the last class."""
    calls = []

    def forward(x):
        calls.append(len(x))
        return vit(x)

    with pytest.raises(ValueError, match=rf"target \[0, {wrong}, 2\] is out of range"):
        metric(forward, images, attributions, target=[0, wrong, 2], max_examples_per_batch=1)
    assert calls == [1]


def test_outputs_that_are_not_finite_are_no_scores(vit, images, attributions):
    """NaN, and not a drop of 0."""

    def forward(x):
        some_removed = (x == 0).flatten(1).any(dim=1, keepdim=True) & (x[:, 2, 3, 4] > 0)[:, None]
        return torch.where(some_removed, torch.nan, vit(x))

    ranks = rank_pixels(attributions.sum(dim=1))
    bad = (images[:, 2, 3, 4] > 0) & (ranks[:, 3, 4] < 512)
    assert bad.any()
    assert not bad.all()
    options = {"target": TARGETS, "max_examples_per_batch": 5}
    for found in (
        average_drop(forward, images, attributions, **options),
        average_drop(forward, images, attributions, normalize=True, **options),
        average_increase(forward, images, attributions, **options),
        evaluate(forward, images, attributions, **options).average_drop_normalized,
        evaluate(forward, images, attributions, **options).average_increase,
    ):
        assert found.isnan().tolist() == bad.tolist()


def test_of_a_negative_logit_there_is_no_share(vit, images, attributions):
    def forward(x):
        return vit(x) - 50

    drops, shares = (
        torch.cat(
            [
                average_drop(
                    forward, images, attributions, target=target, score="logit", normalize=normalize
                )
                for target in range(7)
            ]
        )
        for normalize in (False, True)
    )
    assert (drops > 0).any()
    assert shares.isnan().tolist() == (drops > 0).tolist()


def test_values_are_ranked_as_precisely_as_they_are_given(vit, images):
    """In float32 these would all be equal."""
    generator = torch.Generator().manual_seed(5)
    maps = 1 + 1e-9 * torch.rand(3, 32, 32, dtype=torch.float64, generator=generator)
    order = -rank_pixels(maps).float()
    for metric in (deletion, insertion):
        torch.testing.assert_close(
            metric(vit, images, maps, target=1), metric(vit, images, order, target=1)
        )


@pytest.mark.parametrize(
    ("maps", "error", "message"),
    [
        ([[1.0]], TypeError, "attributions is a list; wanted: a tensor of real"),
        (torch.ones(1, 2, 2) * 1j, TypeError, "complex64; wanted: a tensor of real"),
        (torch.ones(1, 3, 2, 2), ValueError, r"\(1, 3, 2, 2\); wanted: \(B, H, W\)"),
        (torch.full((1, 2, 2), torch.nan), ValueError, "NaN or infinite values"),
    ],
    ids=range(4),
)
def test_what_has_no_order_is_not_ranked(maps, error, message):
    with pytest.raises(error, match=message):
        rank_pixels(maps)


def test_ranks_are_places_in_stable_order():
    maps = torch.tensor([[[0.1, 0.5], [0.5, -1.0]]])
    assert rank_pixels(maps).tolist() == [[[2, 0], [1, 3]]]


@pytest.mark.slow
def test_a_good_map_beats_its_opposite(golden, photos, deit):
    _, inputs, targets, maps = published_map(golden, photos, deit)
    good = evaluate(deit, inputs, maps, target=targets, pixels_per_step=7168)
    bad = evaluate(deit, inputs, -maps, target=targets, pixels_per_step=7168)
    assert (good.deletion < bad.deletion).all()
    assert (good.insertion > bad.insertion).all()
    assert good.average_drop.mean() < bad.average_drop.mean()


def test_nothing_is_left_behind(vit, images, attributions):
    before = torch.get_rng_state()
    with torch.inference_mode():
        result = evaluate(vit, images.clone(), attributions.clone(), target=TARGETS)
    assert torch.equal(before, torch.get_rng_state())
    assert not result.deletion.requires_grad
    assert all(parameter.grad is None for parameter in vit.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"attributions": [1]}, TypeError, "attributions is a list; wanted: a tensor"),
        ({"attributions": torch.zeros(3, 4, 4)}, ValueError, r"\(3, 4, 4\); wanted: \(3, 3, 32"),
        (
            {"attributions": torch.full((3, 32, 32), float("nan"))},
            ValueError,
            "attributions holds NaN",
        ),
        ({"attributions": torch.ones(3, 32, 32) * 1j}, TypeError, "complex64; wanted: real"),
        ({"attributions": torch.full((3, 3, 32, 32), 3e38)}, ValueError, "channels is infinite"),
        ({"baselines": "noise"}, ValueError, "baselines is 'noise'; wanted: a number"),
        ({"baselines": None, "target": None}, ValueError, "target is None"),
        ({"baselines": [0]}, TypeError, "baselines is a list; wanted: a number"),
        ({"baselines": float("inf")}, ValueError, "baselines is inf; wanted: a finite number"),
        ({"baselines": torch.zeros(2, 3, 32, 32)}, ValueError, r"\(2, 3, 32, 32\); wanted"),
        ({"pixels_per_step": 0}, ValueError, "pixels_per_step is 0; wanted: 1 or more"),
        ({"pixels_per_step": 1.5}, TypeError, "pixels_per_step is 1.5; wanted: an int"),
        ({"score": "loss"}, ValueError, "score is 'loss'; wanted: one of logit, probability"),
        ({"max_examples_per_batch": 0}, ValueError, "max_examples_per_batch is 0"),
    ],
    ids=range(14),
)
def test_bad_input(vit, images, attributions, options, error, message):
    arguments = {
        "forward_func": vit, "inputs": images, "attributions": attributions, "target": 1,
        **options,
    }  # fmt: skip
    with pytest.raises(error, match=message):
        deletion(**arguments)


@pytest.mark.parametrize(
    ("fraction", "error"), [(0, ValueError), (1, ValueError), (2, ValueError), ("1", TypeError)]
)
def test_bad_fraction(vit, images, attributions, fraction, error):
    with pytest.raises(error, match=r"fraction_kept is .*; wanted: a number"):
        average_drop(vit, images, attributions, target=1, fraction_kept=fraction)


def test_nothing_but_the_data_goes_by_place():
    """So that a 3 meant for the target is never taken for what a removed pixel shows."""
    named = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    functions = {name: getattr(metrics, name) for name in metrics.__all__}
    for name, function in functions.items():
        if function in (metrics.Evaluation, metrics.MeanInterval):  # what is returned
            continue
        parameters = list(inspect.signature(function).parameters.values())
        names = [parameter.name for parameter in parameters]
        data = names.index("attributions") + 1 if "attributions" in names else 0
        for place, parameter in enumerate(parameters):
            optional = parameter.default is not inspect.Parameter.empty
            if optional or (data and place >= data):
                assert parameter.kind in named, (name, parameter)
    order = list(inspect.signature(metrics.minimal_deletion).parameters)[:3]
    assert order == ["forward_func", "inputs", "attributions"]  # Captum's
