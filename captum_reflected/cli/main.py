"""The command ``captum-reflected``."""

from __future__ import annotations

import argparse
import importlib
import io
import sys
from collections.abc import Sequence

from captum_reflected import __version__
from captum_reflected._suggestions import did_you_mean
from captum_reflected.cli.parsing import EXIT_BAD_INPUT, EXIT_INTERRUPTED, refuse_unknown
from captum_reflected.errors import ModelLoadError, UnsupportedModelError, UsageError

# By command name: the module with the function add_NAME_command, and the command's help.
_COMMANDS = {
    "explain": ("captum_reflected.cli.explain", "explain what a model sees in photos"),
    "explore": ("captum_reflected.cli.explore", "explore a photo's explanation on a web page"),
    "demo": ("captum_reflected.cli.demo", "explain the scenes that come with the package"),
    "benchmark": ("captum_reflected.cli.benchmark", "score methods on many images"),
    "report": ("captum_reflected.cli.report", "report what a benchmark measured"),
    "speed": ("captum_reflected.cli.speed", "measure how fast a model is explained"),
}

_EXAMPLES = """\
examples:
  captum-reflected demo
      explain the scenes that come with the package, offline
  captum-reflected explain photo.jpg
      which parts of the photo determine the prediction of timm's pretrained DeiT-tiny?
  captum-reflected explore photo.jpg
      a web page to explore the explanation of the photo, patch by patch
  captum-reflected benchmark --preset scenes --output run
      all methods and metrics, offline; run the same command again to resume it
  captum-reflected report run
      tables with intervals, curves, a gallery and a web page
  captum-reflected speed --model vit_base_patch16_224 --random-weights
      how long does an explanation take, compared with other methods?

captum-reflected COMMAND --help lists the options of a command.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command.

    Args:
        argv: the arguments, without the program's name; ``sys.argv`` if None.

    Returns:
        int: the exit code: 0; 2 if an input was invalid; 130 if interrupted.
    """
    argv = sys.argv[1:] if argv is None else argv
    parser, command = _parsers(next((word for word in argv if word != "--"), None))
    arguments, unknown = parser.parse_known_args(argv)
    refuse_unknown(unknown, command)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # for names that the terminal cannot encode
            stream.reconfigure(errors="backslashreplace")
    try:
        code: int = arguments.run(arguments)
        return code
    except BrokenPipeError:  # as by "| head"
        print(
            "captum-reflected: stopped, since its output was closed; files already written are "
            "kept",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    except (ModelLoadError, UnsupportedModelError, UsageError, OSError) as error:
        print(f"captum-reflected: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except (MemoryError, RuntimeError) as error:
        if not _is_out_of_memory(error):
            raise
        print(
            f"captum-reflected: out of memory ({error}); wanted: a smaller --batch-size",
            file=sys.stderr,
        )
        return EXIT_BAD_INPUT
    except KeyboardInterrupt:
        print("captum-reflected: interrupted; files already written are kept", file=sys.stderr)
        return EXIT_INTERRUPTED


def _is_out_of_memory(error: Exception) -> bool:
    # Looked up late: torch takes seconds to import, and has been imported where it raises this.
    torch = sys.modules.get("torch")
    return isinstance(error, MemoryError) or (
        torch is not None and isinstance(error, torch.OutOfMemoryError)
    )


def _parsers(chosen: str | None) -> tuple[argparse.ArgumentParser, argparse.ArgumentParser]:
    """The argument parser, with the options of the chosen command only; and that command's."""
    parser = argparse.ArgumentParser(
        prog="captum-reflected",
        description="Explains the predictions of Vision Transformers.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    for name, (module, purpose) in _COMMANDS.items():
        if name == chosen:
            getattr(importlib.import_module(module), f"add_{name}_command")(commands)
        else:
            commands.add_parser(name, help=purpose)
    if chosen is not None and chosen not in _COMMANDS and not chosen.startswith("-"):
        hint = did_you_mean(chosen, _COMMANDS)
        parser.error(f"unknown command {chosen!r}; wanted: one of {', '.join(_COMMANDS)}{hint}")
    return parser, commands.choices.get(chosen or "", parser)
