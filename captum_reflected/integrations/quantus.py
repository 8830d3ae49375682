"""This package's explanations in the form that Quantus takes (Hedström et al., JMLR 2023)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from captum.attr import Attribution
from numpy.typing import NDArray
from torch import Tensor, nn

from captum_reflected.attr.methods import find_method
from captum_reflected.metrics._maps import as_maps


def quantus_explain(
    model: nn.Module,
    inputs: NDArray[Any] | Tensor,
    targets: NDArray[Any] | Tensor | list[int],
    *,
    method: str | type[Attribution] | Callable[..., Tensor] = "transformer_attribution",
    device: str | torch.device | None = None,
    **options: Any,
) -> NDArray[np.float32]:
    r"""
    Explains a batch for Quantus, in the place of ``quantus.explain``.

    Quantus itself is not needed here: it is Quantus that calls this function, with numpy
    arrays, and with what stands in ``explain_func_kwargs``.

    Args:

        model (nn.Module): The model, images (B, C, H, W) to logits (B, K).
        inputs (ndarray or Tensor): Images (B, C, H, W), as the model takes them.
        targets (ndarray, Tensor or list[int]): (B,), whole numbers: the class to explain of
                    each image.
        method (str, type or Callable, optional): A key of
                    ``captum_reflected.attr.methods.METHODS``; a class of attributors, of this
                    package or of Captum; or a function ``(model, images, targets)`` that
                    returns attributions (B, C, H, W) or (B, H, W).
                    Default: ``"transformer_attribution"``
        device (str or torch.device, optional): Where the images go.
                    Default: None, which is where the model's parameters are
        options (Any): Of the method: arguments of the class's constructor or of the
                    function, such as ``start_layer``.

    Returns:
        *ndarray* (B, 1, H, W), float32, channels summed.

    Raises:
        TypeError: ``method`` is none of these, or inputs and targets are not what the
                    method takes.
        ValueError: the name or the shapes do not fit.

    Examples::

        >>> # metric = quantus.PixelFlipping(features_in_step=196)
        >>> # metric(model, x_batch, y_batch, explain_func=quantus_explain,
        >>> #        explain_func_kwargs={"method": "attention_rollout", "start_layer": 1})
        >>> quantus_explain(model, images.numpy(), [1, 2], method="attention_rollout").shape
        (2, 1, 32, 32)
    """
    explain = _explain(method)
    parameter = next(model.parameters(), None)
    dtype = torch.get_default_dtype() if parameter is None else parameter.dtype
    if device is None and parameter is not None:
        device = parameter.device
    images = torch.as_tensor(inputs).detach()
    if images.dim() != 4:
        raise ValueError(f"inputs has shape {tuple(images.shape)}; wanted: (B, C, H, W)")
    if not images.is_floating_point():
        raise TypeError(
            f"inputs has dtype {images.dtype}; wanted: floating point images, preprocessed as "
            "the model wants them"
        )
    # A copy, since Quantus goes on with its own arrays, which it makes float64 at times.
    images = images.to(device, dtype, copy=True)
    classes = torch.as_tensor(targets, device=device)
    size, channels, height, width = images.shape
    attributions = explain(model, images, classes, **options)
    maps = as_maps(attributions, (size, height, width), channels)
    array: NDArray[np.float32] = maps.unsqueeze(1).float().cpu().numpy()
    return array


def _explain(method: Any) -> Callable[..., Any]:
    if isinstance(method, str):
        return find_method(method).explain
    if isinstance(method, type) and issubclass(method, Attribution):
        return lambda model, images, targets, **options: method(model, **options).attribute(
            images, target=targets
        )
    if isinstance(method, type) or not callable(method):
        raise TypeError(
            f"method is {method!r}; wanted: a name, a class of attributors, or a function of "
            "(model, images, targets)"
        )
    return method  # type: ignore[no-any-return]
