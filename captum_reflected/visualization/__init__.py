"""Figures in addition to Captum's; functions return them and never show a window."""

from captum_reflected.visualization.curves import (
    DARK,
    LIGHT,
    Band,
    CurvePanel,
    Theme,
    curve_limits,
    curves_figure,
    draw_curves,
    line_style,
    metric_curves,
)
from captum_reflected.visualization.maps import HEAT_COLORS, comparison_grid, draw_heat
from captum_reflected.visualization.reflection import (
    reflected_gallery,
    reflection_stages,
    relevance_matrix,
)

__all__ = [
    "DARK",
    "HEAT_COLORS",
    "LIGHT",
    "Band",
    "CurvePanel",
    "Theme",
    "comparison_grid",
    "curve_limits",
    "curves_figure",
    "draw_curves",
    "draw_heat",
    "line_style",
    "metric_curves",
    "reflected_gallery",
    "reflection_stages",
    "relevance_matrix",
]
