"""Contrastive image-text models (CLIP, SigLIP) as classifiers of images."""

from __future__ import annotations

import difflib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from captum_reflected.errors import ModelLoadError
from captum_reflected.models.weights import check_weights_file, reason

Template = str | Callable[[str], str]
"""A text with ``{}`` where the class name goes, or a function from the name to the text."""

DEFAULT_TEMPLATES: tuple[Template, ...] = ("a photo of a {}.",)
"""The default prompt of Radford et al. 2021, section 3.1.4."""

FEW_TEMPLATES: tuple[Template, ...] = (
    *DEFAULT_TEMPLATES,
    "a close-up photo of a {}.",
    "a photo of a small {}.",
    "a photo of a large {}.",
    "a drawing of a {}.",
)
"""A small ensemble: framing, size and medium vary, so that their mean is the class itself.

For ImageNet's classes take CLIP's own 80, ``open_clip.OPENAI_IMAGENET_TEMPLATES``.
"""

RECOMMENDED_LAST_LAYERS = {"clip": 1}
"""Last attention layers to roll out, by family; all of them where a family is not listed.

A convention, not a measurement of ours: the CLIP notebook that Chefer et al. published
starts the roll-out at the last block of ViT-B/32 (there ``start_layer = -1``).
"""

# Where image towers keep their attention layers: open_clip's own, timm's inside open_clip,
# and those of transformers.
_BLOCKS = ("transformer.resblocks", "trunk.blocks", "vision_model.encoder.layers")

_TEXTS_PER_FORWARD = 256
_INSTALL = 'pip install "captum-reflected[clip]"'


@dataclass(frozen=True)
class _HuggingFaceFamily:
    """What differs between the dual encoders of transformers.

    Attributes:
        image_projection: the layer between image tower and features, if there is one.
        text_projection: the layer between text tower and features, if there is one.
        padding: how the texts were padded in training, in the tokenizer's words.
    """

    image_projection: str | None
    text_projection: str | None
    padding: str


_HUGGING_FACE_FAMILIES = {
    "clip": _HuggingFaceFamily("visual_projection", "text_projection", "longest"),
    "siglip": _HuggingFaceFamily(None, None, "max_length"),
}


@dataclass(frozen=True)
class Preprocessing:
    """How an image tower wants its images.

    Attributes:
        transform: a PIL image to a (C, H, W) tensor.
        mean: (C,), subtracted by ``transform``.
        std: (C,), divided by in ``transform``.
    """

    transform: Callable[[Image.Image], Tensor]
    mean: Tensor
    std: Tensor


