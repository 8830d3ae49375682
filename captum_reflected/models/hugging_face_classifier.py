"""Image classifiers of transformers, from a folder as ``save_pretrained`` writes it."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor, nn

from captum_reflected._extras import import_extra
from captum_reflected.errors import ModelLoadError
from captum_reflected.inputs.class_names import configured_names
from captum_reflected.models.class_names import imagenet_synsets
from captum_reflected.models.image_processor import read_preprocessing
from captum_reflected.models.loaded_model import LoadedModel
from captum_reflected.models.weights import reason


class Logits(nn.Module):
    """An image classifier of transformers as a module from images to its logits.

    Attributes:
        model: the classifier, which returns an object with ``logits``.
        class_names: of the model, if its configuration holds them.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.training = model.training
        self.class_names = configured_names(getattr(model, "config", None))

    def forward(self, images: Tensor) -> Tensor:
        """The logits (B, K) of images (B, C, H, W)."""
        logits: Tensor = self.model(pixel_values=images).logits
        return logits


def load_classifier(folder: Path, name: str) -> LoadedModel:
    """Loads an image classifier of transformers, on the CPU, in eval mode and in float32.

    Args:
        folder: with the configuration, the safetensors weights and the image processor.
        name: of the model, for errors and for the result.

    Raises:
        ModelLoadError: transformers is missing, or the folder holds no such classifier.
    """
    transformers = import_extra("transformers", "transformers", extra="clip", error=ModelLoadError)
    preprocessing = read_preprocessing(folder)
    if preprocessing is None:
        raise ModelLoadError(
            f"model {name!r} has no preprocessor_config.json in {folder}; wanted: also the files "
            "that AutoImageProcessor.save_pretrained writes"
        )
    try:
        model, info = transformers.AutoModelForImageClassification.from_pretrained(
            str(folder), use_safetensors=True, trust_remote_code=False, output_loading_info=True
        )
    except Exception as error:  # transformers raises errors of many types
        raise ModelLoadError(
            f"cannot load {name!r}; wanted: an image classifier of transformers with safetensors "
            f"weights: {reason(error)}"
        ) from error
    if missing := sorted(info["missing_keys"]):
        raise ModelLoadError(
            f"the weights of model {name!r} lack {', '.join(missing[:4])}"
            f"{', ...' if len(missing) > 4 else ''}, which would stay random; wanted: a model that "
            "was trained to classify images"
        )
    # transformers keeps the type of the stored weights, and images are float32.
    classifier = Logits(model.float().eval())
    names = classifier.class_names
    return LoadedModel(
        name=name,
        model=classifier,
        transform=preprocessing.transform,
        mean=preprocessing.mean,
        std=preprocessing.std,
        num_classes=model.config.num_labels,
        class_names=names,
        synsets=None if names is None else imagenet_synsets(names),
    )
