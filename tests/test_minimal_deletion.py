"""The smallest share of pixels that changes a prediction, against the slow way."""

import math

import pytest
import torch
from conftest import make_vit

from captum_reflected import TransformerAttribution, demo
from captum_reflected.metrics import blur, minimal_deletion

P = 32 * 32


@pytest.fixture
def pictures():
    return torch.randn(6, 3, 32, 32, generator=torch.Generator().manual_seed(4)) + 0.3


@pytest.fixture
def model(pictures):
    """Seven classes that all have a say, so that predictions differ, and change."""
    model = make_vit()
    with torch.no_grad():
        model.head.bias -= model(pictures).mean(dim=0)
    return model


@pytest.fixture
def maps(model, pictures):
    return TransformerAttribution(model).attribute(pictures, predictions(model, pictures))


@torch.no_grad()
def predictions(model, pictures):
    return model(pictures).argmax(dim=1)


def slow_shares(model, pictures, maps, fills, step, targets=None):
    """One image, one pixel at a time: what the metric says in words. And all changes seen."""
    shares, changes = [], []
    for row, picture in enumerate(pictures):
        target = int(predictions(model, picture[None]) if targets is None else targets[row])
        order = maps[row].sum(dim=0).flatten().argsort(descending=True, stable=True).tolist()
        changed = []
        count = 0.0
        while True:
            seen = picture.clone()
            for pixel in order[: round(count * P)]:
                y, x = divmod(pixel, 32)
                seen[:, y, x] = fills[row, :, y, x]
            changed.append(int(predictions(model, seen[None])) != target)
            if count >= 1:
                break
            count = min(count + step, 1)
        places = [place for place, is_other in enumerate(changed) if is_other]
        shares.append(round(min(places[0] * step, 1) * P) / P if places else math.nan)
        changes.append(changed)
    return torch.tensor(shares), changes


@pytest.mark.parametrize("baseline", [None, 0.8, "blur", "tensor"])
@pytest.mark.parametrize("step", [1 / 16, 0.3])
def test_it_is_what_the_words_say(model, pictures, maps, baseline, step):
    given = torch.full_like(pictures, -0.5) if baseline == "tensor" else baseline
    fills = {
        None: torch.zeros_like(pictures), 0.8: torch.full_like(pictures, 0.8),
        "blur": blur(pictures), "tensor": given,
    }[baseline]  # fmt: skip
    expected, changes = slow_shares(model, pictures, maps, fills, step)
    found = minimal_deletion(
        model, pictures, maps, baselines=given, step=step, max_examples_per_batch=5
    )
    torch.testing.assert_close(found, expected, equal_nan=True)
    if baseline is None and step < 0.1:  # the cases that matter are there
        assert len(set(found.nan_to_num(2).tolist())) > 1
    halved = minimal_deletion(model, pictures, maps, baselines=given, step=step, search="binary")
    for row, changed in enumerate(changes):
        if changed == sorted(changed):  # a prediction that has changed stays another
            torch.testing.assert_close(halved[row], expected[row], equal_nan=True)


@pytest.mark.parametrize("search", ["linear", "binary"])
@pytest.mark.parametrize("decisive", [1, 40, 511, 1000, 1024])
def test_a_model_whose_answer_is_known(search, decisive):
    """Class 1 while any of the highest `decisive` pixels is left; the map is their order."""
    heat = torch.linspace(1, 0, P).reshape(1, 32, 32)
    last = (torch.arange(P).reshape(32, 32) == decisive - 1).float()

    def forward(x):
        left = (x[:, 0] * last).sum(dim=(1, 2))
        return torch.stack([0.5 - left, left - 0.5], dim=1)

    share = minimal_deletion(forward, torch.ones(1, 3, 32, 32), heat, step=1 / P, search=search)
    assert share.item() == decisive / P


@pytest.mark.parametrize("search", ["linear", "binary"])
def test_no_share_changes_it_and_none_is_needed(vit, images, search):
    heat = torch.rand(3, 32, 32, generator=torch.Generator().manual_seed(0))
    stays = minimal_deletion(lambda x: vit(x) * 0 + torch.arange(7), images, heat, search=search)
    assert stays.isnan().all()
    other = (predictions(vit, images) + 1) % 7
    needed = minimal_deletion(vit, images, heat, target=other, search=search)
    assert needed.tolist() == [0, 0, 0]


