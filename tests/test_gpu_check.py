"""The command that checks a device: what it reports on a CPU, and that it finds faults."""

import json
import os
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from gpu_check import pack, precision, processes, start
from gpu_check.command import main, unsuitable_packages
from gpu_check.memory import out_of_memory
from gpu_check.processes import largest_difference
from gpu_check.registry import CHECKS, Check, Context, Figure, Report, Skipped, perform

ROOT = Path(__file__).parents[1]
GOLDEN = ROOT / "tests" / "data" / "golden_demo.npz"


def run(tmp_path, *arguments):
    """The exit status, the checks of the written file by name, and all of the file."""
    output = tmp_path / "new" / "figures.json"
    status = main(["--device", "cpu", "--output", str(output), *arguments])
    written = json.loads(output.read_text())
    assert written["passed"] == (status == 0)
    return status, {check["name"]: check for check in written["checks"]}, written


def context(**options):
    values = {
        "device": torch.device("cpu"),
        "reference": None,
        "golden_demo": GOLDEN,
        "deadline": time.monotonic() + 60,
        "models": 1,
        "speed_models": (),
    }
    return Context(**{**values, **options})


def test_quick_checks_pass_and_their_figures_are_written(tmp_path, capsys):
    names = ["random-state", "threads", "out-of-memory"]
    status, checks, written = run(tmp_path, "--only", ",".join(names))
    assert status == 0
    assert list(checks) == names
    assert written["machine"]["torch"] == torch.__version__.partition("+")[0]
    assert {"commit", "device", "python", "timm", "captum"} <= set(written["machine"])
    for check in checks.values():
        assert check["outcome"] == "passed"
        assert check["seconds"] > 0
        assert check["description"]
        assert any(figure["is_met"] for figure in check["figures"])
    printed = capsys.readouterr().out
    assert all(f"s  {name}" in printed for name in names)
    assert "3 passed, 0 failed, 0 skipped" in printed


@pytest.fixture
def one_golden(tmp_path):
    """Writes a file with the golden tensors of one scene; the command's options for it."""

    def write(change=lambda relevance: relevance):
        with np.load(GOLDEN) as arrays:
            name = next(iter(arrays.files)).split("/")[0]
            tensors = {key: arrays[key] for key in arrays.files if key.split("/")[0] == name}
        key = next(key for key in tensors if key.endswith("/gradient_relevance"))
        tensors[key] = change(tensors[key])
        np.savez(tmp_path / "golden.npz", **tensors)
        return ["--golden-demo", str(tmp_path / "golden.npz"), "--only", "golden-demo"]

    return write


def test_golden_tensors(tmp_path, one_golden):
    status, checks, _ = run(tmp_path, *one_golden())
    assert status == 0
    figures = {figure["name"]: figure for figure in checks["golden-demo"]["figures"]}
    assert figures["float64, rule gradient: relevance off by"]["most"] == 1e-5
    in_tf32 = figures["float32 with TF32, rule gradient: relevance off by"]["value"]
    assert in_tf32 > 10 * figures["float32, rule gradient: relevance off by"]["value"]


def test_a_wrong_golden_tensor_fails(tmp_path, one_golden):
    status, checks, _ = run(tmp_path, *one_golden(lambda relevance: relevance * 1.1))
    assert status == 1
    assert checks["golden-demo"]["outcome"] == "failed"
    assert any("rule gradient" in problem for problem in checks["golden-demo"]["problems"])


