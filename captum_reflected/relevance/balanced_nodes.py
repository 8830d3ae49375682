"""Which nodes of an autograd graph keep relevance with their ordinary gradient, and which not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from torch.autograd.function import BackwardCFunction
from torch.autograd.graph import Node

from captum_reflected.relevance.dependence import CONSTANT, MOVES, operation_of

# What a node of the autograd graph depends on: nothing of the inputs; the inputs, but it is treated
# as a constant; the same, but an attention map in it needs a gradient; or the inputs, so that the
# gradient passes through it.
FROZEN, TAPPED, LIVE = 1, 2, 3

# By the names of autograd nodes. The first are linear in all of their operands together.
_LINEAR = MOVES | frozenset(
    """
    AccumulateGrad Add Sub Rsub Neg Mean Sum Cumsum Nansum Real Imag Complex ViewAsReal
    ViewAsComplex Conj ConjPhysical FftR2C FftC2R FftC2C NativeDropout FeatureDropout
    AvgPool1D AvgPool2D AvgPool3D AdaptiveAvgPool2D AdaptiveAvgPool3D Amin Min
    MaxPool2DWithIndices MaxPool3DWithIndices AdaptiveMaxPool2D Maximum Minimum Fmax Fmin
    Cummax Cummin Median Relu LeakyRelu Abs UpsampleNearest1D UpsampleNearest2D UpsampleNearest3D
    UpsampleNearestExact1D UpsampleNearestExact2D UpsampleNearestExact3D UpsampleTrilinear3D
    UpsampleLinear1D UpsampleBilinear2D UpsampleBicubic2D UpsampleBilinear2DAa UpsampleBicubic2DAa
    ReflectionPad1D ReflectionPad2D ReflectionPad3D ReplicationPad1D ReplicationPad2D
    ReplicationPad3D Col2Im Im2Col PixelShuffle PixelUnshuffle ChannelShuffle Trace Pad Take
    MaskedSelect MaskedScatter IndexAdd IndexCopy IndexFill ScatterAdd ScatterReduce SliceScatter
    SelectScatter DiagonalScatter DiagEmbed BlockDiag Rot90 NanToNum Proportional Substituted Half
    _Tap
    """.split()  # noqa: SIM905
)
# Products of two operands, by their positions: linear in each of them. Any other is added.
_PRODUCTS = (
    dict.fromkeys("Mul Mm Bmm Mv Dot Linear".split(), (0, 1))  # noqa: SIM905
    | dict.fromkeys("Addmm Baddbmm Addbmm Addmv Addr Addcmul".split(), (1, 2))  # noqa: SIM905
    | dict.fromkeys(
        """
        Convolution ConvolutionOverrideable ThnnConv2D SlowConv2D MkldnnConvolution
        NativeBatchNorm CudnnBatchNorm MiopenBatchNorm Normalised
        """.split(),  # noqa: SIM905
        (0, 1),
    )
)
# Linear in these operands if all others are constants.
_PARTLY_LINEAR = {"Div": (0,), "Addcdiv": (0, 1), "Lerp": (0, 1), "GridSampler2D": (0,)} | (
    dict.fromkeys(
        """
        ScaledDotProductAttention ScaledDotProductFlashAttention
        ScaledDotProductFlashAttentionForCpu ScaledDotProductEfficientAttention
        ScaledDotProductCudnnAttention
        """.split(),  # noqa: SIM905
        (2,),
    )
)
_ADDED = {"Addcdiv": (0,), "Lerp": (0, 1)}
_HALF = "Half"


def sources_of(node: Node) -> list[int]:
    """The positions of the operands that the value of a node comes from."""
    # A copy into a tensor overwrites all of it.
    return [1] if operation_of(node) == "Copy" else list(range(len(node.next_functions)))


def what_loses_relevance(node: Node, known: Mapping[Node | None, int]) -> str | None:
    """The operation of a node that is not linear, or takes a constant as one of its terms.

    Args:
        node: a node that the gradient passes through.
        known: the level of each node that it was computed from.

    Returns:
        str | None: in words; None if gradient times value is the same on both sides of the node.
    """
    name = operation_of(node)
    parents = [parent for parent, _ in node.next_functions]
    levels = [known[parent] for parent in parents]
    live = [position for position, level in enumerate(levels) if level == LIVE]
    terms: Sequence[int] = range(len(levels))
    if not _is_known(node):
        return name
    if name in _PRODUCTS:
        factors = [position for position in live if position in _PRODUCTS[name]]
        is_linear = len(factors) < 2 or all(
            _is_half(parents[position], known) for position in factors
        )
        terms = [position for position in terms if position not in _PRODUCTS[name]]
    elif name in _PARTLY_LINEAR:
        is_linear = set(live) <= set(_PARTLY_LINEAR[name])
        terms = _ADDED.get(name, ())
    else:
        is_linear = name in _LINEAR
    if not is_linear:
        return name
    is_added = any(CONSTANT < levels[term] < LIVE for term in terms if term < len(levels))
    return f"{name} of a gate or statistic" if is_added else None


def _is_known(node: Node) -> bool:
    """Whether the name of a node says what it does."""
    if isinstance(node, BackwardCFunction):  # a user's function may have any name
        return type(node)._forward_cls.__module__.startswith(f"{__package__.partition('.')[0]}.")
    return not (
        getattr(node, "_saved_training", False)  # the batch's own statistics
        or getattr(node, "_saved_rounding_mode", None)
        or getattr(node, "_saved_reduce", None) == "prod"
    )


def _is_half(node: Node | None, known: Mapping[Node | None, int]) -> bool:
    """Whether a factor of a product is halved; a product of three first multiplies two of them."""
    while node is not None and operation_of(node) != _HALF:
        live = [parent for parent, _ in node.next_functions if known.get(parent) == LIVE]
        if len(live) != 1 or operation_of(node) not in MOVES | _PRODUCTS.keys():
            return False
        (node,) = live
    return node is not None
