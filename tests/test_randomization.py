"""The model parameter randomisation test: what passes, what fails, and an untouched model."""

import pytest
import timm
import torch
from conftest import make_vit
from scipy import stats
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import TransformerAttribution
from captum_reflected.attr.methods import METHODS
from captum_reflected.metrics import layer_names, parameter_randomization, rank_correlation

STAGES = [
    "head", "norm", "blocks.2", "blocks.1", "blocks.0", "patch_embed.proj", "pos_embed",
    "cls_token",
]  # fmt: skip


# -- Spearman ----------------------------------------------------------------------------


@pytest.mark.parametrize("levels", [None, 3, 40])
def test_spearman_is_scipys_also_with_ties(levels):
    maps = torch.randn(2, 5, 6, 9, generator=torch.Generator().manual_seed(levels or 0))
    maps[1] += maps[0]
    if levels:
        maps = (maps * levels / 4).round()
    expected = [
        stats.spearmanr(first.flatten(), second.flatten()).statistic
        for first, second in zip(maps[0], maps[1], strict=True)
    ]
    torch.testing.assert_close(
        rank_correlation(maps[0], maps[1]), torch.tensor(expected, dtype=torch.float64)
    )


def test_spearman_at_its_ends():
    maps = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    maps[3] = 0.7
    assert rank_correlation(maps, maps.exp())[:3].tolist() == [1, 1, 1]
    assert rank_correlation(maps, -maps)[:3].tolist() == [-1, -1, -1]
    assert rank_correlation(maps, maps)[3].isnan()


@pytest.mark.parametrize(
    ("first", "second", "error", "message"),
    [
        ([1], torch.ones(1, 2), TypeError, "first is a list; wanted: a tensor"),
        (torch.ones(1, 2), torch.ones(1, 2) * 1j, TypeError, "second has dtype"),
        (torch.ones(1, 2), torch.ones(2, 1), ValueError, r"\(1, 2\) and second \(2, 1\)"),
        (torch.ones(2), torch.ones(2), ValueError, r"wanted: one shape \(B, ...\)"),
        (torch.ones(1, 0), torch.ones(1, 0), ValueError, "none of it empty"),
        (torch.ones(1, 2), torch.ones(1, 2) / 0, ValueError, "second holds NaN or infinite"),
    ],
    ids=range(6),
)
def test_spearman_bad_input(first, second, error, message):
    with pytest.raises(error, match=message):
        rank_correlation(first, second)


# -- layers ------------------------------------------------------------------------------


def test_layers_are_the_blocks_and_what_is_around_them(vit):
    assert layer_names(vit) == STAGES
    wrapped = nn.Sequential(nn.BatchNorm2d(3), vit)
    assert layer_names(wrapped) == [f"1.{name}" for name in STAGES] + ["0"]
    torchvision = TorchvisionTransformer(
        image_size=32, patch_size=8, num_layers=2, num_heads=2, hidden_dim=32, mlp_dim=64
    )
    assert layer_names(torchvision) == [
        "heads.head", "encoder.ln", "encoder.layers.encoder_layer_1",
        "encoder.layers.encoder_layer_0", "encoder.pos_embedding", "conv_proj", "class_token",
    ]  # fmt: skip


@pytest.mark.parametrize("name", ["resnet18", "cait_xxs24_224", "vit_base_patch16_siglip_224"])
def test_layers_hold_every_parameter_once(name):
    with torch.device("meta"):
        model = timm.create_model(name, num_classes=3)
    held = [
        parameter
        for layer in layer_names(model)
        for parameter, _ in model.named_parameters()
        if parameter == layer or parameter.startswith(f"{layer}.")
    ]
    assert sorted(held) == sorted(parameter for parameter, _ in model.named_parameters())


# -- the test itself ---------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_it_tells_maps_of_the_model_from_maps_of_the_image(vit, images, mode):
    target = torch.tensor([2, 4, 0])
    found = {
        name: parameter_randomization(vit, METHODS[name].explain, images, target=target, mode=mode)
        for name in ("transformer_attribution", "saliency", "center_gaussian", "random")
    }
    for similarity in found.values():
        assert list(similarity) == STAGES
        assert all(value.shape == (3,) for value in similarity.values())
    for name in ("center_gaussian", "random"):
        assert all((value == 1).all() for value in found[name].values())
    for name in ("transformer_attribution", "saliency"):
        assert all((value < 0.999).all() for value in list(found[name].values())[2:5])
    if mode == "cascading":
        assert found["saliency"]["cls_token"].abs().mean() < 0.5


@pytest.mark.parametrize("mode", ["cascading", "independent"])
def test_which_weights_are_random_at_each_stage(vit, images, mode):
    trained = dict(vit.named_parameters())
    seen = []

    def explain(model, x, target):
        assert model is not vit
        seen.append({name: value.detach().clone() for name, value in model.named_parameters()})
        return x

    similarity = parameter_randomization(vit, explain, images, mode=mode, seed=5)
    assert all((value == 1).all() for value in similarity.values())
    assert len(seen) == 1 + len(STAGES)
    for stage, weights in enumerate(seen):
        layers = STAGES[:stage] if mode == "cascading" else STAGES[max(stage - 1, 0) : stage]
        for name, value in weights.items():
            inside = any(name == layer or name.startswith(f"{layer}.") for layer in layers)
            assert torch.equal(value, trained[name]) != inside, (stage, name)
    old, new = trained["blocks.1.attn.qkv.weight"], seen[4]["blocks.1.attn.qkv.weight"]
    assert new.mean().item() == pytest.approx(old.mean().item(), abs=0.02)
    assert new.std().item() == pytest.approx(old.std().item(), rel=0.05)


