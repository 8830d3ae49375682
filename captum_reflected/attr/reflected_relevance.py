"""Reflected relevance among tokens (Sago & Hotta, ICPRAM 2024)."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Literal, get_args

import torch
from captum.attr import PerturbationAttribution
from torch import Tensor

from captum_reflected._captum import log_usage
from captum_reflected.attention.recording import check_finite
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.attr._base import InterpolateMode, enlarge, warn_if_zero
from captum_reflected.attr.transformer_attribution import Rule, TransformerAttribution
from captum_reflected.errors import UnsupportedModelError
from captum_reflected.inputs.chunks import in_chunks
from captum_reflected.inputs.request import (
    Batch,
    Images,
    Score,
    check_option,
    check_positive,
    default_rows_per_forward,
    make_batch,
    preserving_state,
    target_score,
)
from captum_reflected.masking.masked_forward import Forward, can_keep, masked_forward, plain_forward
from captum_reflected.masking.reflection import (
    Aggregate,
    Combine,
    Reflect,
    Reflection,
    combine_terms,
    component_masks,
    reflection_masks,
    regression,
    shape_masks,
    votes,
)
from captum_reflected.relevance.rollout import roll_out, weigh

Precision = Literal["bf16"]

_COMPONENTS = 20

_KEEP_WANTS = (
    "keep is {}, and forward_func is not known to take sequences of fewer tokens; wanted: a "
    "VisionTransformer of timm or torchvision in eval mode, itself and not wrapped, without hooks, "
    "autocast or additional_forward_args, and images of its own size; or keep=None"
)


class ReflectedRelevance(PerturbationAttribution):
    r"""Image tokens scored by the model itself, on images that reflect their relevance.

    The relevance matrix R of :class:`TransformerAttribution` says how much each image
    token flows into each other. For every image token j, a mask is made from its column
    of R (equations 1-2, Figure 4), the image is seen through it (equations 3-4), and the
    model scores what it sees. The map is the sum of these scores and the class token's
    relevance: one forward and backward, and J further forwards without gradients.

    The paper leaves open how two terms of very different size are added. Here each is
    brought to the range from 0 to 1 first (``combine="minmax"``); the plain sum is
    ``combine="sum"``.

    Where a faster forward, in which the reflected images are not made, is found to give the
    model's own answers (see ``captum_reflected.masking.masked_forward``), it is taken.

    References:
        Sago & Hotta, *Vision Transformer Interpretability via Prediction of Image
        Reflected Relevance Among Tokens*, ICPRAM 2024, section 3.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        *,
        rule: Rule = "gradient",
        start_layer: int | None = None,
        token_layout: TokenLayout | None = None,
        reflect: Reflect = "columns",
        scale_by_maxima: bool = True,
        combine: Combine = "minmax",
        reflected_weight: float = 1.0,
        score: Score = "logit",
        aggregate: Aggregate = "token",
        components: int | None = None,
        stride: int = 1,
        smooth: float = 0.0,
        opposites: bool = False,
        keep: int | float | None = None,
        binary: bool = False,
        precision: Precision | None = None,
    ) -> None:
        r"""
        Args:

            forward_func (Callable): The model, or any function of the images that runs
                        it and returns logits of shape (B, C).
            rule (str, optional): As in :class:`TransformerAttribution` (section 2.2). LRP
                        is reported to be patented technology in places, and
                        ``rule="gradient"`` is the default.
                        Default: ``"gradient"``
            start_layer (int, optional): As in :class:`TransformerAttribution`.
                        Default: None
            token_layout (TokenLayout, optional): As in :class:`TransformerAttribution`.
                        Default: None
            reflect (str, optional): ``"columns"`` takes mask j from column j of R, the
                        tokens that token j flows into (equations 1-3); ``"rows"`` from
                        row j, the tokens that flow into token j. ``"components"``: mask k
                        is the k-th principal component of what tokens give and take in
                        every layer, see
                        :func:`captum_reflected.masking.reflection.component_masks`.
                        Default: ``"columns"``
            scale_by_maxima (bool, optional): Whether mask j is scaled by its column's
                        maximum, min-max normalised over the columns (Figure 4, green).
                        Default: True
            combine (str, optional): ``"minmax"`` brings the scores and the class token's
                        relevance to the range from 0 to 1 before they are added (section
                        3's sum); ``"sum"`` adds them as they are. ``"square"`` is the
                        square of the former: the same order of tokens, and less of the
                        map where little is.
                        Default: ``"minmax"``
            reflected_weight (float, optional): Factor of the scores' term in that sum.
                        Default: 1.0
            score (str, optional): What is read from the model for a reflected image: the
                        target's ``"logit"`` (section 3), or its softmax
                        ``"probability"``.
                        Default: ``"logit"``
            aggregate (str, optional): What the scores make of the tokens. ``"token"``: the
                        score of reflected image j is that of token j (section 3).
                        ``"vote"``: every reflected image votes for all the tokens that it
                        shows, :math:`s = M^T w`, with w the probability, or what the
                        logit has above the median of all. ``"regression"``: scores are
                        regressed on what the images show, see
                        :func:`captum_reflected.masking.reflection.regression`.
                        Default: ``"token"``
            components (int, optional): How many masks ``reflect="components"`` makes.
                        Default: None, which is 20 there
            stride (int, optional): Every so many tokens of the grid, down and across, one
                        makes a reflected image, instead of each.
                        Default: 1
            smooth (float, optional): Standard deviation, in tokens, of the Gaussian that
                        masks are smoothed by.
                        Default: 0.0, not at all
            opposites (bool, optional): Whether another reflected image shows what each mask
                        hides: 1 less the mask.
                        Default: False
            keep (int or float, optional): How many image tokens a reflected image has, or
                        what share of them: those where its mask is highest, at their
                        positions (and in an opposite, those where it is lowest). The
                        others are not fed to the model at all, instead of black. Wants a
                        model whose sequence is known to allow it (timm's
                        VisionTransformer, torchvision's), called directly.
                        Default: None, all
            binary (bool, optional): Whether a reflected image shows tokens in full or not at
                        all: of the ``keep`` tokens where its mask is highest, or of half of
                        all tokens.
                        Default: False
            precision (str, optional): ``"bf16"`` runs the forwards of the reflected
                        images, and nothing else, in bfloat16. The ranking of the
                        tokens is all but the same.
                        Default: None, the model's own

        Raises:

            TypeError: an argument is of a type that is not taken.
            ValueError: an option is unknown or out of range.
        """
        self._transformer = TransformerAttribution(
            forward_func, rule=rule, start_layer=start_layer, token_layout=token_layout
        )
        for name, value, options in (
            ("reflect", reflect, get_args(Reflect)),
            ("combine", combine, get_args(Combine)),
            ("score", score, get_args(Score)),
            ("aggregate", aggregate, get_args(Aggregate)),
        ):
            check_option(name, value, options)
        if precision not in (None, *get_args(Precision)):
            raise ValueError(f'precision is {precision!r}; wanted: None or "bf16"')
        for name, switch in (
            ("scale_by_maxima", scale_by_maxima),
            ("opposites", opposites),
            ("binary", binary),
        ):
            if not isinstance(switch, bool):
                raise TypeError(f"{name} is {switch!r}; wanted: True or False")
        for name, number in (("reflected_weight", reflected_weight), ("smooth", smooth)):
            if isinstance(number, bool) or not isinstance(number, (int, float)):
                raise TypeError(f"{name} is {number!r}; wanted: a number")
            if not 0 <= number < float("inf"):
                raise ValueError(f"{name} is {number}; wanted: a number, 0 or more")
        check_positive("stride", stride)
        if components is not None:
            check_positive("components", components)
        if reflect == "components":
            if scale_by_maxima or stride > 1:
                raise ValueError(
                    f"reflect is 'components', scale_by_maxima is {scale_by_maxima} and stride is "
                    f"{stride}: components are no columns and have no place on the grid; wanted: "
                    "scale_by_maxima=False and stride=1"
                )
        elif components is not None:
            raise ValueError(
                f"components is {components} and reflect is {reflect!r}; wanted: "
                "reflect='components', or components=None"
            )
        if isinstance(keep, float):
            if not 0 < keep < 1:
                raise ValueError(f"keep is {keep}; wanted: a number of tokens, or a share under 1")
        elif keep is not None:
            check_positive("keep", keep)
        if aggregate == "token" and (stride > 1 or opposites or reflect == "components"):
            raise ValueError(
                f"stride is {stride}, opposites is {opposites}, reflect is {reflect!r} and "
                "aggregate is 'token', which wants one reflected image for each token; wanted: "
                "aggregate='vote' or 'regression'"
            )
        PerturbationAttribution.__init__(self, forward_func)
        self.reflect_from = reflect
        self.scale_by_maxima = scale_by_maxima
        self.combine = combine
        self.reflected_weight = reflected_weight
        self.score = score
        self.aggregate = aggregate
        self.components = _COMPONENTS if components is None else components
        self.stride = stride
        self.smooth = smooth
        self.opposites = opposites
        self.keep = keep
        self.binary = binary
        self.precision = precision
        self._may_be_fast = True  # False: every model takes the generic path

    @classmethod
    def voting(
        cls,
        forward_func: Callable[..., Any],
        *,
        components: int | None = None,
        keep: int | float | None = None,
        precision: Precision | None = None,
        **options: Any,
    ) -> ReflectedRelevance:
        r"""
        Beyond the paper: better maps from fewer reflected images.

        The image is seen twice through each mask: the half of the tokens where it is highest, and
        the other half. Each of these images votes with the probability of the target, and
        regression tells what each token adds to it. Masks are those of every second token, down
        and across, smoothed over its neighbours: J/2 images. Or, for a fraction of that whatever
        J is, the first principal components of what tokens give and take.

        It is ``ReflectedRelevance(forward_func, scale_by_maxima=False, opposites=True,
        binary=True, score="probability", aggregate="regression", combine="square")`` with
        ``reflect="rows", stride=2, smooth=1.5, reflected_weight=0.3``, or with
        ``reflect="components", reflected_weight=0.5`` where ``components`` is given; each of these
        options can be given otherwise. How they were chosen, and what did not win, stands in the
        documentation's study.

        Args:

            forward_func (Callable): As in the constructor, and so are all other arguments.
            components (int, optional): How many masks to make of principal components; 20 are
                        nearly as good as all that the default makes of 196 tokens.
                        Default: None, masks of every second token
            keep (int or float, optional): As in the constructor; with 0.5, hidden tokens are
                        left out instead of black.
                        Default: None
            precision (str, optional): As in the constructor.
                        Default: None
            **options (Any): Further arguments of the constructor.

        Returns:
            *ReflectedRelevance*.

        Examples::

            >>> attributor = ReflectedRelevance.voting(model, components=20, keep=0.5)
            >>> attributions = attributor.attribute(images, target=281)
        """
        masks: dict[str, Any] = {
            "reflect": "rows",
            "stride": 2,
            "smooth": 1.5,
            "reflected_weight": 0.3,
        }
        if components is not None:
            masks = {"reflect": "components", "components": components, "reflected_weight": 0.5}
        chosen: dict[str, Any] = {
            **masks,
            "scale_by_maxima": False,
            "opposites": True,
            "binary": True,
            "score": "probability",
            "aggregate": "regression",
            "combine": "square",
            **options,
        }
        return cls(forward_func, keep=keep, precision=precision, **chosen)

    @property
    def multiplies_by_inputs(self) -> bool:
        """False: the map is a score of image regions, not a product with the image."""
        return False

    @log_usage
    def attribute(
        self,
        inputs: Images,
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        baselines: float | Tensor | tuple[float | Tensor] | None = None,
        perturbations_per_eval: int | None = None,
        interpolate_mode: InterpolateMode = "bilinear",
        show_progress: bool = False,
    ) -> Images:
        r"""
        Args:

            inputs (Tensor or tuple[Tensor]): Images (B, C, H, W), as the model takes them. The
                        map is that of these pixels: a ``forward_func`` that crops, flips or
                        zooms them would have a map of another place.
            target (int, tuple, Tensor or list, optional): Output to explain: one index
                        for all images, or one for each, as a (B,) integer tensor, a list
                        of ints or a list of tuples. May be None only where the output
                        has one number per image.
                        Default: None
            additional_forward_args (Any, optional): Further arguments of
                        ``forward_func``, a tuple if more than one. Tensors whose first
                        dimension is B are repeated along with the images.
                        Default: None
            baselines (float or Tensor, optional): What a masked pixel shows: a number, or
                        a tensor of the inputs' shape (or with first dimension 1).
                        Default: None, which is the paper's 0
            perturbations_per_eval (int, optional): One forward sees at most this many
                        reflected images times B; where memory does not suffice, fewer.
                        The result does not depend on it. None picks a number that
                        suits the device.
                        Default: None
            interpolate_mode (str, optional): How the token map is enlarged to (H, W).
                        Default: ``"bilinear"``
            show_progress (bool, optional): Whether a progress bar is shown.
                        Default: False

        Returns:
            *Tensor* or *tuple[Tensor]* of **attributions**:
            - **attributions** (*Tensor* or *tuple[Tensor]*):
                        Shape and dtype of the inputs, the same in every channel; from 0
                        to ``1 + reflected_weight`` with ``combine="minmax"``, to the
                        square of that with ``"square"``.

        Raises:
            TypeError: inputs, target or baselines are of a type that is not taken.
            ValueError: shapes or values do not fit; the message says what was given.
            UnsupportedModelError: the model has no usable self-attention, or ``rule`` is
                        ``"lrp"`` and an operation has no rule; its name and module are told.

        Examples::

            >>> # model: a Vision Transformer, images Nx3x224x224 -> logits Nx1000
            >>> attributor = ReflectedRelevance(model)
            >>> attributions = attributor.attribute(images, target=281)
        """
        check_option("interpolate_mode", interpolate_mode, get_args(InterpolateMode))
        batch = make_batch(inputs, target, additional_forward_args)
        reflection, layout = self._reflect(batch, baselines, perturbations_per_eval, show_progress)
        with preserving_state(batch, gradients=False) as call:
            saliency = combine_terms(
                self._aggregated(reflection),
                reflection.class_relevance,
                combine=self.combine,
                reflected_weight=self.reflected_weight,
            )
            # Without relevance all reflected images are alike and say nothing.
            heard = reflection.masks.flatten(1).any(dim=-1) | reflection.class_relevance.any(dim=-1)
            warn_if_zero(~heard)
            saliency = torch.where(heard.unsqueeze(-1), saliency, 0)
            attributions: Images = enlarge(saliency, layout, call, interpolate_mode)
        return attributions

    def reflect(
        self,
        inputs: Tensor | tuple[Tensor],
        target: Any = None,
        additional_forward_args: Any = None,
        *,
        baselines: float | Tensor | tuple[float | Tensor] | None = None,
        perturbations_per_eval: int | None = None,
        show_progress: bool = False,
    ) -> Reflection:
        r"""
        What the map is made of: relevance, masks, scores (Figure 5).

        Args:

            inputs (Tensor or tuple[Tensor]): As in :meth:`attribute`, and so are all
                        further arguments.
            target (int, tuple, Tensor or list, optional): As in :meth:`attribute`.
            additional_forward_args (Any, optional): As in :meth:`attribute`.
            baselines (float or Tensor, optional): As in :meth:`attribute`.
            perturbations_per_eval (int, optional): As in :meth:`attribute`.
            show_progress (bool, optional): As in :meth:`attribute`.

        Returns:
            *Reflection*: ``relevance`` (B, N, N), ``masks`` (B, K, gh, gw), ``scores``
            (B, K) of K reflected images, ``class_relevance`` (B, J); float32 (float64 for
            float64 inputs). The reflected images themselves:
            ``reflected_images(inputs, reflection.masks)``.
        """
        batch = make_batch(inputs, target, additional_forward_args)
        return self._reflect(batch, baselines, perturbations_per_eval, show_progress)[0]

    def _reflect(
        self,
        batch: Batch,
        baselines: float | Tensor | tuple[float | Tensor] | None,
        perturbations_per_eval: int | None,
        show_progress: bool,
    ) -> tuple[Reflection, TokenLayout]:
        baseline = _check_baselines(baselines, batch.images)
        rows = _check_rows(perturbations_per_eval, batch)
        if self.keep is not None and not can_keep(self.forward_func, batch.images):
            raise UnsupportedModelError(_KEEP_WANTS.format(self.keep))
        layers, readout, layout = self._transformer.layers_and_readout(batch)
        with preserving_state(batch, gradients=False, forward_func=self.forward_func) as call:
            relevance = roll_out(layers)
            image_tokens = slice(layout.num_prefix_tokens, None)
            check_finite([relevance], "the relevance matrix")
            masks = self._masks(
                [layer[:, image_tokens, image_tokens] for layer in layers],
                relevance[:, image_tokens, image_tokens],
                layout,
            )
            del layers  # as large as R, each
            scores = self._scores(call, masks, baseline, rows, show_progress)
            check_finite([scores], "the answer of forward_func to its masked versions")
            reflection = Reflection(
                relevance=relevance,
                masks=masks,
                scores=scores,
                class_relevance=weigh(readout, relevance)[:, image_tokens],
            )
        return reflection, layout

    def _masks(self, layers: list[Tensor], relevance: Tensor, layout: TokenLayout) -> Tensor:
        """(B, K, gh, gw), from every layer's E and from R between image tokens, (B, J, J)."""
        if self.reflect_from == "components":
            masks = component_masks(layers, layout.grid_size, self.components)
        else:
            masks = reflection_masks(
                relevance,
                layout.grid_size,
                reflect=self.reflect_from,
                scale_by_maxima=self.scale_by_maxima,
            )
        masks = shape_masks(
            masks,
            stride=self.stride,
            smooth=self.smooth,
            opposites=self.opposites,
            keep=self._tokens_kept(layout.num_image_tokens),
            binary=self.binary,
        )
        if self.aggregate == "regression" and masks.shape[1] < 2:
            raise ValueError(
                f"the grid of tokens is {layout.grid_size}, stride is {self.stride} and components "
                f"is {self.components}, which makes {masks.shape[1]} reflected images; wanted: two "
                "or more to regress on"
            )
        return masks

    def _tokens_kept(self, tokens: int) -> int | None:
        """``keep`` in tokens."""
        keep = math.ceil(self.keep * tokens) if isinstance(self.keep, float) else self.keep
        if self.binary and keep is not None and keep >= tokens:
            raise ValueError(
                f"keep is {self.keep} and the model has {tokens} image tokens, so that every "
                "reflected image would show all of them; wanted: fewer, such as keep=0.5"
            )
        return keep

    def _aggregated(self, reflection: Reflection) -> Tensor:
        """(B, J): what the reflected images say of each token."""
        scores = reflection.scores
        if self.aggregate == "token":
            return scores
        if self.aggregate == "regression":
            return regression(reflection.masks, scores)
        if self.score == "logit":
            scores = (scores - scores.median(dim=-1, keepdim=True).values).clamp(min=0)
        return votes(reflection.masks, scores)

    def _scores(
        self, call: Batch, masks: Tensor, baseline: float | Tensor, rows: int, show_progress: bool
    ) -> Tensor:
        """(B, K): what the model says of every reflected image, ``rows`` at a time."""
        device, count = call.images.device, masks.shape[1]
        forward = self._masked_forward(call, masks, baseline, rows)

        def score(start: int, stop: int) -> Tensor:
            index = torch.arange(start, stop, device=device)
            image = index // count
            output = forward(image, masks[image, index % count])
            target = None if call.target is None else call.target[image]
            # The first forward shows that the target is in range.
            return target_score(
                output, target, stop - start, self.score, call.compute_dtype, in_range=start > 0
            )

        scores = in_chunks(
            score,
            call.size * count,
            rows,
            description="ReflectedRelevance",
            show_progress=show_progress,
        )
        return scores.reshape(call.size, count)

    def _masked_forward(
        self, call: Batch, masks: Tensor, baseline: float | Tensor, rows: int
    ) -> Forward:
        """The fast one where it can be had."""
        bf16 = self.precision == "bf16"
        fast = None
        if (self.keep is not None or self._may_be_fast) and not call.args:
            grid_size = (masks.shape[-2], masks.shape[-1])
            fast = masked_forward(
                self.forward_func,
                call.images,
                grid_size,
                baseline,
                bf16=bf16,
                keep=self._tokens_kept(grid_size[0] * grid_size[1]),
                forwards=masks.shape[0] * masks.shape[1],
                rows=rows,
            )
        if self.keep is not None and fast is None:
            raise UnsupportedModelError(_KEEP_WANTS.format(self.keep))
        return fast or plain_forward(self.forward_func, call, baseline, bf16=bf16)

    def attribute_future(self) -> None:
        """Not available; use :meth:`attribute`."""
        raise NotImplementedError("attribute_future is not available; use attribute")


