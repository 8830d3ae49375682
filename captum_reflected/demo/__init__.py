"""A small Vision Transformer and scenes whose truth is known, for use without any download.

The class of a scene is the texture of one object, whose mask is exact; everything else in the
picture is untextured. An explanation of the model can thus be checked against the truth.

Examples:
    >>> from captum_reflected.demo import CLASS_NAMES, load_model, load_scenes, preprocess
    >>> model, scenes = load_model(), load_scenes()
    >>> predicted = model(preprocess(scenes.images)).argmax(1)
"""

from captum_reflected.demo._files import load_model, load_scenes, preprocess
from captum_reflected.demo.scenes import CLASS_NAMES, Scenes, generate_scenes

__all__ = [
    "CLASS_NAMES",
    "Scenes",
    "generate_scenes",
    "load_model",
    "load_scenes",
    "preprocess",
]
