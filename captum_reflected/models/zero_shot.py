"""Contrastive image-text models (CLIP, SigLIP) as classifiers of images."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_reflected.models.dual_encoder import DualEncoder, Preprocessing
from captum_reflected.models.hugging_face import load_hugging_face
from captum_reflected.models.open_clip import load_open_clip
from captum_reflected.models.prompts import (
    DEFAULT_TEMPLATES,
    Template,
    check_names,
    check_templates,
    class_features,
)


class ZeroShotClassifier(nn.Module):
    r"""Classifies images by the similarity of their features to text features of the classes.

    The logit of class c is :math:`s \cos(f(x), t_c) + b`, with the features :math:`f(x)`
    of the image, the features :math:`t_c` of the class's texts, and the scale s and bias
    b from the model's training. The texts are encoded once, when the classifier is created,
    and stored as a buffer; ``forward`` only runs the image tower. So every attributor and
    every metric, including Captum's own, can use it like any other model.

    Attributes:
        image_tower: a module from images (B, C, H, W) to features (B, D).
        text_features: (C, D), of unit length; a buffer.
        logit_scale: s.
        logit_bias: b; 0 except for models trained with a sigmoid loss (SigLIP).
        class_names: C names, or ``None`` if not known.
        recommended_start_layer: the ``start_layer`` by :data:`RECOMMENDED_LAST_LAYERS` for
            this model, else 0. It is used if no other ``start_layer`` is given.
        preprocessing: the preprocessing of images, if the loading library provides it.

    References:
        Radford et al., *Learning Transferable Visual Models From Natural Language
        Supervision*, ICML 2021, sections 3.1.2 and 3.1.4.

    Examples::

        >>> # model: an image tower, images Nx3x224x224 -> features Nx300
        >>> classifier = ZeroShotClassifier(model, torch.randn(2, 300), class_names=["cat", "dog"])
        >>> classifier(images).shape[1]
        2
    """

    text_features: Tensor

    def __init__(
        self,
        image_tower: Callable[[Tensor], Tensor],
        text_features: Tensor,
        logit_scale: float = 100.0,
        class_names: Sequence[str] | None = None,
        *,
        logit_bias: float = 0.0,
        allow_duplicates: bool = False,
        recommended_start_layer: int = 0,
        preprocessing: Preprocessing | None = None,
    ) -> None:
        r"""
        Args:

            image_tower (Callable): The image encoder, a module or a function: images
                        (B, C, H, W) to features (B, D). It is not changed or copied; if it
                        is a module, its parameters are part of the classifier.
            text_features (Tensor): (C, D), one row per class, of any length except zero.
            logit_scale (float, optional): Factor of the cosine similarities.
                        Default: 100.0, the maximum in CLIP's training
            class_names (Sequence[str], optional): C names.
                        Default: None
            logit_bias (float, optional): Number that is added to every logit.
                        Default: 0.0
            allow_duplicates (bool, optional): Whether two classes may share a name.
                        Default: False
            recommended_start_layer (int, optional): See the attribute of this name.
                        Default: 0
            preprocessing (Preprocessing, optional): See the attribute of this name.
                        Default: None

        Raises:

            TypeError: an argument has an unsupported type.
            ValueError: shapes, values or names do not fit; the message says what was given.
        """
        super().__init__()
        if not callable(image_tower):
            raise TypeError(
                f"image_tower is a {type(image_tower).__name__}; wanted: a module or a function "
                "from images (B, C, H, W) to features (B, D)"
            )
        names = None if class_names is None else check_names(class_names, allow_duplicates)
        text_features = _check_text_features(text_features, names)
        if not _is_finite(logit_scale) or logit_scale <= 0:
            raise ValueError(f"logit_scale is {logit_scale!r}; wanted: a number greater than 0")
        if not _is_finite(logit_bias):
            raise ValueError(f"logit_bias is {logit_bias!r}; wanted: a finite number")
        self.image_tower = image_tower
        self.register_buffer("text_features", F.normalize(text_features.detach(), dim=-1))
        self.logit_scale = float(logit_scale)
        self.logit_bias = float(logit_bias)
        self.class_names = names
        self.recommended_start_layer = recommended_start_layer
        self.preprocessing = preprocessing
        # Not self.train(...), which would change the mode of the image tower.
        self.training = bool(getattr(image_tower, "training", False))

    @property
    def num_classes(self) -> int:
        """Number of classes, C."""
        return self.text_features.shape[0]

    def forward(self, images: Tensor) -> Tensor:
        r"""
        Scaled cosine similarities of images and classes.

        Args:

            images (Tensor): (B, C, H, W), preprocessed as the image tower wants them.

        Returns:
            *Tensor* **logits** (B, C).

        Raises:
            TypeError: the image tower did not return a tensor.
            ValueError: its features do not have the dimension of the text features.
        """
        features = self.image_tower(images)
        size = self.text_features.shape[1]
        if not isinstance(features, Tensor):
            raise TypeError(
                f"image_tower returned a {type(features).__name__}; wanted: a tensor of features "
                f"of shape (B, {size})"
            )
        if features.dim() != 2 or features.shape[1] != size:
            raise ValueError(
                f"image_tower returned shape {tuple(features.shape)}; wanted: features of shape "
                f"(B, {size}), as long as the text features"
            )
        features = F.normalize(features, dim=-1)
        similarities = features @ self.text_features.to(features.dtype).T
        return self.logit_scale * similarities + self.logit_bias

    @classmethod
    def from_open_clip(
        cls,
        name: str,
        pretrained: str | Path | None,
        classnames: Sequence[str],
        templates: Sequence[Template] = DEFAULT_TEMPLATES,
        *,
        weights: str | Path | None = None,
        device: str | torch.device = "cpu",
        allow_duplicates: bool = False,
    ) -> ZeroShotClassifier:
        r"""
        A model of open_clip, loaded by open_clip.

        Weights are only read from safetensors files, never from pickles. The activation and the
        preprocessing are those that the pretrained tag was trained with; for example,
        ``"ViT-B-32"`` with ``"openai"`` uses QuickGELU. A local file does not contain them, so
        it needs the right model name (``"ViT-B-32-quickgelu"``) or the tag.

        Args:

            name (str): One of ``open_clip.list_models()``.
            pretrained (str, Path or None): One of its tags, downloaded by open_clip; a
                        local ``.safetensors`` file; or None for random weights.
            classnames (Sequence[str]): One name per class; for ImageNet,
                        ``open_clip.IMAGENET_CLASSNAMES`` (in which two names occur twice, so
                        it needs ``allow_duplicates=True``).
            templates (Sequence, optional): Texts with ``{}`` for the class name, or
                        functions from the name to the text.
                        Default: :data:`DEFAULT_TEMPLATES`
            weights (str or Path, optional): A local ``.safetensors`` file to load instead
                        of downloading the tag ``pretrained``.
                        Default: None
            device (str or torch.device, optional): The device of the model, on which the
                        texts are also encoded.
                        Default: ``"cpu"``
            allow_duplicates (bool, optional): Whether two classes may share a name; they
                        then have equal logits.
                        Default: False

        Returns:
            *ZeroShotClassifier*: in eval mode, with open_clip's ``preprocessing``.

        Raises:
            TypeError: an argument has an unsupported type.
            ValueError: the class names or the templates are invalid.
            ModelLoadError: open_clip is missing, the name is unknown, or the weights are
                        missing, have another format or belong to another model.

        Examples::

            >>> classifier = ZeroShotClassifier.from_open_clip(
            ...     "ViT-B-32", "laion2b_s34b_b79k", ["cat", "dog"]
            ... )  # doctest: +SKIP
        """
        names = check_names(classnames, allow_duplicates)
        templates = check_templates(templates)
        model = load_open_clip(name, pretrained, weights=weights, device=device)
        return cls._from_dual_encoder(model, names, templates, allow_duplicates)

    @classmethod
    def from_hugging_face(
        cls,
        name_or_model: str | Path | nn.Module,
        classnames: Sequence[str],
        templates: Sequence[Template] = DEFAULT_TEMPLATES,
        *,
        tokenizer: Any = None,
        device: str | torch.device = "cpu",
        allow_duplicates: bool = False,
    ) -> ZeroShotClassifier:
        r"""
        A CLIP or SigLIP model of transformers.

        Weights are only read from safetensors files, never from pickles, and no code from the
        hub is run. A given model is shared, not copied, and its train or eval mode is kept.

        Args:

            name_or_model (str, Path or nn.Module): A ``CLIPModel`` or ``SiglipModel``, or
                        the name on the hub or the local folder of one.
            classnames (Sequence[str]): One name per class.
            templates (Sequence, optional): As in :meth:`from_open_clip`.
                        Default: :data:`DEFAULT_TEMPLATES`
            tokenizer (optional): The model's tokenizer, or a processor that contains it.
                        Required with a model; with a name, None loads its tokenizer.
                        Default: None
            device (str or torch.device, optional): The device of a model that is given by
                        name, on which the texts are also encoded. A given model stays where
                        it is.
                        Default: ``"cpu"``
            allow_duplicates (bool, optional): As in :meth:`from_open_clip`.
                        Default: False

        Returns:
            *ZeroShotClassifier*: in the mode of the model (eval, if it was loaded by name).
            Its ``preprocessing`` is that of the image processor, which is part of a model that
            is loaded by name, and of a processor that is given as ``tokenizer``.

        Raises:
            TypeError: an argument has an unsupported type.
            ValueError: the class names or the templates are invalid.
            ModelLoadError: transformers is missing, the name is unknown, or the model has an
                        unsupported type.

        Examples::

            >>> classifier = ZeroShotClassifier.from_hugging_face(
            ...     "openai/clip-vit-base-patch32", ["cat", "dog"]
            ... )  # doctest: +SKIP
        """
        names = check_names(classnames, allow_duplicates)
        templates = check_templates(templates)
        model = load_hugging_face(name_or_model, tokenizer, device)
        return cls._from_dual_encoder(model, names, templates, allow_duplicates)

    @classmethod
    def _from_dual_encoder(
        cls,
        model: DualEncoder,
        names: tuple[str, ...],
        templates: tuple[Template, ...],
        allow_duplicates: bool,
    ) -> ZeroShotClassifier:
        return cls(
            model.image_tower,
            class_features(model.encode_texts, names, templates),
            model.logit_scale,
            names,
            logit_bias=model.logit_bias,
            allow_duplicates=allow_duplicates,
            recommended_start_layer=model.recommended_start_layer,
            preprocessing=model.preprocessing,
        )


def _check_text_features(features: Any, names: tuple[str, ...] | None) -> Tensor:
    if not isinstance(features, Tensor) or not features.is_floating_point():
        given = f"a tensor of {features.dtype}" if isinstance(features, Tensor) else repr(features)
        raise TypeError(f"text_features is {given}; wanted: a floating point tensor (C, D)")
    shape = tuple(features.shape)
    if features.dim() != 2 or 0 in shape:
        raise ValueError(f"text_features has shape {shape}; wanted: (C, D), at least one class")
    if names is not None and len(names) != shape[0]:
        raise ValueError(
            f"text_features has shape {shape} and there are {len(names)} class names; wanted: "
            "one row per class"
        )
    if not bool(torch.isfinite(features).all()):
        raise ValueError("text_features holds NaN or infinite values; wanted: finite numbers")
    if not bool(features.any(dim=1).all()):
        raise ValueError("text_features has a row of zeros; wanted: a direction for each class")
    return features


def _is_finite(number: object) -> bool:
    return (
        isinstance(number, (int, float)) and not isinstance(number, bool) and math.isfinite(number)
    )
