"""The function that measures one image and makes the page."""

from __future__ import annotations

import html
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from captum_reflected._writing import write_whole
from captum_reflected.attention.tokens import TokenLayout
from captum_reflected.exploration.measuring import measure
from captum_reflected.exploration.page import html_page

DEFAULT_METHODS = (
    "mask_regression",
    "balanced_relevance",
    "transformer_attribution",
    "reflected_relevance",
)


@dataclass(frozen=True)
class ExplorerPage:
    """A web page that needs nothing else: no network, no server, no other file.

    A notebook shows it below the cell.

    Attributes:
        html: the page.
        title: its heading.
    """

    html: str
    title: str

    def save(self, path: str | Path) -> None:
        """Writes the page to a file, and creates its folder if it is missing.

        Args:
            path: the file, usually one that ends in ``.html``.

        Raises:
            OSError: it cannot be written.
        """
        file = Path(path)
        file.parent.mkdir(parents=True, exist_ok=True)
        write_whole(file, self.html.encode("utf-8"))

    def __repr__(self) -> str:
        return f"ExplorerPage({self.title!r}, {len(self.html.encode('utf-8')):,} bytes)"

    def _repr_html_(self) -> str:
        # The frame may run its script and nothing else: it has no access to the notebook.
        return (
            f'<iframe title="{html.escape(self.title)}" sandbox="allow-scripts" width="100%" '
            f'height="900" style="border:0" srcdoc="{html.escape(self.html)}"></iframe>'
        )


def explorer(
    model: Callable[..., Any],
    image: Tensor,
    target: Any = None,
    *,
    methods: Sequence[str] = DEFAULT_METHODS,
    classes: int = 5,
    class_names: Sequence[str] | None = None,
    mean: float | Sequence[float] | Tensor | None = None,
    std: float | Sequence[float] | Tensor | None = None,
    title: str | None = None,
    start_layer: int | None = None,
    token_layout: TokenLayout | None = None,
    show_progress: bool = False,
) -> ExplorerPage:
    r"""
    Makes a web page on which the explanation of one image can be explored, token by token.

    Pointing at a patch of the image shows the tokens that it flows into and that flow into it
    (column and row of the relevance matrix R), its reflected image with the model's score, and its
    place in the map: Figure 5 of Sago & Hotta. The page also shows the maps of other methods, the
    likeliest classes, the probability while the highest tokens are deleted or inserted, and R after
    each layer.

    Everything is computed beforehand. With J image tokens, this takes about
    ``classes * (J + 54 * len(methods))`` forwards without gradients, and what the methods take.
    With ``show_progress``, the number is said before they start.

    Args:

        model (Callable): The model, or any function of the images that runs it and returns logits
                    of shape (B, C), C of 2 or more.
        image (Tensor): (C, H, W) or (1, C, H, W), as the model takes it, of 3 channels or 1.
        target (int or Tensor, optional): The class to explain.
                    Default: None, which means the likeliest class
        methods (Sequence[str], optional): Keys of methods, as in
                    :func:`captum_reflected.attr.methods.find_method`.
                    Default: :data:`DEFAULT_METHODS`
        classes (int, optional): Number of classes on the page: the explained one, and the likeliest
                    others. The cost is proportional to it.
                    Default: 5
        class_names (Sequence[str] or str, optional): As in :func:`captum_reflected.explain`, which
                    also takes ``"imagenet-1k"``.
                    Default: None
        mean (float or Sequence[float], optional): The mean that the preprocessing subtracted, per
                    channel.
                    Default: None, which means that of a timm model's ``pretrained_cfg``; without
                    one, an image from 0 to 1 is taken as it is
        std (float or Sequence[float], optional): The standard deviation that it divided by, per
                    channel.
                    Default: None, as for ``mean``
        title (str, optional): The page's heading.
                    Default: None, which means the name of the explained class
        start_layer (int, optional): As in :class:`TransformerAttribution`, for all methods that
                    roll out attention and are not given one.
                    Default: None
        token_layout (TokenLayout, optional): As in :class:`TransformerAttribution`.
                    Default: None
        show_progress (bool, optional): Whether to show how much there is to do, and progress bars
                    with the time left.
                    Default: False

    Returns:
        *ExplorerPage*: less than 3 MB; ``save(path)`` writes it to a file.

    Raises:
        TypeError: an argument has an unsupported type.
        ValueError: shapes or values do not fit; the message says what was given.
        UnsupportedModelError: the model cannot be explained this way.

    Examples::

        >>> # model: a Vision Transformer, images Nx3x224x224 from 0 to 1 -> logits Nx1000
        >>> page = explorer(model, images[0].sigmoid(), target=281, classes=2)
        >>> page.save("photo.html")  # doctest: +SKIP
    """
    measured = measure(
        model,
        image,
        target,
        methods=methods,
        classes=classes,
        class_names=class_names,
        mean=mean,
        std=std,
        start_layer=start_layer,
        token_layout=token_layout,
        show_progress=show_progress,
    )
    heading = measured.classes[0].name if title is None else title
    return ExplorerPage(html_page(measured, title=heading), heading)
