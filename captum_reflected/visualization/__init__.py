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
from captum_reflected.visualization.maps import comparison_grid, draw_heat
from captum_reflected.visualization.overlay import (
    HEAT_COLORS,
    Box,
    HeatScale,
    heat_scale,
    overlay,
    photo_overlay,
)
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
    "Box",
    "CurvePanel",
    "HeatScale",
    "Theme",
    "comparison_grid",
    "curve_limits",
    "curves_figure",
    "draw_curves",
    "draw_heat",
    "heat_scale",
    "line_style",
    "metric_curves",
    "overlay",
    "photo_overlay",
    "reflected_gallery",
    "reflection_stages",
    "relevance_matrix",
]
