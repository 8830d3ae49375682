"""What to use in place of options that Captum's own attributors take and these do not."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from inspect import signature
from typing import Any, TypeVar, cast

F = TypeVar("F", bound=Callable[..., Any])

_COST = "MaskRegression(model, forwards=...) sets what a map may cost"
_NO_PATH = f"none, since this is not a path method; {_COST}"
_NO_LAYER = "none, since the tokens of all layers are explained; some constructors take start_layer"
_NO_NEURON = (
    "forward_func=a function that returns this neuron, one number per image, and target=None"
)
_NO_RULES = "none, since there are no rules to choose for single layers"
_OWN_MASKS = "score_masks(model, inputs, masks), which scores the image under masks of any shape"
_NOISE = "NoiseTunnel(attributor).attribute(inputs, {name}=...)"
_ONE_FORWARD = "none, since nothing is masked: all images are in one forward"

# By option, what is wanted in its place.
_INSTEAD = {
    "n_steps": _NO_PATH,
    "method": _NO_PATH,
    "internal_batch_size": "fewer images in a call; they are all in one forward",
    "return_convergence_delta": (
        "none, since these maps need not add up to the output; IntegratedGradients(balanced(model))"
        " has a convergence delta"
    ),
    "baselines": "none, since nothing is masked; MaskRegression and ReflectedRelevance take one",
    "perturbations_per_eval": _ONE_FORWARD,
    "show_progress": _ONE_FORWARD,
    "n_samples": f"none, since nothing is sampled; {_COST}",
    "feature_mask": _OWN_MASKS,
    "sliding_window_shapes": _OWN_MASKS,
    "strides": _OWN_MASKS,
    "return_input_shape": "none, since a map always has the shape of the inputs",
    "nt_type": _NOISE,
    "nt_samples": _NOISE,
    "nt_samples_batch_size": _NOISE,
    "stdevs": _NOISE,
    "draw_baseline_from_distrib": _NOISE,
    "abs": "attribute(...).abs()",
    "relu_attributions": "attribute(...).clamp(min=0)",
    "attr_dim_summation": _NO_LAYER,
    "attribute_to_layer_input": _NO_LAYER,
    "layer_baselines": _NO_LAYER,
    "layer_mask": _NO_LAYER,
    "neuron_selector": _NO_NEURON,
    "attribute_to_neuron_input": _NO_NEURON,
    "custom_attribution_func": _NO_RULES,
    "verbose": _NO_RULES,
    "grad_kwargs": "none, since the backward is this library's own",
}
# The same, for attributors that score masked images.
_INSTEAD_OF_MASKED = {
    "internal_batch_size": (
        "perturbations_per_eval=..., the number of masked images of each image in one forward"
    ),
}


def explain_captum_options(attribute: F) -> F:
    """Decorates ``attribute``: an option that only Captum's take raises an error that helps.

    Other unknown options raise Python's own TypeError.
    """
    own = signature(attribute).parameters

    @wraps(attribute)
    def checked(self: Any, *args: Any, **kwargs: Any) -> Any:
        for name in kwargs:
            if name in _INSTEAD and name not in own:
                instead = _INSTEAD[name]
                if "perturbations_per_eval" in own:
                    instead = _INSTEAD_OF_MASKED.get(name, instead)
                raise TypeError(
                    f"{type(self).__name__}.attribute() has no option {name!r}, which methods of "
                    f"Captum have; wanted: {instead.format(name=name)}"
                )
        return attribute(self, *args, **kwargs)

    return cast(F, checked)