class ZeroShotClassifier(nn.Module):
    r"""An image tower that classifies by the texts its images are closest to.

    The logit of class c is :math:`s \cos(f(x), t_c) + b`, with the features :math:`f(x)`
    of the image, the features :math:`t_c` of the class's texts, and the scale s and bias
    b that the model was trained with. The texts are encoded once, when the classifier is
    made, and kept as a buffer; ``forward`` runs the image tower and nothing else. So it
    is a model like any other for every attributor and every metric, Captum's own
    included.

    Attributes:
        image_tower: images (B, C, H, W) to features (B, D).
        text_features: (C, D), of unit length; a buffer.
        logit_scale: s.
        logit_bias: b; 0 but for models trained with a sigmoid (SigLIP).
        class_names: C names, or ``None`` where they are not known.
        recommended_start_layer: the ``start_layer`` that :data:`RECOMMENDED_LAST_LAYERS`
            gives for this model, 0 where it has none. No attributor takes it by itself;
            the command does, where it is not told another.
        preprocessing: how images become inputs, where the loading library says so.

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
                        (B, C, H, W) to features (B, D). It is used as it is; only a
                        module's parameters move along with the classifier's.
            text_features (Tensor): (C, D), one row a class, of any length but zero.
            logit_scale (float, optional): What the cosine similarities are multiplied by.
                        Default: 100.0, where CLIP's training clips it
            class_names (Sequence[str], optional): C names.
                        Default: None
            logit_bias (float, optional): What is added to every logit.
                        Default: 0.0
            allow_duplicates (bool, optional): Whether two classes may share a name.
                        Default: False
            recommended_start_layer (int, optional): See the attribute of this name.
                        Default: 0
            preprocessing (Preprocessing, optional): See the attribute of this name.
                        Default: None

        Raises:

            TypeError: an argument is of a type that is not taken.
            ValueError: shapes, values or names do not fit; the message says what was given.
        """
        super().__init__()
        if not callable(image_tower):
            raise TypeError(
                f"image_tower is a {type(image_tower).__name__}; wanted: a module or a function "
                "from images (B, C, H, W) to features (B, D)"
            )
        names = None if class_names is None else _check_names(class_names, allow_duplicates)
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
        # Not self.train(...), which would switch the tower.
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

        Weights are read from safetensors only; a pickle is never opened. The activation
        and the preprocessing are those that the pretrained tag was trained with, so that
        ``"ViT-B-32"`` with ``"openai"`` runs with QuickGELU; a local file says nothing of
        them, and wants the name that does (``"ViT-B-32-quickgelu"``) or its tag.

        Args:

            name (str): One of ``open_clip.list_models()``.
            pretrained (str, Path or None): One of its tags, downloaded by open_clip; a
                        local ``.safetensors`` file; or None for random weights.
            classnames (Sequence[str]): One name a class, for ImageNet
                        ``open_clip.IMAGENET_CLASSNAMES`` (which has two names twice, and
                        so needs ``allow_duplicates=True``).
            templates (Sequence, optional): Texts with ``{}`` for the class name, or
                        functions from the name to the text.
                        Default: :data:`DEFAULT_TEMPLATES`
            weights (str or Path, optional): A local ``.safetensors`` file to read in place
                        of the download of the tag ``pretrained``.
                        Default: None
            device (str or torch.device, optional): Where the model goes, and where the
                        texts are encoded.
                        Default: ``"cpu"``
            allow_duplicates (bool, optional): Whether two classes may share a name; their
                        logits are then the same.
                        Default: False

        Returns:
            *ZeroShotClassifier*: in eval mode, with open_clip's ``preprocessing``.

        Raises:
            TypeError: an argument is of a type that is not taken.
            ValueError: the class names or the templates are not usable.
            ModelLoadError: open_clip is missing, the name is unknown, or the weights are
                        missing, of another format or of another model.

        Examples::

            >>> classifier = ZeroShotClassifier.from_open_clip(
            ...     "ViT-B-32", "laion2b_s34b_b79k", ["cat", "dog"]
            ... )  # doctest: +SKIP
        """
        names = _check_names(classnames, allow_duplicates)
        templates = _check_templates(templates)
        open_clip = _import("open_clip", "open_clip_torch")
        if name not in open_clip.list_models():
            close = difflib.get_close_matches(name, open_clip.list_models(), n=3)
            hint = f"; did you mean {' or '.join(close)}?" if close else ""
            raise ModelLoadError(
                f"unknown model {name!r}; wanted: one of open_clip.list_models(){hint}"
            )
        config, file = _open_clip_weights(open_clip, name, pretrained, weights)
        try:
            model, _, transform = open_clip.create_model_and_transforms(
                name,
                None if file is None else str(file),
                force_quick_gelu=config.get("quick_gelu", False),
                image_mean=config.get("mean"),
                image_std=config.get("std"),
                image_interpolation=config.get("interpolation"),
                image_resize_mode=config.get("resize_mode"),
                pretrained_text=False,
                device=device,
            )
            tokenizer = open_clip.get_tokenizer(name)
        except Exception as error:  # open_clip, torch and safetensors raise errors of many kinds.
            given = "random weights" if file is None else f"the weights {file}"
            raise ModelLoadError(
                f"cannot make model {name!r} with {given}: {reason(error)}"
            ) from error
        model.eval()
        model.visual.output_tokens = False  # CoCa's tower would return its tokens as well.
        bias = getattr(model, "logit_bias", None)
        family = "clip" if bias is None else "siglip"
        return cls(
            model.visual,
            _text_features(
                lambda texts: model.encode_text(tokenizer(texts).to(device)), names, templates
            ),
            model.logit_scale.exp().item(),
            names,
            logit_bias=0.0 if bias is None else bias.item(),
            allow_duplicates=allow_duplicates,
            recommended_start_layer=_start_layer(family, model.visual),
            preprocessing=Preprocessing(
                transform,
                torch.tensor(model.visual.preprocess_cfg["mean"]),
                torch.tensor(model.visual.preprocess_cfg["std"]),
            ),
        )

    @classmethod
    def from_hugging_face(
        cls,
        name_or_model: str | Path | nn.Module,
        classnames: Sequence[str],
        templates: Sequence[Template] = DEFAULT_TEMPLATES,
        *,
        tokenizer: Any = None,
        allow_duplicates: bool = False,
    ) -> ZeroShotClassifier:
        r"""
        A CLIP or SigLIP model of transformers.

        Weights are read from safetensors only; a pickle is never opened, and no code from
        the hub is run. A model that is handed over is shared, not copied, and left in its
        mode.

        Args:

            name_or_model (str, Path or nn.Module): A ``CLIPModel`` or ``SiglipModel``, or
                        the hub's name or the local folder of one.
            classnames (Sequence[str]): One name a class.
            templates (Sequence, optional): As in :meth:`from_open_clip`.
                        Default: :data:`DEFAULT_TEMPLATES`
            tokenizer (optional): The model's tokenizer, or a processor that holds it.
                        Required with a model; with a name, None loads the name's.
                        Default: None
            allow_duplicates (bool, optional): As in :meth:`from_open_clip`.
                        Default: False

        Returns:
            *ZeroShotClassifier*: in the mode of the model (eval, where it was loaded by
            name). Its inputs are the processor's ``pixel_values``.

        Raises:
            TypeError: an argument is of a type that is not taken.
            ValueError: the class names or the templates are not usable.
            ModelLoadError: transformers is missing, the name is unknown, or the model is
                        of another kind.

        Examples::

            >>> classifier = ZeroShotClassifier.from_hugging_face(
            ...     "openai/clip-vit-base-patch32", ["cat", "dog"]
            ... )  # doctest: +SKIP
        """
        names = _check_names(classnames, allow_duplicates)
        templates = _check_templates(templates)
        if isinstance(name_or_model, (str, Path)):
            model, tokenizer = _load_hugging_face(str(name_or_model), tokenizer)
        else:
            model = name_or_model
            if tokenizer is None:
                raise TypeError(
                    "tokenizer is None; wanted: the tokenizer or the processor of the "
                    f"{type(model).__name__} that was given"
                )
        kind = getattr(getattr(model, "config", None), "model_type", None)
        family = _hugging_face_family(kind, f"a {type(model).__name__}")
        tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        project = _layer(model, family.text_projection)

        def encode(texts: list[str]) -> Tensor:
            tokens = tokenizer(
                texts,
                padding=family.padding,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_token_type_ids=False,
                return_tensors="pt",
            ).to(model.logit_scale.device)
            features: Tensor = project(model.text_model(**tokens).pooler_output)
            return features

        with _eval_mode(model):
            text_features = _text_features(encode, names, templates)
        tower = _HuggingFaceImageTower(model.vision_model, _layer(model, family.image_projection))
        bias = getattr(model, "logit_bias", None)
        return cls(
            tower,
            text_features,
            model.logit_scale.exp().item(),
            names,
            logit_bias=0.0 if bias is None else bias.item(),
            allow_duplicates=allow_duplicates,
            recommended_start_layer=_start_layer(model.config.model_type, tower),
        )


class _HuggingFaceImageTower(nn.Module):
    """The image half of a dual encoder of transformers, as images (B, C, H, W) to (B, D)."""

    def __init__(self, vision_model: nn.Module, projection: nn.Module) -> None:
        super().__init__()
        self.vision_model = vision_model
        self.projection = projection
        self.training = vision_model.training

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.projection(self.vision_model(pixel_values=images).pooler_output)
        return features


def _text_features(
    encode: Callable[[list[str]], Tensor], names: Sequence[str], templates: Sequence[Template]
) -> Tensor:
    """(C, D): per class the mean of its texts' unit features, of unit length again."""
    classes_per_forward = max(1, _TEXTS_PER_FORWARD // len(templates))
    features = []
    with torch.no_grad():
        for start in range(0, len(names), classes_per_forward):
            chunk = names[start : start + classes_per_forward]
            texts = [_fill(template, name) for name in chunk for template in templates]
            encoded = F.normalize(encode(texts), dim=-1)
            features.append(encoded.unflatten(0, (len(chunk), len(templates))).mean(dim=1))
    return F.normalize(torch.cat(features), dim=-1)


def _fill(template: Template, name: str) -> str:
    # Not str.format: other braces in a text are just text.
    return template.replace("{}", name) if isinstance(template, str) else template(name)


def _check_names(names: Sequence[str], allow_duplicates: bool) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence):
        raise TypeError(f"the class names are {names!r}; wanted: a list of texts")
    if not names:
        raise ValueError("the list of class names is empty; wanted: one name a class")
    for name in names:
        if not isinstance(name, str):
            raise TypeError(f"class name {name!r} is a {type(name).__name__}; wanted: a text")
        if not name.strip():
            raise ValueError(f"class name {name!r} is blank; wanted: a text")
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice and not allow_duplicates:
        raise ValueError(
            f"class name(s) {', '.join(map(repr, twice))} given more than once; wanted: each "
            "once, or allow_duplicates=True"
        )
    return tuple(names)


