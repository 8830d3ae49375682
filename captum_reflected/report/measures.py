"""What the columns of a report are: names, directions, definitions and sources."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from captum_reflected.attr.methods import find_method

if TYPE_CHECKING:
    from captum_reflected.report.results import Results

_RISE = "Petsiuk, Das & Saenko, RISE, BMVC 2018, section 4.2"
_GRAD_CAM_PP = "Chattopadhay et al., Grad-CAM++, WACV 2018, section 4.1"
_CLEVR = "Arras, Osman & Samek, CLEVR-XAI, Information Fusion 81, 2022, section 3.4"


@dataclass(frozen=True)
class Measure:
    """One column.

    Attributes:
        key: its name in the run.
        title: its name in tables.
        low_is_good: None where it is not known.
        meaning: what it is, in a line.
        source: where it was defined.
        percent: whether it is a share, told in percent.
    """

    key: str
    title: str
    low_is_good: bool | None
    meaning: str
    source: str
    percent: bool = True

    @property
    def arrow(self) -> str:
        """Which way is better."""
        return {True: "↓", False: "↑", None: ""}[self.low_is_good]

    @property
    def hint(self) -> str:
        """Which way is better, in words."""
        return {True: "low is better", False: "high is better", None: ""}[self.low_is_good]


MEASURES = {
    measure.key: measure
    for measure in (
        Measure(
            "deletion",
            "Deletion",
            True,
            "Area under the probability of the explained class while pixels are removed, "
            "highest first.",
            _RISE,
        ),
        Measure(
            "insertion",
            "Insertion",
            False,
            "Area under that probability while pixels are inserted into the blurred image, "
            "highest first.",
            _RISE,
        ),
        Measure(
            "insertion_zero",
            "Insertion from zero",
            False,
            "The same, inserted into an image of zeros as the model receives it.",
            f"{_RISE}, with another start",
        ),
        Measure(
            "average_drop",
            "Average Drop",
            True,
            "max(0, Y − O): Y is the probability for the whole image, O with only the highest "
            "half of its pixels kept.",
            "Sago & Hotta, ICPRAM 2024, equation 5",
        ),
        Measure(
            "average_drop_normalized",
            "Average Drop / Y",
            True,
            "max(0, Y − O) / Y: the drop as a share of the probability for the whole image.",
            _GRAD_CAM_PP,
        ),
        Measure(
            "average_increase",
            "Average Increase",
            False,
            "Share of images with O > Y.",
            "Sago & Hotta, ICPRAM 2024, equation 6",
        ),
        Measure(
            "relevance_mass_accuracy",
            "Relevance mass",
            False,
            "Share of the positive attribution that lies on the object.",
            _CLEVR,
        ),
        Measure(
            "relevance_rank_accuracy",
            "Relevance rank",
            False,
            "Share of the K highest pixels that lie on the object of K pixels.",
            _CLEVR,
        ),
        Measure(
            "pointing_game",
            "Pointing game",
            False,
            "Whether the highest pixel lies on the object.",
            "Zhang et al., Excitation Backprop, IJCV 126, 2018, section 4.2",
        ),
    )
}


def measures(results: Results) -> tuple[Measure, ...]:
    """The columns of a run, the known ones first and in the order of the paper."""
    asked = results.settings.metrics
    known = [measure for key, measure in MEASURES.items() if key in asked]
    others = [
        Measure(key, key, None, "A metric of this run.", "not known here", percent=False)
        for key in asked
        if key not in MEASURES
    ]
    return (*known, *others)


def method_title(method: str) -> str:
    """The method's name in tables and figures."""
    try:
        return find_method(method).title
    except ValueError:  # of another version
        return method


def format_number(value: float, measure: Measure, *, signed: bool = False) -> str:
    """A value as tables show it: in percent, or with four digits where it is no share."""
    text = f"{100 * value:.2f}" if measure.percent else f"{value:.4g}"
    if float(text) == 0:
        return text.lstrip("-")
    sign = "−" if value < 0 else "+" if signed else ""
    return sign + text.lstrip("-")
