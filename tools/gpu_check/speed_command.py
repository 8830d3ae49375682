"""The command that measures the speed, run on the device."""

from __future__ import annotations

import contextlib
import io
import tempfile
from pathlib import Path

from captum_reflected.cli.main import main as captum_reflected
from gpu_check.registry import Context, Report, check


@check("speed-command", "the command captum-reflected speed runs on the device", 40)
def speed_command(context: Context, report: Report) -> None:
    """Its table is kept as a note."""
    context.skip_if_simulated("has the speed of a CPU")
    name = "vit_base_patch16_224" if context.on_gpu else "demo"
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "speed.md"
        arguments = ["speed", "--model", name, "--device", str(context.device), "--repeats", "1"]
        arguments += ["--no-others", "--tf32"]
        arguments += ["--batch-size", "64" if context.on_gpu else "8"]
        arguments += ["--random-weights"] if context.on_gpu else []
        with contextlib.redirect_stdout(io.StringIO()):
            status = captum_reflected([*arguments, "--output", str(output)])
        report.measured("exit status", status, most=0)
        report.notes.append(output.read_text(encoding="utf-8"))
