"""Trains the demo model from scratch and writes it with its sample of scenes.

Run as ``python tools/train_demo.py``; the files the package ships come from the
defaults.
"""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from timm.layers import PatchDropout
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn

from captum_reflected.demo._files import (
    MODEL_FILE,
    SCENES_FOLDER,
    build_model,
    preprocess,
    save_model,
    save_scenes,
)
from captum_reflected.demo.scenes import CLASS_NAMES, Scenes, generate_scenes

ARCHITECTURE = {
    "img_size": 96,
    "patch_size": 8,
    "embed_dim": 96,
    "depth": 5,
    "num_heads": 3,
    "num_classes": len(CLASS_NAMES),
}
SAMPLE_COUNT = 2 * len(CLASS_NAMES)
_PROGRESS_COUNT = 500


def split_seed(seed: int, split: str) -> int:
    """Seeds the scenes of one split so that no two splits, of any two runs, share a seed.

    Args:
        seed: The seed of the run.
        split: ``"train"``, ``"test"`` or ``"sample"``.

    Returns:
        The seed for :func:`generate_scenes`.
    """
    splits = ("train", "test", "sample")
    return len(splits) * seed + splits.index(split)


def augment(scenes: Scenes, generator: torch.Generator, bareness: float = 0.0) -> Tensor:
    """Turns, recolours and partly blackens a batch, leaving every class what it was.

    Attribution methods blank parts of a picture and read the answer, so the model has to have
    seen gaps: in half of the pictures some patches off the object are blanked, in a quarter a
    few on it as well, either black or mid-grey (zero after normalisation).

    Args:
        scenes: A batch of ``B`` scenes.
        generator: The source of randomness.
        bareness: Least share of the patches off the object that is blanked, from 0 to 1.

    Returns:
        The model's input, float32, shape ``(B, 3, H, W)``.
    """
    images, masks = preprocess(scenes.images), scenes.masks
    count, side = len(images), ARCHITECTURE["patch_size"]

    def chance(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator)

    # A half turn keeps every texture; so does any change of colours.
    if chance(1) < 0.5:
        images, masks = images.flip(2, 3), masks.flip(1, 2)
    images = images[:, torch.randperm(3, generator=generator)]
    images = images * torch.where(chance(count, 1, 1, 1) < 0.5, -1.0, 1.0)

    on_object = nn.functional.max_pool2d(masks[:, None].float(), side) > 0
    background_rate = torch.where(chance(count, 1, 1, 1) < 0.5, 0.9 * chance(count, 1, 1, 1), 0.0)
    background_rate = background_rate.clamp(min=bareness)
    object_rate = torch.where(chance(count, 1, 1, 1) < 0.25, 0.4 * chance(count, 1, 1, 1), 0.0)
    blank = chance(*on_object.shape) < torch.where(on_object, object_rate, background_rate)
    blank = blank.repeat_interleave(side, 2).repeat_interleave(side, 3)
    fill = torch.where(chance(count, 1, 1, 1) < 0.5, -1.0, 0.0)
    return torch.where(blank, fill, images)


