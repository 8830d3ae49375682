"""The command ``captum-reflected explain``."""

from __future__ import annotations

import argparse
import errno
import io
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from captum_reflected._writing import write_whole
from captum_reflected.attr._base import recommended_start_layer
from captum_reflected.attr.methods import METHODS, find_method
from captum_reflected.cli.options import (
    EXIT_BAD_INPUT,
    EXIT_OK,
    add_model_options,
    load_from,
    method_name,
    resolve_device,
    whole_number,
)
from captum_reflected.errors import UsageError
from captum_reflected.models import LoadedModel
from captum_reflected.models.pictures import UNREADABLE, read_picture
from captum_reflected.report.figures import save
from captum_reflected.visualization.maps import comparison_grid

# Errors that concern a single file. Other errors of the disk would also occur for the next file.
_SINGLE_FILE_ERRORS = {errno.ENAMETOOLONG, errno.EILSEQ, errno.EINVAL, errno.EISDIR}

_EXAMPLES = """\
examples:
  captum-reflected explain photo.jpg
      why does timm's pretrained DeiT-tiny see what it sees in the photo?
  captum-reflected explain *.jpg --model vit_base_patch16_224 --output maps
      many photos, another model
  captum-reflected explain photo.jpg --model deit_tiny_patch16_224 \\
      --weights deit_tiny.safetensors --target "tabby" --method integrated_gradients
      local weights, a class by its name, another method to compare with
  captum-reflected explain photo.jpg --model open_clip:ViT-B-32/openai \\
      --classes "dog,cat" --target dog
      what in the photo looks like the words "a photo of a dog."?
"""