def _check_templates(templates: Sequence[Template]) -> tuple[Template, ...]:
    if isinstance(templates, str) or not isinstance(templates, Sequence):
        raise TypeError(f"templates is {templates!r}; wanted: a list of texts or functions")
    if not templates:
        raise ValueError("templates is empty; wanted: at least one text with {}")
    for template in templates:
        if not isinstance(template, str) and not callable(template):
            raise TypeError(f"template {template!r}; wanted: a text with {{}}, or a function")
        if isinstance(template, str) and "{}" not in template:
            raise ValueError(f"template {template!r} has no {{}} for the class name")
    return tuple(templates)


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
            "one row a class"
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


def _start_layer(family: str, image_tower: nn.Module) -> int:
    """The start_layer that leaves a family's recommended number of last layers."""
    if family not in RECOMMENDED_LAST_LAYERS:
        return 0
    for path in _BLOCKS:
        try:
            depth = len(list(image_tower.get_submodule(path).children()))
        except AttributeError:
            continue
        return max(0, depth - RECOMMENDED_LAST_LAYERS[family])
    return 0


def imagenet_class_names() -> tuple[str, ...]:
    """Names of ImageNet's 1000 classes that suit a text encoder, as open_clip brings them."""
    return tuple(_import("open_clip", "open_clip_torch").IMAGENET_CLASSNAMES)


