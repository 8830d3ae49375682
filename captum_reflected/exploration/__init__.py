"""One web page on which the explanation of one image can be explored, token by token."""

from captum_reflected.exploration.explorer_page import ExplorerPage, explorer

__all__ = ["ExplorerPage", "explorer"]
