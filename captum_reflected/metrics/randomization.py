"""The model parameter randomisation test: does a map depend on what the model has learned?

Source: Adebayo et al., *Sanity Checks for Saliency Maps*, NeurIPS 2018, section 3.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_reflected._captum import progress
from captum_reflected.inputs.batch import Batch, make_batch, preserving_state
from captum_reflected.inputs.checks import check_option
from captum_reflected.metrics._maps import as_maps
from captum_reflected.metrics.correlation import rank_correlation

Mode = Literal["cascading", "independent"]


def parameter_randomization(
    model: nn.Module,
    explain: Callable[[nn.Module, Tensor, Any], Tensor | tuple[Tensor]],
    inputs: Tensor | tuple[Tensor],
    *,
    target: Any = None,
    layers: Sequence[str] | None = None,
    mode: Mode = "cascading",
    absolute: bool = False,
    seed: int = 0,
    show_progress: bool = False,
) -> dict[str, Tensor]:
    r"""
    Similarity of the maps while the model's weights are replaced by random ones.

    Layer by layer, from the output to the input, the weights are randomised, the images are
    explained again, and the maps are compared with those of the trained model by Spearman's
    rank correlation. If the maps of a method do not change, they show the image, not the model;
    lower is better.

    New weights are drawn from a normal distribution with the mean and standard deviation of
    the parameter that they replace. They contain nothing learned, but keep the scale of the
    activations that the rest of the model expects. Weights of the usual initialisation would
    also test saturated or vanishing activations. A parameter whose entries are all equal is not
    changed, and neither are buffers.

    The test runs on a copy of the model: even if it is interrupted or raises an error, the given
    model keeps its weights. The copy takes the memory of one more model.

    Args:

        model (nn.Module): The trained model.
        explain (Callable): ``(model, images, target)`` to attributions, (B, C, H, W),
                    (B, 1, H, W) or (B, H, W) (channels are summed). It has to use the model
                    that it receives, which is the copy. Examples are the ``explain`` of
                    ``captum_reflected.attr.methods.METHODS``, and
                    ``lambda model, x, target: Saliency(model).attribute(x, target)``.
                    It draws the same random numbers in each call.
        inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them.
        target (int, tuple, Tensor or list, optional): Passed to ``explain`` unchanged; in
                    any of Captum's target formats.
                    Default: None
        layers (Sequence[str], optional): Names of modules or parameters, in the order in
                    which they are randomised.
                    Default: None, which means :func:`layer_names` of the model
        mode (str, optional): ``"cascading"``: randomised layers stay randomised;
                    ``"independent"``: only one layer is random at a time.
                    Default: ``"cascading"``
        absolute (bool, optional): Whether to rank the absolute attributions.
                    Default: False
        seed (int, optional): Seed of the random weights.
                    Default: 0
        show_progress (bool, optional): Whether to show a progress bar.
                    Default: False

    Returns:
        *dict[str, Tensor]*: for each layer, in the order in which they are randomised, the
        rank correlation of each image's map with the original one, (B,), float64, on the
        CPU. NaN if a map is constant and so defines no ranking.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: a name is not in the model or occurs twice; ``explain`` returns another
                    shape or numbers that are not finite.

    Examples::

        >>> from captum_reflected import TransformerAttribution
        >>> def explain(model, images, target):
        ...     return TransformerAttribution(model).attribute(images, target)
        >>> similarity = parameter_randomization(model, explain, images, target=1)
        >>> list(similarity)[:3]
        ['head', 'norm', 'blocks.2']
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}; wanted: an nn.Module")
    if not callable(explain):
        raise TypeError(
            f"explain is a {type(explain).__name__}; wanted: a function of (model, images, target)"
        )
    check_option("mode", mode, get_args(Mode))
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(f"seed is {seed!r}; wanted: an int")
    batch = make_batch(inputs, target, None)
    stages = _stages(model, layers)

    with torch.inference_mode(False):
        changed = copy.deepcopy(model)
    trained, random = (
        dict(module.named_parameters(remove_duplicate=False)) for module in (model, changed)
    )
    generator = torch.Generator().manual_seed(seed)
    original = _explain_maps(explain, changed, batch, target, absolute)
    similarity = {}
    steps = progress(
        stages.items(), description="randomisation", total=len(stages), show=show_progress
    )
    for name, parameters in steps:
        for parameter in parameters:
            _randomize(random[parameter], generator)
        maps = _explain_maps(explain, changed, batch, target, absolute)
        similarity[name] = rank_correlation(original, maps)
        if mode == "independent":
            for parameter in parameters:
                _assign(random[parameter], trained[parameter])
    return similarity