# In a process of its own: a simulated device stays registered until it ends.
ON_SIMULATED_DEVICE = """
    import sys
    import torch
    from gpu_check import simulated
    from gpu_check.command import main
    from gpu_check.state import small_model
    from gpu_check.waiting import loops_without_waits
    from captum_reflected import ReflectedRelevance, TransformerAttribution
    from captum_reflected.inputs.devices import to_device

    assert main(["--device", "simulated", "--only", "waits", "--output", sys.argv[1]]) == 0
    device = simulated.device()
    model, images = small_model(device)
    alone, on_cpu = small_model(torch.device("cpu"))
    expected = TransformerAttribution(alone).attribute(on_cpu, 1)
    found = TransformerAttribution(model).attribute(images, 1)
    assert found.device.type == "simulated"
    assert torch.equal(found.cpu(), expected)

    def raises(work, words):
        try:
            work()
        except (RuntimeError, TypeError) as error:
            assert words in str(error), error
        else:
            raise AssertionError(words)

    def waits(x):
        if not torch.is_grad_enabled():
            x.sum().item()
        return model(x)

    def explain(forward):
        with loops_without_waits(device):
            ReflectedRelevance(forward).attribute(images, 1)

    ReflectedRelevance(waits).attribute(images, 1)
    raises(lambda: explain(waits), "_local_scalar_dense waits for the device")
    raises(lambda: model(on_cpu), "Expected all tensors to be on the same device")
    raises(lambda: images.numpy(), "can't convert")
    x = torch.arange(4, device=device)
    with simulated.waits() as log:
        x[x > 1]
        x[torch.zeros(1, dtype=torch.int64, device=device)]
        x.to("cpu", non_blocking=True)
        torch.where(x > 1, x, 0)
    assert [wait.operation for wait in log] == ["index"], log
    with simulated.waits() as log:
        moved = to_device(torch.arange(3), device)
    assert not log
    assert moved.tolist() == [0, 1, 2]
"""


@pytest.mark.slow
def test_waits_and_mixed_devices_are_found(tmp_path):
    from torch.utils import backend_registration

    if not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"):
        pytest.skip("this version of torch does not allow devices in Python")
    output = tmp_path / "waits.json"
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(ON_SIMULATED_DEVICE), str(output)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "tools")])},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    (check,) = json.loads(output.read_text())["checks"]
    chunks = [figure for figure in check["figures"] if figure["least"] is not None]
    assert len(chunks) == 7
    assert any("make_batch" in note for note in check["notes"])


def test_one_failure_does_not_stop_the_others():
    def breaks(context, report):
        report.measured("before", 1)
        raise RuntimeError("on purpose")

    def leaves_out(context, report):
        raise Skipped("for a reason")

    def misses(context, report):
        report.measured("number", float("nan"), most=1)

    failed = perform(Check("a", "", breaks), context())
    assert failed.outcome == "failed"
    assert failed.problems == ["RuntimeError: on purpose"]
    assert failed.report.figures == [Figure("before", 1.0)]
    left_out = perform(Check("b", "", leaves_out), context())
    assert (left_out.outcome, left_out.reason) == ("skipped", "for a reason")
    missed = perform(Check("c", "", misses), context())
    assert missed.outcome == "failed"
    assert json.loads(json.dumps(missed.as_json()))["figures"][0]["value"] == "nan"
    late = perform(Check("d", "", breaks), context(deadline=0.0))
    assert late.outcome == "skipped"
    assert "no time is left" in late.reason


def test_a_check_that_is_killed_leaves_its_figures():
    seen = []

    def measures(context, report):
        report.measured("first", 1)
        report.measured("second", 2, most=1)

    perform(Check("a", "", measures), context(), seen.append)
    assert [result.outcome for result in seen] == ["unfinished"] * 2
    assert len(seen[0].as_json()["figures"]) == 2  # the report goes on growing
    assert seen[0].problems


def test_what_is_measured_is_written_at_once(tmp_path, monkeypatch):
    output = tmp_path / "figures.json"
    written = []

    def dies(context, report):
        report.measured("number", 1)
        written.append(json.loads(output.read_text()))
        raise KeyboardInterrupt

    dies.__module__ = "gpu_check.state"
    monkeypatch.setitem(CHECKS, "random-state", Check("random-state", "", dies))
    with pytest.raises(KeyboardInterrupt):
        main(["--device", "cpu", "--output", str(output), "--only", "random-state"])
    assert not written[0]["passed"]
    (check,) = written[0]["checks"]
    assert (check["outcome"], check["figures"][0]["value"]) == ("unfinished", 1.0)


def test_a_check_that_would_not_end_in_time_is_not_started():
    def breaks(context, report):
        raise AssertionError

    on_gpu = context(device=torch.device("cuda"))
    skipped = perform(Check("a", "", breaks, seconds=100), on_gpu)
    assert skipped.outcome == "skipped"
    assert "it takes about 100 s, and 60 s are left" in skipped.reason


