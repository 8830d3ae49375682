"""Models of the Hugging Face hub: with a connection, from the cache, and without either."""

import os
import socket
import time

import pytest
import timm
import torch
from fake_hub import point_to
from safetensors.torch import save_file
from test_hugging_face import make_classifier, save_classifier

from captum_reflected.models import ModelLoadError, load_model

huggingface_hub = pytest.importorskip("huggingface_hub")

TIMM = "vit_tiny_patch16_224"


@pytest.fixture
def classifier(hub):
    """A classifier of transformers on the hub."""
    model = make_classifier()
    save_classifier(model, hub.folder / "someone" / "tiny")
    (hub.folder / "someone" / "tiny" / "pytorch_model.bin").write_bytes(b"a pickle")
    return model


@pytest.fixture
def in_seconds():
    """Fails if a test waits for the hub as long as the hub's own client does."""
    start = time.monotonic()
    yield
    assert time.monotonic() - start < 15


def test_a_model_of_the_hub_and_then_of_the_cache(hub, classifier, images, tmp_path, in_seconds):
    expected = classifier(images).logits
    torch.testing.assert_close(load_model("hf:someone/tiny").model(images), expected)
    assert any(path.endswith("model.safetensors") for path in hub.asked)
    assert not any(path.endswith(".bin") for path in hub.asked)
    hub.stop()
    before = dict(os.environ), dict(vars(huggingface_hub.constants))
    for name in ("hf:someone/tiny", "hf-hub:someone/tiny", "hf:someone/tiny@main"):
        torch.testing.assert_close(load_model(name).model(images), expected)
    with pytest.raises(
        ModelLoadError,
        match=rf"cannot download model someone/other: {hub.url} cannot be reached \(.+\), and it "
        rf"is not in the cache {tmp_path / 'cache'}; wanted: a connection .*HF_ENDPOINT.*, or a "
        "local folder",
    ):
        load_model("hf:someone/other")
    assert (dict(os.environ), dict(vars(huggingface_hub.constants))) == before


def test_a_model_that_the_hub_does_not_have(hub):
    with pytest.raises(ModelLoadError, match=r"cannot download model someone/none.*on the hub, or"):
        load_model("hf:someone/none")
    with pytest.raises(ModelLoadError, match="cannot download model a/b/c"):
        load_model("hf:a/b/c")


def test_a_model_of_the_hub_without_safetensors(hub, classifier):
    (hub.folder / "someone" / "tiny" / "model.safetensors").unlink()
    with pytest.raises(ModelLoadError, match=r"'hf:someone/tiny' has no model.safetensors.*pickle"):
        load_model("hf:someone/tiny")


def test_timm_from_the_hub_and_then_from_the_cache(hub, monkeypatch, in_seconds):
    repository = hub.folder / timm.get_pretrained_cfg(TIMM).hf_hub_id
    repository.mkdir(parents=True)
    model = timm.create_model(TIMM)
    torch.nn.init.normal_(model.head.bias)
    save_file(model.state_dict(), repository / "model.safetensors")
    for answers in (True, False):
        if not answers:
            hub.stop()
        loaded = load_model(TIMM)
        torch.testing.assert_close(loaded.model.state_dict(), model.state_dict(), rtol=0, atol=0)
        assert loaded.num_classes == 1000
    with pytest.raises(
        ModelLoadError,
        match=r"weights of model 'deit_tiny_patch16_224', model.safetensors of timm/deit_tiny.*"
        r"cannot be reached .*--weights FILE.safetensors",
    ):
        load_model("deit_tiny_patch16_224")


def test_downloads_are_forbidden(hub, classifier, images, monkeypatch, in_seconds):
    load_model("hf:someone/tiny")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    asked = len(hub.asked)
    load_model("hf:someone/tiny")
    for name in (TIMM, "hf:someone/other"):
        with pytest.raises(ModelLoadError, match="HF_HUB_OFFLINE forbids downloads, and it is not"):
            load_model(name)
    assert len(hub.asked) == asked


def test_a_gateway_that_does_not_reach_the_hub(hub, in_seconds):
    hub.status = 503
    with pytest.raises(ModelLoadError, match=r"cannot be reached \(status 503\)"):
        load_model("hf:someone/tiny")
    assert len(hub.asked) == 1


def test_a_host_that_never_answers(hub, monkeypatch, in_seconds):
    monkeypatch.setenv("HF_HUB_ETAG_TIMEOUT", "1")
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_ETAG_TIMEOUT", 1)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        point_to(monkeypatch, f"http://127.0.0.1:{silent.getsockname()[1]}")
        start = time.monotonic()
        with pytest.raises(ModelLoadError, match=r"cannot be reached \(.*(timed out|no answer)"):
            load_model("hf:someone/tiny")
        assert time.monotonic() - start < 4


def test_through_a_proxy(hub, classifier, images, monkeypatch):
    """The name of the hub has no address here; only the proxy knows it."""
    new_sessions = getattr(huggingface_hub, "close_session", None) or getattr(
        huggingface_hub.utils, "reset_sessions", None
    )
    if new_sessions is None:
        pytest.skip("this version of huggingface_hub has no way to read the proxies again")
    point_to(monkeypatch, "http://hub.invalid")
    for name in ("HTTP_PROXY", "http_proxy"):
        monkeypatch.setenv(name, hub.url)
    for name in ("NO_PROXY", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
    new_sessions()
    try:
        loaded = load_model("hf:someone/tiny")
        torch.testing.assert_close(loaded.model(images), classifier(images).logits)
    finally:
        monkeypatch.undo()
        new_sessions()
