r"""The rules of layer-wise relevance propagation (LRP), as pure tensor functions.

Each rule maps the relevance R of an operation's output z to the relevance of its operands
(Bach et al. 2015 with alpha = 1, beta = 0, in the form of Chefer, Gur & Wolf, CVPR 2021,
section 3.1; for operations not covered there, Achtibat et al. 2024):

+---------------------------------------+----------------------------------------------------+
| operation                             | relevance of an operand                            |
+=======================================+====================================================+
| linear layer, convolution, product    | positive contributions only, x+ w+ and x- w-,      |
| of a matrix with a constant one       | each by its share of their sum; biases ignored     |
+---------------------------------------+----------------------------------------------------+
| matrix or elementwise product of two  | x * vjp(R / z), halved between the operands        |
| tensors: attention, gates,            | (elementwise R / 2 each, the uniform rule of       |
| x * sigmoid(c * x)                    | Achtibat et al., section 3.3)                      |
+---------------------------------------+----------------------------------------------------+
| sum of two tensors: residuals, rotary | x * R / z, scaled so that the total is split, in   |
| embeddings, the mean of two heads     | every image, by the share of ``|sum of the part|`` |
+---------------------------------------+----------------------------------------------------+
| mean, sum, average pooling, norm      | x * vjp(R / z)                                     |
+---------------------------------------+----------------------------------------------------+
| softmax, activations, powers,         | R, unchanged; what a tensor is divided by is a     |
| dropout, normalisations, quotients    | statistic, a constant (Achtibat et al., 3.4)       |
+---------------------------------------+----------------------------------------------------+
| sum or product with a constant:       | R, unchanged                                       |
| masks, scales, layer scale, drop path |                                                    |
+---------------------------------------+----------------------------------------------------+
| moved or selected values              | R, moved along: the ordinary gradient              |
+---------------------------------------+----------------------------------------------------+

A constant is any value that does not depend on the image: parameters, masks, numbers. The
published code splits a sum over the whole batch; here each image is treated separately.

References:
    Bach et al., *On Pixel-Wise Explanations for Non-Linear Classifier Decisions by
    Layer-Wise Relevance Propagation*, PLOS ONE 2015. Chefer, Gur & Wolf, *Transformer
    Interpretability Beyond Attention Visualization*, CVPR 2021. Achtibat et al.,
    *AttnLRP: Attention-Aware Layer-Wise Relevance Propagation for Transformers*, ICML
    2024.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Operation = Callable[..., Tensor]

# The published code adds 1e-9 to a denominator, and twice to that of a residual: in the sum, and
# in the copy that feeds the next layer. The value matters if z is near 0.
_EPSILON = 2e-9


def positive_rule(
    product: Operation, weight: Tensor, relevance: Tensor, x: Tensor
) -> tuple[Tensor]:
    """Linear layers: splits R in proportion to the positive contributions x+ w+ and x- w-.

    Args:
        product: the product of x and weight, linear in both, without a bias.
        weight: a constant.
        relevance: R, of the shape of the product.
        x: the input.

    Returns:
        tuple[Tensor]: the relevance of x. Its sum is that of R, without the relevance of
        outputs that have no positive contribution.
    """
    signs = x.clamp(min=0), x.clamp(max=0)
    weight = weight.to(x.dtype)
    positive_weight, negative_weight = weight.clamp(min=0), weight.clamp(max=0)
    gradients = _pull_back(
        lambda positive, negative: (
            product(positive, positive_weight) + product(negative, negative_weight)
        ),
        relevance,
        signs,
    )
    return (signs[0] * gradients[0] + signs[1] * gradients[1],)


def contribution_rule(
    operation: Operation, relevance: Tensor, *operands: Tensor
) -> tuple[Tensor, ...]:
    """Products and means: operand x gets x * vjp(R / z), divided by the number of operands.

    Args:
        operation: linear in each of its operands (or homogeneous of degree one, like a norm).
        relevance: R, of the shape of the output z.
        *operands: the operands of the operation.

    Returns:
        tuple[Tensor, ...]: the relevance of each operand. All have the same sum; together they
        sum to that of R, without the relevance of outputs that are 0.
    """
    gradients = _pull_back(operation, relevance, operands)
    return tuple(x * grad / len(operands) for x, grad in zip(operands, gradients, strict=True))


def residual_rule(
    image_dim: int | None, relevance: Tensor, a: Tensor, b: Tensor
) -> tuple[Tensor, Tensor]:
    """Sums: x * R / z, its total split between a and b by the share of ``|sum of the part|``.

    Args:
        image_dim: the dimension of the images, each of which is split separately; None if
            there is one image.
        relevance: R, of the shape of a + b.
        a: one operand.
        b: the other; may broadcast.

    Returns:
        tuple[Tensor, Tensor]: the relevance of a and of b. In every image their sum is that
        of R, unless the sum of a part is 0.
    """
    dims = [dim for dim in range(relevance.dim()) if dim != image_dim]
    quotient = _quotient(relevance, a + b)
    parts = a * quotient, b * quotient
    totals = [part.sum(dims, keepdim=True) for part in parts]
    # A part is scaled by |total| / (sum of both |total|) * sum of R / total.
    scale = _quotient(relevance.sum(dims, keepdim=True), totals[0].abs() + totals[1].abs())
    split = [part * total.sign() * scale for part, total in zip(parts, totals, strict=True)]
    return split[0].sum_to_size(a.shape), split[1].sum_to_size(b.shape)


def _quotient(relevance: Tensor, output: Tensor) -> Tensor:
    """R / z, stabilised; 0 where z is 0."""
    return torch.where(output == 0, 0, relevance / (output + output.sign() * _EPSILON))


def _pull_back(
    operation: Operation, relevance: Tensor, operands: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    """The vector-Jacobian product of the operation with R / z, for each operand."""
    leaves = tuple(x.detach().requires_grad_() for x in operands)
    with torch.enable_grad():
        output = operation(*leaves)
    return torch.autograd.grad(output, leaves, _quotient(relevance, output.detach()))
