"""The attributors, one per module."""

from captum_reflected.attr.attention_grad_cam import AttentionGradCam
from captum_reflected.attr.attention_rollout import AttentionRollout
from captum_reflected.attr.balanced_relevance import BalancedRelevance
from captum_reflected.attr.mask_regression import MaskFit, MaskRegression
from captum_reflected.attr.raw_attention import RawAttention
from captum_reflected.attr.reflected_relevance import ReflectedRelevance
from captum_reflected.attr.transformer_attribution import TransformerAttribution

__all__ = [
    "AttentionGradCam",
    "AttentionRollout",
    "BalancedRelevance",
    "MaskFit",
    "MaskRegression",
    "RawAttention",
    "ReflectedRelevance",
    "TransformerAttribution",
]
