"""The names that help texts list.

They are those of the registries, which take seconds to import; a test compares both.
"""

METHOD_NAMES = (
    "reflected_relevance",
    "mask_regression",
    "balanced_relevance",
    "transformer_attribution",
    "integrated_gradients",
    "saliency",
    "input_x_gradient",
    "attention_rollout",
    "raw_attention",
    "attention_grad_cam",
    "random",
    "center_gaussian",
)
QUALITY_NAMES = ("fast", "good", "best")
FIT_NAMES = ("crop", "pad", "squash")
METRIC_NAMES = (
    "deletion",
    "insertion",
    "insertion_zero",
    "average_drop",
    "average_drop_normalized",
    "average_increase",
    "relevance_mass_accuracy",
    "relevance_rank_accuracy",
    "pointing_game",
    "average_precision",
)
METRICS_WITH_MASKS = METRIC_NAMES[-4:]
TARGET_NAMES = ("predicted", "label")
HALF_NAMES = ("choosing", "confirming")
PRECISION_NAMES = ("float32", "bf16", "fp16")
DEMO_MODEL = "demo"
SCENES = "scenes"
DEFAULT_TEMPLATE = "a photo of a {}."
DEFAULT_CMAP = "inferno"
DEFAULT_ALPHA = 0.8
