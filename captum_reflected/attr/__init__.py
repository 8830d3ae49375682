"""The attributors, one a module."""

from captum_reflected.attr.reflected_relevance import ReflectedRelevance
from captum_reflected.attr.transformer_attribution import TransformerAttribution

__all__ = ["ReflectedRelevance", "TransformerAttribution"]
