"""Models and images that the tests share."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from fake_hub import FakeHub, point_to
from PIL import Image
from safetensors.torch import load_file
from timm.models.vision_transformer import VisionTransformer

REFERENCE = Path(
    os.environ.get("CAPTUM_REFLECTED_REFERENCE", Path(__file__).parents[2] / "shared" / "reference")
)


# Where the tests of Captum's contract and of golden tensors run; tools/gpu_check sets it.
DEVICE = os.environ.get("CAPTUM_REFLECTED_DEVICE", "cpu")
if DEVICE == "simulated":
    from gpu_check import simulated

    simulated.device()


@pytest.fixture(scope="session", autouse=True)
def exact_float32():
    """On a GPU, convolutions would be in TF32 by default."""
    torch.backends.cudnn.allow_tf32 = False


@pytest.fixture(scope="session")
def reference():
    """The folder of real weights, photos and golden tensors, where it is at hand."""
    if not (REFERENCE / "golden.npz").is_file():
        pytest.skip(
            f"reference data not found: neither $CAPTUM_REFLECTED_REFERENCE nor {REFERENCE}"
        )
    return REFERENCE


@pytest.fixture(scope="session")
def deit(reference):
    """The pretrained DeiT-tiny."""
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(reference / "deit_tiny_patch16_224.safetensors"))
    return model.eval().to(DEVICE)


@pytest.fixture(scope="session")
def golden(reference):
    """Tensors made by the authors' published code, by key."""
    with np.load(reference / "golden.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]).to(DEVICE) for key in arrays.files}


@pytest.fixture(scope="session")
def golden_demo():
    """Tensors of the shipped model, made in float64 by the authors' published code, by key."""
    with np.load(Path(__file__).parent / "data" / "golden_demo.npz") as arrays:
        return {key: torch.from_numpy(arrays[key]).to(DEVICE) for key in arrays.files}


@pytest.fixture(scope="session")
def photos(reference, deit):
    """The first six photos as model inputs, by name."""
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(deit))
    files = [entry["file"] for entry in json.loads((reference / "images.json").read_text())[:6]]
    return {
        file.split(".")[0]: transform(Image.open(reference / "images" / file).convert("RGB")).to(
            DEVICE
        )
        for file in files
    }


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A hub that answers, and an empty cache."""
    hub = FakeHub(tmp_path / "hub")
    point_to(monkeypatch, hub.url)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    yield hub
    hub.stop()


def pytest_terminal_summary(terminalreporter):
    """What became of the random models of tests/test_differential.py, if they ran."""
    differential = sys.modules.get("test_differential")
    if differential is not None and differential.COUNTS:
        terminalreporter.section("random models")
        terminalreporter.write_line(differential.table(differential.COUNTS))


def make_vit(**options) -> VisionTransformer:
    """A small random Vision Transformer whose answers differ from class to class."""
    options = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 32,
        "depth": 3,
        "num_heads": 4,
        "num_classes": 7,
        **options,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = VisionTransformer(**options)
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return model.eval().to(DEVICE)


@pytest.fixture
def vit():
    return make_vit()


@pytest.fixture
def images():
    return torch.randn(3, 3, 32, 32, generator=torch.Generator().manual_seed(1)).to(DEVICE)
