"""Equality with the golden tensors, completeness of balanced gradients, and bfloat16's maps."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor, nn

from captum_reflected import (
    AttentionRollout,
    BalancedRelevance,
    MaskRegression,
    ReflectedRelevance,
    TransformerAttribution,
    balanced,
)
from captum_reflected.attr.transformer_attribution import Rule
from captum_reflected.demo import load_model, load_scenes, preprocess
from captum_reflected.metrics import rank_correlation
from gpu_check.precision import tf32
from gpu_check.registry import Context, Report, Skipped, check

# By the precision: the dtype, whether products are in TF32, and how far values may be off, as a
# share of their maximum. Emulated on a CPU, TF32 moves DeiT-tiny's relevance by 0.008.
_PRECISIONS: Mapping[str, tuple[torch.dtype, bool, float]] = {
    "float64": (torch.float64, False, 1e-5),
    "float32": (torch.float32, False, 1e-4),
    "float32 with TF32": (torch.float32, True, 2e-2),
}
_LEAST_CORRELATION_OF_LRP = 0.999


def deviation(found: Tensor, expected: Tensor) -> float:
    """The largest difference, as a share of the largest expected value."""
    apart = (found.double().cpu() - expected.double().cpu()).abs().max()
    return float(apart / expected.abs().max())


def correlation(found: Tensor, expected: Tensor) -> float:
    """Pearson's correlation of all values."""
    values = torch.stack([found.double().cpu().flatten(), expected.double().cpu().flatten()])
    return float(torch.corrcoef(values)[0, 1])


