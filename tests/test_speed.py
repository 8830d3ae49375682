"""The speed command: what it counts is right, and its table is whole."""

import pytest
import torch
from conftest import make_vit
from torch import nn

from captum_reflected import TransformerAttribution
from captum_reflected.cli.main import main
from captum_reflected.cli.measuring import Measurement, flops_of, measure, slope
from captum_reflected.cli.speed_report import large_image, scaling, table
from captum_reflected.cli.speed_tasks import Task
from captum_reflected.masking.masked_forward import masked_forward

CPU = torch.device("cpu")


def vit_flops(images, tokens, width, depth, patch_pixels, classes):
    """Two for each multiplication of a Vision Transformer's products, with attention."""
    block = tokens * 12 * width**2 + 2 * tokens**2 * width
    return 2 * images * (patch_pixels * (tokens - 1) * width + depth * block + width * classes)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_flops_of_a_forward(mode):
    images = torch.randn(2, 3, 32, 32)
    with mode():
        assert flops_of(lambda: make_vit()(images)) == vit_flops(2, 17, 32, 3, 192, 7)


def test_flops_of_the_fast_forward_are_fewer():
    model, images = make_vit(), torch.randn(1, 3, 32, 32)
    with torch.no_grad():
        fast = masked_forward(model, images, (4, 4), 0.0)
        flops = flops_of(lambda: fast(torch.zeros(8, dtype=torch.int64), torch.rand(8, 4, 4)))
    last_mlp = 16 * 8 * 32**2  # of all tokens but one
    projection = 192 * 16 * 32
    assert flops == vit_flops(8, 17, 32, 3, 192, 7) - 2 * 8 * (last_mlp + projection)


def test_flops_count_the_backward():
    model, images = make_vit(), torch.randn(2, 3, 32, 32)
    forward = vit_flops(2, 17, 32, 3, 192, 7)
    TransformerAttribution(model).attribute(images, 1)  # what is proved once a model
    flops = flops_of(lambda: TransformerAttribution(model).attribute(images, 1))
    # Gradients of the tokens cost one more forward, and of the attention's operands a bit;
    # those of the weights are not made.
    assert 1.5 * forward < flops < 2.6 * forward


def test_memory_is_that_of_the_task():
    held = [torch.ones(2**24)]

    def task():
        torch.ones(3 * 2**23).sum()  # 96 MiB
        held.append(torch.ones(2**22))  # 16 MiB that stay

    cost = measure({"task": task}, CPU, 1)["task"]
    assert cost.seconds > 0
    assert cost.flops == 0
    if cost.peak_bytes is not None:
        assert 90 * 2**20 < cost.peak_bytes < 130 * 2**20


def test_repetitions_take_turns():
    order = []
    tasks = {name: lambda name=name: order.append(name) for name in "ab"}
    measure(tasks, CPU, 2)
    assert order == list("abababab"[:6])


def test_exponent():
    assert slope([1, 2, 4, 8], [3, 12, 48, 192]) == pytest.approx(2)


def test_a_linear_layer_that_autograd_differentiates_is_counted():
    layer, x = nn.Linear(8, 4), torch.randn(3, 8, requires_grad=True)
    assert flops_of(lambda: torch.autograd.grad(layer(x).sum(), x)) == 2 * 2 * 3 * 8 * 4


@pytest.mark.slow
def test_the_table(tmp_path, capsys):
    output = tmp_path / "speed.md"
    arguments = ["speed", "--model", "demo", "--repeats", "1", "--batch-size", "8"]
    assert main([*arguments, "--output", str(output)]) == 0
    text = output.read_text()
    assert capsys.readouterr().out == text
    rows = [line.split(" | ") for line in text.splitlines() if line.startswith("| ")][1:]
    titles = [row[0].removeprefix("| ") for row in rows]
    for title in (
        "144 plain forwards in batches of 8",
        "ReflectedRelevance",
        'ReflectedRelevance, precision="bf16"',
        "ReflectedRelevance, generic path",
        "TransformerAttribution of 16",
        "BalancedRelevance of 16",
        "metrics.evaluate",
        "Captum IntegratedGradients, 50 steps",
        "Captum Occlusion, patch by patch",
        "naive loop of the paper",
    ):
        assert titles.count(title) == 1
    assert all(float(row[2]) > 0 and float(row[7]) > 0 for row in rows)
    for row in rows:
        against = row[8].removesuffix(" |")
        assert any(title.startswith(against) for title in titles)


def test_ratios_are_to_the_fastest_row_of_a_name():
    seconds = {
        "4 forwards in batches of 1": 2.0,
        "4 forwards in batches of 2": 1.0,
        "4 forwards, otherwise": 0.5,
        "map": 3.0,
    }
    against = {"map": "4 forwards", "4 forwards in batches of 1": "4 forwards"}
    tasks = [Task(title, lambda: None, 4, against.get(title, "")) for title in seconds]
    measured = {title: Measurement(value, 10, None) for title, value in seconds.items()}
    rows = table(tasks, measured, {torch.float32: 1.0}).splitlines()[2:]
    assert [row.split(" | ")[-2] for row in rows] == ["2.000", "1.000", "1.000", "3.000"]


def test_only_a_large_image(capsys):
    arguments = ["speed", "--model", "vit_tiny_patch16_224", "--random-weights", "--no-table"]
    assert main([*arguments, "--image-size", "64"]) == 0
    output = capsys.readouterr().out
    assert "64 x 64 pixels" in output
    assert "plain forwards" not in output


def test_tf32_is_set_for_the_run_alone(monkeypatch, capsys):
    seen = []

    def measured(*_):
        seen.append(torch.get_float32_matmul_precision())
        return "done"

    monkeypatch.setattr("captum_reflected.cli.run_speed.speed_table", lambda *_, **__: measured())
    for options in ([], ["--tf32"]):
        assert main(["speed", "--model", "demo", "--device", "cpu", *options]) == 0
    assert seen == ["highest", "high"]
    assert torch.get_float32_matmul_precision() == "highest"


def test_nothing_to_measure(capsys):
    assert main(["speed", "--model", "demo", "--no-table"]) == 2
    assert "--no-table leaves nothing to measure; wanted: --photos" in capsys.readouterr().err


def test_no_large_image_of_no_size(capsys):
    with pytest.raises(SystemExit) as exit:
        main(["speed", "--image-size", "0"])
    assert exit.value.code == 2
    assert "--image-size" in capsys.readouterr().err


def test_a_large_image():
    text = large_image("vit_tiny_patch16_224", 256, CPU)
    assert "one image of 256 x 256 pixels (vit_tiny_patch16_224, random weights, N = 257)" in text


def test_the_growth_of_the_cost_is_a_table_and_a_plot(tmp_path, monkeypatch):
    points = [(1, 0.1, 10.0), (2, 0.4, 20.0), (4, 1.6, 40.0)]
    measured = dict.fromkeys(("size", "images", "depth"), points)
    monkeypatch.setattr("captum_reflected.cli.speed_report._scaling_points", lambda *_: measured)
    plot = tmp_path / "new" / "scaling.png"
    assert "| images | 1, 2, 4 | 1.00 | 2.00 |" in scaling("a model", CPU, plot)
    assert plot.read_bytes().startswith(b"\x89PNG")