def test_the_seed_and_nothing_else_decides(vit, images):
    saliency = METHODS["saliency"].explain

    def run(**options):
        return torch.stack(
            list(parameter_randomization(vit, saliency, images, target=1, **options).values())
        )

    first = run()
    torch.manual_seed(11)
    before = torch.get_rng_state()
    with torch.inference_mode():
        assert torch.equal(run(), first)
    assert torch.equal(torch.get_rng_state(), before)
    assert not torch.equal(run(seed=1), first)


def test_random_numbers_of_the_method_are_the_same_ones_each_time(vit, images):
    def noise(model, x, target):
        return torch.rand_like(x)

    same = parameter_randomization(vit, noise, images, layers=["head"])
    assert (same["head"] == 1).all()


def test_absolute_attributions(vit, images):
    sign = [1.0]

    def explain(model, x, target):
        sign[0] *= -1
        return x.sum(dim=1) * sign[0]

    signed = parameter_randomization(vit, explain, images, layers=["head"])
    absolute = parameter_randomization(vit, explain, images, layers=["head"], absolute=True)
    assert (signed["head"] == -1).all()
    assert (absolute["head"] == 1).all()


@pytest.mark.parametrize("stop_at", [0, 3])
def test_the_model_is_left_as_it_was_also_after_an_error(vit, images, stop_at):
    vit.train()
    vit.head.weight.requires_grad_(False)
    before = {name: value.clone() for name, value in vit.state_dict().items()}
    flags = [parameter.requires_grad for parameter in vit.parameters()]
    calls = []

    def explain(model, x, target):
        calls.append(model)
        assert model.training
        if len(calls) > stop_at:
            raise RuntimeError("no map today")
        return METHODS["saliency"].explain(model, x, target)

    rng = torch.get_rng_state()
    with pytest.raises(RuntimeError, match="no map today"):
        parameter_randomization(vit, explain, images, target=1)
    assert len(calls) == stop_at + 1
    assert all(torch.equal(value, before[name]) for name, value in vit.state_dict().items())
    assert flags == [parameter.requires_grad for parameter in vit.parameters()]
    assert all(parameter.grad is None for parameter in vit.parameters())
    assert vit.training
    assert torch.equal(torch.get_rng_state(), rng)


def test_weights_of_equal_entries_and_half_precision_stay_usable(images):
    model = make_vit().to(torch.bfloat16)
    nn.init.zeros_(model.head.bias)
    seen = []

    def explain(model, x, target):
        seen.append(model.head.bias.detach().clone())
        return METHODS["transformer_attribution"].explain(model, x, target)

    similarity = parameter_randomization(
        model, explain, images.to(torch.bfloat16), target=torch.ones(3).long(), layers=["head"]
    )
    assert torch.isfinite(similarity["head"]).all()
    assert all((bias == 0).all() for bias in seen)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"model": lambda x: x}, TypeError, "model is a function; wanted: an nn.Module"),
        ({"explain": "rollout"}, TypeError, "explain is a str; wanted: a function"),
        ({"mode": "bottom_up"}, ValueError, "mode is 'bottom_up'; wanted: one of cascading, in"),
        ({"seed": 0.5}, TypeError, "seed is 0.5; wanted: an int"),
        ({"inputs": torch.zeros(3, 32, 32)}, ValueError, r"wanted: \(B, C, H, W\)"),
        ({"target": [1]}, ValueError, "list of 1; wanted: one entry for each"),
        ({"layers": "head"}, TypeError, "layers is the string 'head'"),
        ({"layers": []}, ValueError, "no layer to randomise"),
        ({"layers": ["heat"]}, ValueError, "names 'heat'.*such as head, norm, blocks.2"),
        ({"layers": ["head", "head"]}, ValueError, "'head' more than once"),
    ],
    ids=range(10),
)
def test_bad_input(vit, images, options, error, message):
    calls = []

    def explain(model, x, target):
        calls.append(1)
        return x

    arguments = {"model": vit, "explain": explain, "inputs": images, **options}
    with pytest.raises(error, match=message):
        parameter_randomization(**arguments)
    assert not calls


def test_maps_of_another_shape(vit, images):
    with pytest.raises(ValueError, match=r"attributions has shape \(3, 3, 16, 32\); wanted"):
        parameter_randomization(vit, lambda model, x, target: x[:, :, ::2], images)


def test_a_real_model(deit, photos):
    """What the deep layers have learned is in the map; a random network's map is another."""
    images = torch.stack(list(photos.values())[:2])
    with torch.no_grad():
        target = deit(images).argmax(dim=1)

    def explain(model, x, target):
        return TransformerAttribution(model).attribute(x, target)

    layers = ["blocks.11", "blocks.6", "blocks.0"]
    similarity = parameter_randomization(deit, explain, images, target=target, layers=layers)
    assert list(similarity) == layers
    assert (similarity["blocks.0"] < 0.8).all()