def layer_names(model: nn.Module) -> list[str]:
    r"""
    The layers of a model from the output to the input, for :func:`parameter_randomization`.

    Each item of the longest ``nn.ModuleList`` or ``nn.Sequential`` (the blocks of a Vision
    Transformer) is one layer. Outside of it, every module with parameters, but without children
    that have parameters, is a layer, and so is every other parameter (class token, position
    embedding). The order is the reverse of the registration order. For the models of timm,
    torchvision and transformers, this is the reverse of the order of computation.

    Args:

        model (nn.Module): Any model.

    Returns:
        *list[str]*: names of modules and parameters.
    """
    blocks = _blocks(model)
    names = []
    for parameter, _ in reversed(list(model.named_parameters())):
        owner = parameter.rpartition(".")[0]
        inside = [block for block in blocks if parameter.startswith(f"{block}.")]
        is_leaf = owner and not any(
            True for child in model.get_submodule(owner).children() for _ in child.parameters()
        )
        names.append(inside[0] if inside else owner if is_leaf else parameter)
    return list(dict.fromkeys(names))


def _blocks(model: nn.Module) -> list[str]:
    """Names of the items of the longest list of modules; of several, the outermost one."""
    longest: list[str] = []
    for name, module in model.named_modules():
        if isinstance(module, (nn.ModuleList, nn.Sequential)):
            items = [
                f"{name}.{child}" if name else child
                for child, item in module.named_children()
                if any(True for _ in item.parameters())
            ]
            longest = max(longest, items, key=len)
    return longest


def _stages(model: nn.Module, layers: Sequence[str] | None) -> dict[str, list[str]]:
    """The names of the parameters of each layer."""
    if isinstance(layers, str):
        raise TypeError(f"layers is the string {layers!r}; wanted: a sequence of names")
    names = layer_names(model) if layers is None else list(layers)
    if not names:
        raise ValueError("there is no layer to randomise; wanted: a model with parameters")
    parameters = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    stages: dict[str, list[str]] = {}
    for name in names:
        found = [part for part in parameters if part == name or part.startswith(f"{name}.")]
        if not found:
            raise ValueError(
                f"layers names {name!r}, and the model has no parameters of that name; wanted: "
                f"names of its modules or parameters, such as {', '.join(layer_names(model)[:3])}"
            )
        if name in stages:
            raise ValueError(f"layers names {name!r} more than once; wanted: each layer once")
        stages[name] = found
    return stages


def _explain_maps(
    explain: Callable[[nn.Module, Tensor, Any], Tensor | tuple[Tensor]],
    model: nn.Module,
    batch: Batch,
    target: Any,
    absolute: bool,
) -> Tensor:
    """Maps (B, H, W) on the CPU."""
    # Every call starts from the same random state, so that only the weights differ.
    with preserving_state(batch, gradients=True, forward_func=explain) as call:
        attributions = explain(model, call.images, target)
        size, channels, height, width = call.images.shape
        maps = as_maps(attributions, (size, height, width), channels)
    return (maps.abs() if absolute else maps).cpu()


@torch.inference_mode(False)
@torch.no_grad()
def _randomize(parameter: Tensor, generator: torch.Generator) -> None:
    if not parameter.is_floating_point():
        return
    values = parameter.float()
    mean, std = values.mean(), values.std(correction=0)
    # Drawn on the CPU, to get the same weights on every device.
    noise = torch.randn(parameter.shape, generator=generator).to(values.device)
    parameter.copy_(mean + std * noise)


@torch.inference_mode(False)
@torch.no_grad()
def _assign(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)