def fit(
    model: VisionTransformer,
    scenes: Scenes,
    held_out: Scenes,
    *,
    epochs: int,
    batch_size: int,
    learning_rate: float,
    generator: torch.Generator,
) -> None:
    """Trains the model in place with AdamW, a warm-up and a cosine decay.

    Args:
        model: The model to train.
        scenes: ``S`` scenes to learn from.
        held_out: Scenes whose accuracy is printed after each epoch; nothing is chosen by it.
        epochs: Passes over the scenes.
        batch_size: Scenes a step.
        learning_rate: The highest learning rate.
        generator: Orders and augments the scenes.
    """
    decayed = [p for p in model.parameters() if p.ndim > 1]
    others = [p for p in model.parameters() if p.ndim <= 1]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": 0.05}, {"params": others, "weight_decay": 0.0}],
        betas=(0.9, 0.98),
    )
    steps_per_epoch = max(1, len(scenes.labels) // batch_size)
    total, warm_up = epochs * steps_per_epoch, max(1, epochs * steps_per_epoch // 20)
    # The unfused attention is the faster one on CPUs for so short a sequence.
    for block in model.blocks:
        block.attn.fused_attn = False

    began, step = time.monotonic(), 0
    for epoch in range(epochs):
        # Half of the tokens teach nearly as much in half the time; the end sees them all.
        sparse = epoch < 0.75 * epochs
        model.patch_drop = PatchDropout(0.5) if sparse else nn.Identity()
        model.train()
        total_loss = 0.0
        order = torch.randperm(len(scenes.labels), generator=generator)
        for batch in order[: steps_per_epoch * batch_size].split(batch_size):
            rise, fall = (step + 1) / warm_up, 0.5 + 0.5 * math.cos(math.pi * step / total)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate * min(rise, fall)
            chosen = Scenes(scenes.images[batch], scenes.masks[batch], scenes.labels[batch])
            # Met in full clutter from the start, the object goes unnoticed for many epochs.
            inputs = augment(chosen, generator, max(0.0, 1.0 - step / (0.3 * total)))
            with torch.autocast("cpu", torch.bfloat16):
                logits = model(inputs)
            loss = nn.functional.cross_entropy(logits.float(), chosen.labels)
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total_loss += loss.item()
            step += 1
        print(
            f"epoch {epoch + 1:3d}/{epochs}  loss {total_loss / steps_per_epoch:.3f}  "
            f"held-out accuracy {accuracy(model, held_out):.1%}  "
            f"{time.monotonic() - began:.0f} s",
            flush=True,
        )
    model.patch_drop = nn.Identity()


@torch.no_grad()
def accuracy(model: VisionTransformer, scenes: Scenes) -> float:
    """Measures the share of scenes whose texture the model names, in float32.

    Args:
        model: The model, left in evaluation mode.
        scenes: ``S`` scenes.

    Returns:
        A number from 0 to 1.
    """
    model.eval()
    guesses = [model(preprocess(images)).argmax(1) for images in scenes.images.split(100)]
    return float((torch.cat(guesses) == scenes.labels).double().mean())


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line.

    Args:
        arguments: What to parse in place of the process's own arguments.
    """
    parser = argparse.ArgumentParser(
        prog="python tools/train_demo.py",
        description="Train the demo Vision Transformer from scratch on generated scenes, test it "
        f"on scenes of another seed, and write {MODEL_FILE} and {SCENES_FOLDER}/*.png.",
        epilog="Example, a quick look into a folder of its own: python -m "
        "captum_reflected.demo.train --output /tmp/demo --scenes 2000 --epochs 2",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path(__file__).parent,
        metavar="DIR",
        help="folder that receives the files; the default replaces the shipped ones",
    )
    parser.add_argument(
        "--seed",
        type=int,
        default=0,
        help="fixes weights, scenes and order; same seed, threads and machine, same model",
    )
    parser.add_argument("--epochs", type=int, default=14, help="passes over the training scenes")
    parser.add_argument(
        "--scenes",
        type=int,
        default=20000,
        metavar="N",
        help="training scenes, drawn once and kept in memory at 37 kB each",
    )
    parser.add_argument(
        "--test-scenes", type=int, default=3000, metavar="N", help="scenes of the final test"
    )
    parser.add_argument("--batch-size", type=int, default=64, metavar="N", help="scenes a step")
    parser.add_argument(
        "--learning-rate",
        type=float,
        default=1.5e-3,
        metavar="RATE",
        help="peak rate, reached after a warm-up of 5%% of the steps; a cosine takes it to 0",
    )
    options = parser.parse_args(arguments)

    began = time.monotonic()
    scenes = generate_scenes(options.scenes, seed=split_seed(options.seed, "train"))
    test = generate_scenes(options.test_scenes, seed=split_seed(options.seed, "test"))
    held_out = Scenes(*(part[:_PROGRESS_COUNT] for part in (test.images, test.masks, test.labels)))
    print(f"drew {options.scenes} scenes in {time.monotonic() - began:.0f} s", flush=True)

    with torch.random.fork_rng(devices=[]):
        # timm draws weights and dropped patches from the global state.
        torch.manual_seed(options.seed)
        model = build_model(ARCHITECTURE)
        fit(
            model,
            scenes,
            held_out,
            epochs=options.epochs,
            batch_size=options.batch_size,
            learning_rate=options.learning_rate,
            generator=torch.Generator().manual_seed(options.seed),
        )

    facts = {
        "seed": options.seed,
        "training_scenes": options.scenes,
        "epochs": options.epochs,
        "test_scenes": options.test_scenes,
        "test_accuracy": accuracy(model, test),
    }
    options.output.mkdir(parents=True, exist_ok=True)
    save_model(model, ARCHITECTURE, facts, options.output)
    sample = generate_scenes(SAMPLE_COUNT, seed=split_seed(options.seed, "sample"))
    save_scenes(sample, options.output)
    print(
        f"test accuracy {facts['test_accuracy']:.2%} on {options.test_scenes} scenes; "
        f"wrote {options.output} after {time.monotonic() - began:.0f} s in all"
    )


if __name__ == "__main__":
    main()