def _import(module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ModelLoadError(
            f"this needs the package {package}, which cannot be imported ({error}): {_INSTALL}"
        ) from error


def _open_clip_weights(
    open_clip: Any, name: str, pretrained: str | Path | None, weights: str | Path | None
) -> tuple[dict[str, Any], Path | None]:
    """What open_clip knows of a pretrained tag, and the safetensors file to read."""
    config: dict[str, Any] = {}
    if isinstance(pretrained, str):
        config = open_clip.get_pretrained_cfg(name, pretrained)
    if pretrained is not None and not config:
        if weights is not None or Path(pretrained).suffix != ".safetensors":
            tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "it has none"
            raise ModelLoadError(
                f"pretrained is {str(pretrained)!r}; wanted: a tag of model {name!r} ({tags})"
                f"{'' if weights is not None else ', or a local .safetensors file'}"
            )
        weights = pretrained
    if weights is not None:
        check_weights_file(Path(weights))
        return config, Path(weights)
    return config, _download(open_clip, name, pretrained, config) if config else None


def _download(open_clip: Any, name: str, tag: str | Path | None, config: dict[str, Any]) -> Path:
    """The safetensors file of a tag; open_clip itself would take a pickle where it is missing."""
    repository, _, file = config["hf_hub"].rpartition("/")
    file = Path(file).with_suffix(".safetensors").name if file else "open_clip_model.safetensors"
    try:
        path = Path(open_clip.download_pretrained({"hf_hub": f"{repository}/{file}"}))
    except Exception as error:  # The hub's client raises errors of many kinds.
        raise ModelLoadError(
            f"cannot download {file} of {repository}, the weights {str(tag)!r} of model {name!r}: "
            f"{reason(error)}; local weights can be given as a .safetensors file"
        ) from error
    check_weights_file(path)
    return path


def _load_hugging_face(name: str, tokenizer: Any) -> tuple[Any, Any]:
    transformers = _import("transformers", "transformers")
    try:
        config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False)
        _hugging_face_family(config.model_type, repr(name))
        model = transformers.AutoModel.from_pretrained(
            name, use_safetensors=True, trust_remote_code=False
        )
        if tokenizer is None:
            tokenizer = transformers.AutoTokenizer.from_pretrained(name, trust_remote_code=False)
    except ModelLoadError:
        raise
    except Exception as error:  # transformers and the hub's client raise errors of many kinds.
        raise ModelLoadError(
            f"cannot load {name!r}; wanted: a CLIP or SigLIP model of the hub, or a local folder "
            f"of one, with safetensors weights: {reason(error)}"
        ) from error
    return model, tokenizer


def _hugging_face_family(kind: str | None, given: str) -> _HuggingFaceFamily:
    if kind not in _HUGGING_FACE_FAMILIES:
        raise ModelLoadError(
            f"{given} is a model of type {kind!r}; wanted: one of transformers' "
            f"{', '.join(_HUGGING_FACE_FAMILIES)}"
        )
    return _HUGGING_FACE_FAMILIES[kind]


def _layer(model: nn.Module, name: str | None) -> nn.Module:
    return nn.Identity() if name is None else model.get_submodule(name)


@contextmanager
def _eval_mode(model: nn.Module) -> Iterator[None]:
    """Eval mode for a block, then each module's own mode again."""
    modes = {module: module.training for module in model.modules()}
    model.eval()
    try:
        yield
    finally:
        for module, training in modes.items():
            module.training = training