def golden_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file of golden tensors, by key."""
    if not path.is_file():
        raise Skipped(f"there is no {path}; wanted: --reference or --golden-demo")
    with np.load(path) as arrays:
        return {key: torch.from_numpy(arrays[key]) for key in arrays.files}


def reference_folder(context: Context) -> Path:
    """The folder of reference data."""
    if context.reference is None or not (context.reference / "golden.npz").is_file():
        raise Skipped("there is no reference data; wanted: --reference or a packed folder")
    return context.reference


def deit_and_photos(reference: Path) -> tuple[nn.Module, dict[str, Tensor]]:
    """The pretrained DeiT-tiny, and the first six photos as its inputs, by name."""
    model = timm.create_model("deit_tiny_patch16_224")
    model.load_state_dict(load_file(reference / "deit_tiny_patch16_224.safetensors"))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))
    files = [entry["file"] for entry in json.loads((reference / "images.json").read_text())[:6]]
    photos = {
        file.split(".")[0]: transform(Image.open(reference / "images" / file).convert("RGB"))
        for file in files
    }
    return model.eval(), photos


@check("golden-demo", "the bundled model's relevance equals that of the published code", 20)
def golden_demo(context: Context, report: Report) -> None:
    """On the bundled model and scenes, whose golden tensors were made in float64."""
    scenes = preprocess(load_scenes().images)
    inputs = {str(index): scene for index, scene in enumerate(scenes)}
    golden = golden_tensors(context.golden_demo)
    for precision in _PRECISIONS:
        _compare(context, report, load_model(), inputs, golden, precision, 8, torch.float64)


@check("golden-deit", "DeiT-tiny's relevance on photos equals that of the published code", 20)
def golden_deit(context: Context, report: Report) -> None:
    """On the pretrained DeiT-tiny and photos; its golden tensors were made in float32."""
    reference = reference_folder(context)
    model, photos = deit_and_photos(reference)
    golden = golden_tensors(reference / "golden.npz")
    for precision in _PRECISIONS:
        _compare(context, report, model, photos, golden, precision, 16, torch.float32)


def _compare(
    context: Context,
    report: Report,
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    golden: Mapping[str, Tensor],
    precision: str,
    patch: int,
    made_in: torch.dtype,
) -> None:
    """Compares relevance, roll-out and logits in one precision.

    Args:
        context: of the check.
        report: of the check.
        model: the model.
        inputs: its images by the names that the golden tensors have.
        golden: the golden tensors.
        precision: a key of ``_PRECISIONS``.
        patch: the side of the model's patches.
        made_in: the dtype in which the golden tensors were computed.
    """
    dtype, is_tf32, most = _PRECISIONS[precision]
    explained = copy.deepcopy(model).to(context.device, dtype)

    def chosen(names: Sequence[str]) -> Tensor:
        return torch.stack([inputs[name] for name in names]).to(context.device, dtype)

    with tf32(context.device, enabled=is_tf32):
        rules: tuple[Rule, ...] = ("gradient",) if is_tf32 else ("gradient", "lrp")
        for rule in rules:
            suffix = f"/{rule}_relevance"
            keys = [key.removesuffix(suffix).split("/") for key in golden if key.endswith(suffix)]
            found = TransformerAttribution(explained, rule=rule).relevance(
                chosen([name for name, _ in keys]), [int(target) for _, target in keys]
            )
            expected = [golden[f"{name}/{target}{suffix}"] for name, target in keys]
            pairs = list(zip(found, expected, strict=True))
            worst = max(deviation(*pair) for pair in pairs)
            # LRP divides by sums that are all but zero: only float64's equals float64's.
            is_exact = rule == "gradient" or dtype == made_in == torch.float64
            title = f"{precision}, rule {rule}: relevance"
            report.measured(f"{title} off by", worst, most=most if is_exact else None)
            if not is_exact:
                least = min(correlation(*pair) for pair in pairs)
                report.measured(f"{title}, correlation", least, least=_LEAST_CORRELATION_OF_LRP)
        names = [key.split("/")[0] for key in golden if key.endswith("/rollout")]
        images = chosen(names)
        maps = AttentionRollout(explained).attribute(images, interpolate_mode="nearest")
        rolled = maps[:, 0, patch // 2 :: patch, patch // 2 :: patch].flatten(1)
        expected = [golden[f"{name}/rollout"] for name in names]
        # That of DeiT was made with another epsilon of LayerNorm.
        report.measured(
            f"{precision}: roll-out off by",
            deviation(rolled, torch.stack(expected)),
            most=max(most, 1e-4),
        )
        with torch.no_grad():
            logits = explained(images)
        expected = [golden[f"{name}/logits"] for name in names]
        report.measured(
            f"{precision}: logits off by", deviation(logits, torch.stack(expected)), most=most
        )


# -- balanced gradients ------------------------------------------------------------------

# What is added to tokens, and so carries a share of the output.
_ADDED = ("bias", "cls_token", "pos_embed", "reg_token", "dist_token")
_RANDOM_MODELS = (
    "vit_tiny_patch16_224",
    "deit_tiny_distilled_patch16_224",
    "vit_medium_patch16_reg4_gap_256",
)
_INCOMPLETE = {torch.float64: 1e-10, torch.float32: 1e-4}


def incompleteness(model: nn.Module, images: Tensor, target: int = 1) -> float:
    """How far input and bias times balanced gradient are from adding up to the output."""
    images = images.clone().requires_grad_()
    output = balanced(model)(images)[:, target]
    added = [
        parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in _ADDED) and parameter.requires_grad
    ]
    gradients = torch.autograd.grad(output.sum(), [images, *added], allow_unused=True)
    total = sum(
        float((tensor * gradient).sum().detach().double())
        for tensor, gradient in zip([images, *added], gradients, strict=True)
        if gradient is not None
    )
    return abs(total - float(output.detach().sum())) / float(output.detach().abs().sum())


@check("completeness", "input and bias times balanced gradient add up to the output", 15)
def completeness(context: Context, report: Report) -> None:
    """On models with and without distillation and register tokens, with two kinds of pooling."""
    generator = torch.Generator().manual_seed(0)
    cases: dict[str, tuple[nn.Module, Tensor]] = {
        "demo": (load_model(), preprocess(load_scenes().images[:2])),
    }
    for name in _RANDOM_MODELS:
        model = timm.create_model(name, num_classes=10)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.copy_(0.1 * torch.randn(parameter.shape, generator=generator))
        size = timm.data.resolve_model_data_config(model)["input_size"]
        cases[name] = model.eval(), torch.randn(2, *size, generator=generator)
    for name, (model, images) in cases.items():
        for dtype, most in _INCOMPLETE.items():
            moved = model.to(context.device, dtype)
            with tf32(context.device, enabled=False):
                missing = incompleteness(moved, images.to(context.device, dtype))
            report.measured(f"{name}, {str(dtype).removeprefix('torch.')}: missing", missing,
                            most=most)  # fmt: skip


# -- bfloat16 ----------------------------------------------------------------------------


@check("bf16", "maps in bfloat16 rank the pixels like those in float32", 25)
def bf16(context: Context, report: Report) -> None:
    """By Spearman's correlation, on the scenes and on photos."""
    cases = {"demo": (load_model(), preprocess(load_scenes().images[::4]))}
    if context.reference is not None:
        deit, photos = deit_and_photos(reference_folder(context))
        cases["DeiT-tiny"] = deit, torch.stack(list(photos.values()))
    for name, (model, images) in cases.items():
        model = model.to(context.device)
        images = images[: None if context.on_gpu else 1].to(context.device)
        with torch.no_grad():
            target = model(images).argmax(dim=1)
        half, halved = copy.deepcopy(model).bfloat16(), images.bfloat16()
        maps: dict[str, tuple[Tensor, Tensor, float]] = {}
        for masked in (ReflectedRelevance, MaskRegression):
            full = masked(model).attribute(images, target)
            rounded = masked(model, precision="bf16").attribute(images, target)
            maps[f'{masked.__name__}, precision="bf16"'] = full, rounded, 0.99
        for one_pass in (TransformerAttribution, BalancedRelevance):
            full = one_pass(model).attribute(images, target)
            rounded = one_pass(half).attribute(halved, target).float()
            maps[f"{one_pass.__name__}(model.bfloat16())"] = full, rounded, 0.95
        for title, (full, rounded, least) in maps.items():
            found = rank_correlation(full[:, 0].cpu(), rounded[:, 0].cpu())
            report.measured(f"{name}, {title}: mean correlation", float(found.mean()), least=least)
            report.measured(f"{name}, {title}: least correlation", float(found.min()))