def _check_baselines(baselines: Any, images: Tensor) -> float | Tensor:
    if isinstance(baselines, tuple) and len(baselines) == 1:
        baselines = baselines[0]
    if baselines is None:
        return 0.0
    if isinstance(baselines, bool) or not isinstance(baselines, (int, float, Tensor)):
        raise TypeError(
            f"baselines is a {type(baselines).__name__}; wanted: a number or a tensor shaped "
            "like inputs"
        )
    if not isinstance(baselines, Tensor):
        if not math.isfinite(baselines):
            raise ValueError(f"baselines is {baselines}; wanted: a finite number")
        return float(baselines)
    shape = tuple(images.shape)
    if tuple(baselines.shape) not in (shape, (1, *shape[1:])):
        raise ValueError(
            f"baselines has shape {tuple(baselines.shape)}; wanted: a number, or a tensor of "
            f"shape {shape} or {(1, *shape[1:])}"
        )
    if not bool(torch.isfinite(baselines).all()):
        raise ValueError("baselines holds NaN or infinite values; wanted: finite numbers")
    return baselines.detach().to(images).expand_as(images)


def _check_rows(perturbations_per_eval: int | None, batch: Batch) -> int:
    if perturbations_per_eval is None:
        return default_rows_per_forward(batch.images.device)
    return check_positive("perturbations_per_eval", perturbations_per_eval) * batch.size
