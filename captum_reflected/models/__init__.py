"""From a name to a model that can be explained."""

from captum_reflected.errors import ModelLoadError
from captum_reflected.models.class_names import read_class_names
from captum_reflected.models.dual_encoder import RECOMMENDED_LAST_LAYERS, Preprocessing
from captum_reflected.models.loaded_model import LoadedModel
from captum_reflected.models.loading import DEMO_MODEL, load_model
from captum_reflected.models.prompts import DEFAULT_TEMPLATES, FEW_TEMPLATES
from captum_reflected.models.zero_shot import ZeroShotClassifier

__all__ = [
    "DEFAULT_TEMPLATES",
    "DEMO_MODEL",
    "FEW_TEMPLATES",
    "RECOMMENDED_LAST_LAYERS",
    "LoadedModel",
    "ModelLoadError",
    "Preprocessing",
    "ZeroShotClassifier",
    "load_model",
    "read_class_names",
]