def test_a_good_map_needs_less_than_its_opposite():
    scenes, model = demo.load_scenes(), demo.load_model()
    images, targets = demo.preprocess(scenes.images[:6]), scenes.labels[:6]
    heat = TransformerAttribution(model).attribute(images, targets)
    # A prediction that stays is that of the baseline; it counts as all pixels.
    good = minimal_deletion(model, images, heat, step=0.05).nan_to_num(1)
    bad = minimal_deletion(model, images, -heat, step=0.05).nan_to_num(1)
    assert good.mean() < 0.5 * bad.mean()


@pytest.mark.parametrize("search", ["linear", "binary"])
def test_forwards_are_bounded_and_arguments_follow_their_image(model, pictures, maps, search):
    shift = torch.linspace(-1, 1, 6)
    sizes = []

    def forward(x, s, name):
        assert name == "name"
        assert not torch.is_grad_enabled()
        sizes.append(len(x))
        return model(x + s[:, None, None, None])

    options = {"step": 0.1, "search": search}
    together = minimal_deletion(
        forward,
        pictures,
        maps,
        additional_forward_args=(shift, "name"),
        max_examples_per_batch=4,
        **options,
    )
    assert max(sizes) <= 4
    for row in range(6):
        alone = minimal_deletion(
            lambda x, row=row: model(x + shift[row]),
            pictures[row : row + 1], maps[row : row + 1], **options,
        )  # fmt: skip
        torch.testing.assert_close(alone, together[row : row + 1], equal_nan=True)


def test_nothing_is_left_behind(vit, images):
    heat = torch.rand(3, 1, 32, 32, generator=torch.Generator().manual_seed(0))
    before, state = images.clone(), torch.get_rng_state()
    with torch.inference_mode():
        minimal_deletion(vit, images.clone(), heat.clone())
    minimal_deletion(vit, images, heat)
    with pytest.raises(ZeroDivisionError):
        minimal_deletion(lambda x: vit(x) / (1 // (len(x) == 3)), images, heat)
    assert torch.is_grad_enabled()
    assert torch.equal(images, before)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(parameter.grad is None for parameter in vit.parameters())


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"step": 0}, ValueError, "step is 0; wanted: a share of pixels above 0, up to 0.5"),
        ({"step": 0.6}, ValueError, "step is 0.6"),
        ({"step": "1"}, TypeError, "step is '1'"),
        ({"search": "cubic"}, ValueError, "search is 'cubic'; wanted: one of linear, binary"),
        ({"max_examples_per_batch": 0}, ValueError, "max_examples_per_batch is 0"),
        ({"attributions": torch.zeros(3, 4, 4)}, ValueError, r"\(3, 4, 4\); wanted"),
        ({"baselines": "noise"}, ValueError, "baselines is 'noise'"),
        ({"target": 1.5}, TypeError, "1.5 is a float; wanted: an int"),
        ({"inputs": torch.zeros(3, 3, 1, 1), "attributions": torch.zeros(3, 1, 1)}, ValueError,
         "images of one pixel"),
    ],
    ids=range(9),
)  # fmt: skip
def test_bad_input_is_found_before_any_forward(images, options, error, message):
    calls = []
    arguments = {"inputs": images, "attributions": torch.zeros(3, 32, 32), **options}
    with pytest.raises(error, match=message):
        minimal_deletion(calls.append, **arguments)
    assert not calls


@pytest.mark.parametrize(
    ("wrap", "target", "error", "message"),
    [
        (lambda y: (y,), None, TypeError, "returned a tuple of 0 .*; wanted: a tensor of logits"),
        (lambda y: y[:, 0], None, ValueError, r"shape \(3,\); wanted: logits \(B, C\) of two"),
        (lambda y: y[:, :1], None, ValueError, r"shape \(3, 1\); wanted"),
        (lambda y: y[:1], None, ValueError, r"shape \(1, 7\) for 3 images"),
        (lambda y: y * torch.nan, None, ValueError, "NaN or infinite values; wanted: logits"),
        (lambda y: y, 7, ValueError, r"\[7, 7, 7\] is out of range"),
        (lambda y: y, (1, 2), ValueError, r"2 index\(es\)"),
    ],
    ids=range(7),
)
def test_bad_outputs(vit, images, wrap, target, error, message):
    with pytest.raises(error, match=message):
        minimal_deletion(lambda x: wrap(vit(x)), images, torch.zeros(3, 32, 32), target=target)
