"""Does a map depend on what the model has learned? The model parameter randomisation test.

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
    How alike the maps stay while the model's weights are replaced by random ones.

    From the output to the input, layer by layer, the weights are randomised, the images are
    explained anew, and the maps are compared with those of the trained model by Spearman's
    rank correlation. A method whose maps stay the same shows the image, not the model; low
    is good.

    New weights are drawn from a normal distribution with the mean and standard deviation of
    the parameter that they replace. So nothing learned is left in them, while the scale of
    the activations stays what the rest of the model is used to; weights of the usual
    initialisation would test saturated or vanishing activations as well. A parameter whose
    entries are all equal stays as it is, and so do buffers.

    All of it happens on a copy of the model: whatever is interrupted or raised, the model
    that is given keeps its weights. The copy takes the memory of one more model.

    Args:

        model (nn.Module): The trained model.
        explain (Callable): ``(model, images, target)`` to attributions, (B, C, H, W),
                    (B, 1, H, W) or (B, H, W) (channels are summed), made with the model
                    that it is given, which is the copy. Such are the ``explain`` of
                    ``captum_reflected.attr.methods.METHODS``, and
                    ``lambda model, x, target: Saliency(model).attribute(x, target)``.
                    Random numbers that it draws are the same ones each time.
        inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them.
        target (int, tuple, Tensor or list, optional): Handed to ``explain`` as it is; in
                    any of Captum's forms.
                    Default: None
        layers (Sequence[str], optional): Names of modules or parameters, in the order in
                    which they are randomised.
                    Default: None, which is :func:`layer_names` of the model
        mode (str, optional): ``"cascading"``: layers that were randomised stay so;
                    ``"independent"``: one layer is random at a time.
                    Default: ``"cascading"``
        absolute (bool, optional): Whether absolute attributions are ranked.
                    Default: False
        seed (int, optional): Of the random weights.
                    Default: 0
        show_progress (bool, optional): Whether a progress bar is shown.
                    Default: False

    Returns:
        *dict[str, Tensor]*: for each layer, in the order in which they are randomised, the
        rank correlation of each image's map with the original one, (B,), float64, on the
        CPU. NaN where a map is the same everywhere and so ranks nothing.

    Raises:
        TypeError: an argument is of a type that is not taken.
        ValueError: a name is not one of the model's, or stands twice; ``explain`` returns
                    another shape or numbers that are not finite.

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
    original = _explained(explain, changed, batch, target, absolute)
    similarity = {}
    steps = progress(
        stages.items(), description="randomisation", total=len(stages), show=show_progress
    )
    for name, parameters in steps:
        for parameter in parameters:
            _randomize(random[parameter], generator)
        maps = _explained(explain, changed, batch, target, absolute)
        similarity[name] = rank_correlation(original, maps)
        if mode == "independent":
            for parameter in parameters:
                _assign(random[parameter], trained[parameter])
    return similarity


def layer_names(model: nn.Module) -> list[str]:
    r"""
    The layers of a model from the output to the input, for :func:`parameter_randomization`.

    The items of the longest ``nn.ModuleList`` or ``nn.Sequential`` (the blocks of a Vision
    Transformer) are one layer each. Beyond them every module that holds parameters, and no
    module that does, is a layer, and so is every other parameter (class token, position
    embedding). The order is the reverse of that in which the model registers them: for the
    models of timm, torchvision and transformers, the reverse of their computation.

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
    """Names of the items of the longest list of modules, of the outermost where several are."""
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


def _explained(
    explain: Callable[[nn.Module, Tensor, Any], Tensor | tuple[Tensor]],
    model: nn.Module,
    batch: Batch,
    target: Any,
    absolute: bool,
) -> Tensor:
    """Maps (B, H, W) on the CPU."""
    # Each call starts from the caller's random state, so that only the weights differ.
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
    # Drawn on the CPU: the same weights on every device.
    noise = torch.randn(parameter.shape, generator=generator).to(values.device)
    parameter.copy_(mean + std * noise)


@torch.inference_mode(False)
@torch.no_grad()
def _assign(parameter: Tensor, values: Tensor) -> None:
    parameter.copy_(values)