def test_a_process_that_hangs_is_ended_with_all_that_it_started(tmp_path):
    late = tmp_path / "late"
    script = f"echo begun; (sleep 2; touch {late}) & sleep 60"
    began = time.monotonic()
    with pytest.raises(RuntimeError, match="did not end in time: begun"):
        processes.run(context(), ["sh", "-c", script], most_seconds=0.5)
    assert time.monotonic() - began < 30
    time.sleep(2.5)
    assert not late.exists()


def test_a_map_that_differs_after_halving_fails(monkeypatch):
    report = Report()
    monkeypatch.setattr("gpu_check.memory.deviation", lambda *_: 0.5)
    out_of_memory(context(), report)
    assert [figure.name for figure in report.figures if figure.is_met is False] == ["map off by"]


def test_figures_meet_their_aims():
    assert Figure("", 1.0).is_met is None
    assert Figure("", 1.0, least=1.0, most=1.0).is_met
    assert Figure("", 1.1, most=1.0).is_met is False
    assert Figure("", 0.9, least=1.0).is_met is False


def test_rows_are_compared_to_the_last_number():
    row = {"a": {"deletion": 0.5, "curve": [1.0, 2.0]}}
    assert largest_difference(row, row) == 0
    assert largest_difference(row, {"a": {"deletion": 0.5, "curve": [1.0, 2.5]}}) == 0.5
    assert largest_difference(row, {"a": {"deletion": 0.5}}) == float("inf")


def test_emulated_tf32_rounds_products_alone():
    x = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))
    with precision.tf32(torch.device("cpu"), enabled=True):
        product, total = x @ x, x + x
    assert torch.equal(total, x + x)
    off = ((product - x @ x).abs() / (x.abs() @ x.abs())).max()
    assert 1e-5 < off < 2**-10
    rounded = precision._rounded(x)
    assert torch.equal(rounded, precision._rounded(rounded))
    assert ((rounded - x).abs() <= x.abs() * 2**-11).all()


def test_bad_names(capsys):
    with pytest.raises(SystemExit):
        main(["--only", "golden-demo,speeed"])
    assert "--only speeed; wanted: some of golden-demo" in capsys.readouterr().err


# -- the packed folder -------------------------------------------------------------------


def test_what_is_packed():
    needed = pack.requirements("3.12")
    assert {"captum", "timm", "torchvision", "matplotlib", "safetensors", "pytest"} <= needed
    assert not {"torch", "numpy", "scipy", "sympy", "transformers"} & needed
    assert pack.torchvision_of("2.11.0") == "0.26.0"


def test_unknown_packages_are_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"captm is not packed; wanted: some of .*captum, "):
        pack.pack(tmp_path / "new", "3.12", "2.11.0", None, frozenset(), frozenset(["captm"]))
    assert not (tmp_path / "new").exists()


def test_a_folder_that_is_too_large_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "packages.tar.xz").write_bytes(bytes(2000))
    assert pack.check_size(tmp_path) == 0
    monkeypatch.setattr(pack, "MOST_BYTES", 1999)
    assert pack.check_size(tmp_path) == 1
    assert "too large" in capsys.readouterr().err


def test_another_python_is_refused(tmp_path, monkeypatch, capsys):
    (tmp_path / "PYTHON").write_text("3.5\n")
    monkeypatch.setattr(start, "HERE", tmp_path)
    assert start.main() == 2
    assert "packed for Python 3.5" in capsys.readouterr().err


def test_unsuitable_packages_are_named(monkeypatch):
    assert unsuitable_packages() == []
    monkeypatch.setattr("importlib.metadata.version", lambda _: "0.1")
    assert any("timm is 0.1; wanted: timm>=" in line for line in unsuitable_packages())


# -- what takes longer -------------------------------------------------------------------


@pytest.mark.slow
def test_checks_in_other_processes(tmp_path):
    names = "killed,torchrun,compile,differential"
    status, checks, _ = run(tmp_path, "--only", names, "--models", "2")
    assert status == 0, checks


@pytest.mark.slow
def test_speed_and_memory(tmp_path):
    names = "memory,speed,rows,eigenvectors,kernels,speed-command"
    arguments = ["--only", names, "--speed-models", "test_vit"]
    status, checks, _ = run(tmp_path, *arguments)
    assert status == 0, checks
    names = {figure["name"] for figure in checks["speed"]["figures"]}
    assert "test_vit, ReflectedRelevance, bf16: share of the matmul peak" in names
