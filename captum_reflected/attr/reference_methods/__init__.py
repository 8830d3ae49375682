"""Published methods without a package, re-implemented from their papers for comparison.

They are used by ``tools/study.py`` and are not attributors. Details that the papers leave open
follow the code that their authors published. Random numbers come from generators of their own.
"""

from captum_reflected.attr.reference_methods.attn_lrp import attn_lrp_maps
from captum_reflected.attr.reference_methods.caap import activation_patching_maps
from captum_reflected.attr.reference_methods.igos import optimised_mask_maps
from captum_reflected.attr.reference_methods.legrad import legrad_maps
from captum_reflected.attr.reference_methods.libragrad import libra_full_grad_maps
from captum_reflected.attr.reference_methods.mda import metric_driven_maps
from captum_reflected.attr.reference_methods.rise import rise_maps
from captum_reflected.attr.reference_methods.tis import input_sampling_maps
from captum_reflected.attr.reference_methods.vit_cx import vit_cx_maps

__all__ = [
    "activation_patching_maps",
    "attn_lrp_maps",
    "input_sampling_maps",
    "legrad_maps",
    "libra_full_grad_maps",
    "metric_driven_maps",
    "optimised_mask_maps",
    "rise_maps",
    "vit_cx_maps",
]
