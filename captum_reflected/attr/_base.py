"""Base classes and helpers of the attributors: argument checks, the call, the enlarged map."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from inspect import Parameter, signature
from typing import Any, Literal, get_args

from captum.attr import Attribution, LayerAttribution
from torch import Tensor

from captum_reflected._captum import log_usage
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._captum_options import explain_captum_options
from captum_reflected.inputs.batch import Batch, Images, make_batch, preserving_state
from captum_reflected.inputs.checks import check_finite, check_forward_func, check_option
from captum_reflected.inputs.modules import modules_of

InterpolateMode = Literal["bilinear", "bicubic", "nearest", "nearest-exact", "area"]


class TokenAttribution(Attribution):
    """Base of the attributors that score image tokens and enlarge the scores to the image.

    A subclass computes the token scores in :meth:`_saliency`. The argument checks and the format
    of the result are the same for all subclasses.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        token_layout: TokenLayout | None = None,
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs it and
                        returns logits of shape (B, C), or an object with these as its
                        ``logits``, as Hugging Face's models do.
            token_layout (TokenLayout, optional): The positions of the image tokens. If None,
                        they are read from the model's attributes, or else inferred from the
                        number of tokens and the image size.
                        Default: None

        Raises:

            TypeError: ``forward_func`` is not callable, or ``token_layout`` not a
                        :class:`TokenLayout`.
        """
        check_forward_func(forward_func)
        if token_layout is not None and not isinstance(token_layout, TokenLayout):
            raise TypeError(
                f"token_layout is a {type(token_layout).__name__}; wanted: "
                "TokenLayout(num_prefix_tokens, grid_size)"
            )
        super().__init__(forward_func)
        self.token_layout = token_layout

    def __repr__(self) -> str:
        """The class, the model's class, and the options that differ from their defaults."""
        function = self.forward_func
        model = getattr(function, "__name__", type(function).__name__)
        owner = getattr(function, "__self__", None)
        shown = [model if owner is None else f"{type(owner).__name__}.{model}"]
        return f"{type(self).__name__}({', '.join([*shown, *self.changed_options()])})"

    def changed_options(self) -> list[str]:
        """The options that differ from their defaults, such as ``"forwards=50"``."""
        return [
            f"{name}={value!r}"
            for name, parameter in signature(type(self)).parameters.items()
            if parameter.kind is Parameter.KEYWORD_ONLY
            and (value := self._option(name, parameter.default)) != parameter.default
        ]

    def _option(self, name: str, default: Any) -> Any:
        """The value of an option of the constructor; the default if it is not kept."""
        return getattr(self, name, default)

    @log_usage
    @explain_captum_options
    def attribute(
        self,
        inputs: Images,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        interpolate_mode: InterpolateMode = "bilinear",
    ) -> Images:
        r"""
        Computes the attribution map of each image.

        Args:

            inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them. The
                        map is aligned with these pixels, so ``forward_func`` must not crop, flip
                        or shift them.
            target (int, tuple, Tensor or list, optional): Output to explain: one index for all
                        images, or one for each, as a (B,) integer tensor, a list of ints or a
                        list of tuples. May be None if the output has one number per image, or if
                        the map does not depend on the target.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of ``forward_func``, a
                        tuple if more than one.
                        Default: None
            interpolate_mode (str, optional): How the token map is enlarged to (H, W).
                        Default: ``"bilinear"``

        Returns:
            *Tensor* or *tuple[Tensor]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor]*):
                        Shape and dtype of the inputs, the same in every channel. The class
                        documents the range of the values.

        Raises:
            TypeError: inputs or target have an unsupported type.
            ValueError: shapes or values do not fit; the message says what was given.
            UnsupportedModelError: the model cannot be explained this way; the message says
                        what was found and what is wanted.
        """
        check_option("interpolate_mode", interpolate_mode, get_args(InterpolateMode))
        batch = make_batch(inputs, target, additional_forward_args)
        with preserving_state(batch, gradients=True, forward_func=self.forward_func) as call:
            saliency, layout = self._saliency(call)
            attributions: Images = enlarge(saliency, layout, call, interpolate_mode)
        return attributions

    def _saliency(self, call: Batch) -> tuple[Tensor, TokenLayout]:
        """The scores of the image tokens, (B, J), and the layout; called with gradients on."""
        raise NotImplementedError

    def attribute_future(self) -> None:
        """Not available; use :meth:`attribute`."""
        raise NotImplementedError("attribute_future is not available; use attribute")


def check_start_layer(start_layer: Any) -> None:
    """Raises TypeError or ValueError unless it is ``None`` or a whole number of 0 or more."""
    if start_layer is not None and (
        not isinstance(start_layer, int) or isinstance(start_layer, bool)
    ):
        raise TypeError(f"start_layer is {start_layer!r}; wanted: an int or None")
    if start_layer is not None and start_layer < 0:
        raise ValueError(f"start_layer is {start_layer}; wanted: 0 or more")


def recommended_start_layer(forward_func: Callable[..., Any]) -> int:
    """The first layer of the roll-out that a model recommends; 0 if it recommends none.

    A :class:`~captum_reflected.models.ZeroShotClassifier` has a recommendation, which is also
    found inside another module or a function.
    """
    layers = (
        getattr(module, "recommended_start_layer", None) for module in modules_of(forward_func)
    )
    return next((layer for layer in layers if layer is not None), 0)


def first_layer(start_layer: int | None, forward_func: Callable[..., Any]) -> int:
    """The given first layer of the roll-out, else the one that the model recommends."""
    return recommended_start_layer(forward_func) if start_layer is None else start_layer


def enlarge(saliency: Tensor, layout: TokenLayout, batch: Batch, mode: InterpolateMode) -> Any:
    """Enlarges token scores (B, J) to attributions in the format of the inputs, and checks them."""
    grid = saliency.reshape(-1, 1, *layout.grid_size)
    enlarged: Tensor = LayerAttribution.interpolate(grid, batch.image_size, mode)
    enlarged = enlarged.squeeze(1).to(batch.images.dtype)
    check_finite([enlarged], "the map")
    return batch.format(enlarged)


def warn_if_zero(
    zero: Tensor, reason: str = "no attention has a positive gradient towards the target"
) -> None:
    """Warns once if the relevance of any image is zero everywhere; ``zero`` is a (B,) boolean."""
    if bool(zero.any()):
        images = zero.nonzero().flatten().tolist()
        warnings.warn(
            f"the relevance is zero throughout for image(s) {images} of the batch, so their map "
            f"is zero: {reason}",
            stacklevel=5,
        )