def add_explain_command(commands: Any) -> None:
    """Adds the subcommand ``explain``."""
    explain = commands.add_parser(
        "explain",
        description="Prints the five likeliest classes of each image and writes, for one class,\n"
        "NAME.METHOD.png (the image, and the image with the map as a heat map)\n"
        "and NAME.METHOD.npy (the map itself, height x width, float32).",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    explain.add_argument("images", nargs="+", type=Path, metavar="IMAGE", help="image files")
    add_model_options(explain, default="deit_tiny_patch16_224")
    explain.add_argument(
        "--target",
        default="auto",
        metavar="CLASS",
        help='class to explain, by number or by name; "auto" for the predicted class '
        "(default: %(default)s)",
    )
    explain.add_argument(
        "--method",
        default="mask_regression",
        type=method_name,
        help=f"one of {', '.join(METHODS)}; options of the attributor follow after colons, such as "
        "mask_regression:forwards=50 (default: %(default)s)",
        metavar="METHOD",
    )
    explain.add_argument(
        "--start-layer",
        type=whole_number(0),
        metavar="N",
        help="first attention layer of the roll-out (default: 0; for CLIP models the last layer, "
        "as in published code)",
    )
    explain.add_argument(
        "--batch-size",
        type=whole_number(1),
        default=8,
        metavar="N",
        help="images explained at once (default: %(default)s)",
    )
    explain.add_argument(
        "--output",
        type=Path,
        default=Path("explanations"),
        metavar="DIR",
        help="folder for the results, created if missing (default: %(default)s)",
    )
    explain.set_defaults(run=_explain)


def _explain(arguments: argparse.Namespace) -> int:
    options = _method_options(arguments)
    loaded = load_from(arguments, resolve_device(arguments.device))
    target = _find_class(arguments.target, loaded)
    start = recommended_start_layer(loaded.model)
    if start and find_method(arguments.method).rolls_out and not options:
        print(
            f"attention is rolled out from layer {start} on, as in published code for such models; "
            "use --start-layer 0 to roll out all layers"
        )
    arguments.output.mkdir(parents=True, exist_ok=True)
    done = 0
    with tqdm(total=len(arguments.images), desc="explaining", unit="image", disable=None) as bar:
        for jobs in _batches(arguments.images, loaded, arguments.batch_size, bar):
            images = torch.stack([image for _, _, image in jobs])
            logits, heat, explained = _explain_batch(
                loaded, images, target, arguments.method, options
            )
            for row, (path, name, _) in enumerate(jobs):
                bar.update()
                problem = _not_finite(logits[row], heat[row])
                if problem:
                    tqdm.write(f"captum-reflected: no map of {path}: {problem}", file=sys.stderr)
                    continue
                summary = _top_classes(logits[row], loaded)
                label = f"{loaded.class_name(int(explained[row]))}"
                figure = comparison_grid(
                    loaded.to_pictures(images[row : row + 1]),
                    {find_method(arguments.method).title: heat[row : row + 1]},
                    labels=[label],
                    size=3.2,
                )
                stem = arguments.output / f"{name}.{arguments.method.replace(':', '.')}"
                array = io.BytesIO()
                np.save(array, heat[row].float().numpy())
                try:
                    write_whole(Path(f"{stem}.png"), save(figure, "png", dpi=150))
                    write_whole(Path(f"{stem}.npy"), array.getvalue())
                except OSError as error:
                    if error.errno not in _SINGLE_FILE_ERRORS:
                        raise
                    tqdm.write(
                        f"captum-reflected: cannot write the map of {path}: {error}",
                        file=sys.stderr,
                    )
                    continue
                tqdm.write(f"{path}\n{summary}\n  explained: {label} -> {stem}.png, {stem}.npy")
                done += 1
    return EXIT_OK if done == len(arguments.images) else EXIT_BAD_INPUT


def _not_finite(logits: Tensor, heat: Tensor) -> str | None:
    """Why an image has no explanation; None if it has one."""
    if not bool(logits.isfinite().all()):
        return "the model's output holds NaN or infinite values"
    if not bool(heat.isfinite().all()):
        return "the map holds NaN or infinite values"
    return None


def _method_options(arguments: argparse.Namespace) -> dict[str, int]:
    """The options of the method that the user set on the command line."""
    if arguments.start_layer is None:
        return {}
    if not find_method(arguments.method).rolls_out:
        names = ", ".join(name for name, method in METHODS.items() if method.rolls_out)
        raise UsageError(
            f"method {arguments.method!r} takes no start layer; wanted: one of {names}"
        )
    return {"start_layer": arguments.start_layer}


def _batches(
    paths: Sequence[Path], loaded: LoadedModel, size: int, bar: tqdm[None]
) -> Iterator[list[tuple[Path, str, Tensor]]]:
    """The readable images as (path, output name, model input), ``size`` at a time."""
    jobs: list[tuple[Path, str, Tensor]] = []
    for path, name in zip(paths, _unique_stems(paths), strict=True):
        try:
            image = loaded.transform(read_picture(path))
        except UNREADABLE as error:
            tqdm.write(f"captum-reflected: cannot read {path}: {error}", file=sys.stderr)
            bar.update()
            continue
        jobs.append((path, name, image))
        if len(jobs) == size:
            yield jobs
            jobs = []
    if jobs:
        yield jobs


def _unique_stems(paths: Sequence[Path]) -> list[str]:
    """A unique file name for each path, even if images in two folders have the same name."""
    taken: set[str] = set()
    names = []
    for path in paths:
        name, count = path.stem, 1
        while name.casefold() in taken:  # some file systems ignore case
            count += 1
            name = f"{path.stem}-{count}"
        taken.add(name.casefold())
        names.append(name)
    return names


def _explain_batch(
    loaded: LoadedModel,
    images: Tensor,
    target: int | None,
    method: str,
    options: Mapping[str, int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Logits (B, K), maps (B, H, W) and explained classes (B,), all on the CPU.

    A map is NaN where the logits are not finite.
    """
    images = images.to(next(loaded.model.parameters()).device)
    with torch.no_grad():
        logits = loaded.model(images)
    explained = (
        logits.argmax(dim=-1)
        if target is None
        else logits.new_tensor([target] * len(images)).long()
    )
    heat = images.new_full((len(images), *images.shape[-2:]), torch.nan)
    usable = logits.isfinite().all(dim=-1)
    if bool(usable.any()):
        try:
            found = find_method(method).explain(
                loaded.model, images[usable], explained[usable], **options
            )
        except ValueError as error:  # the model or an option does not fit the method
            raise UsageError(str(error)) from error
        heat[usable] = found.detach().to(heat)
    return logits.cpu(), heat.cpu(), explained.cpu()


def _top_classes(logits: Tensor, loaded: LoadedModel) -> str:
    values, classes = logits.softmax(dim=-1).topk(min(5, logits.numel()))
    return "\n".join(
        f"  {value:6.1%}  {loaded.class_name(index)} ({index})"
        for value, index in zip(values.tolist(), classes.tolist(), strict=True)
    )


def _find_class(text: str, loaded: LoadedModel) -> int | None:
    """The index of the class that the user named by number, by name or by part of a name."""
    if text == "auto":
        return None
    count = loaded.num_classes
    if not text.strip():
        raise UsageError("target is blank; wanted: a class, by number or by name")
    if text.isdecimal():
        if len(text) > 9 or int(text) >= count:
            raise UsageError(
                f"target {text} is out of range; wanted: one of the classes 0 to {count - 1} of "
                f"model {loaded.name!r}"
            )
        return int(text)
    names = loaded.class_names or ()
    wanted = text.strip().lower()
    exact = [
        index
        for index, name in enumerate(names)
        if wanted in (name.lower(), *(part.strip().lower() for part in name.split(",")))
    ]
    found = exact or [index for index, name in enumerate(names) if wanted in name.lower()]
    if len(found) != 1:
        some = "; ".join(f"{index} {names[index]}" for index in found[:8])
        raise UsageError(
            f"target {text!r} names {len(found)} of the {count} classes of model {loaded.name!r}"
            f"{': ' + some if some else ''}; wanted: one class, by number or by name"
        )
    return found[0]
