"""From a model and images to pictures and tables that can be shown, in one call."""

from captum_reflected.explanations.comparison import Comparison, compare
from captum_reflected.explanations.explaining import explain
from captum_reflected.explanations.explanation import Explanation

__all__ = ["Comparison", "Explanation", "compare", "explain"]
