"""From a name to a model that can be explained."""

from captum_reflected.models.loading import DEMO_MODEL, LoadedModel, ModelLoadError, load_model

__all__ = ["DEMO_MODEL", "LoadedModel", "ModelLoadError", "load_model"]
