"""oneDNN's linear layer, as torch.compile uses it; all that touches torch's private operation.

On a CPU, ``nn.Linear`` uses BLAS for float32, and oneDNN is faster; it also applies a GELU in the
same pass over memory.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def linear_operation() -> Any:
    """Torch's private operation; None if this version of torch has none."""
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


@cache
def can_run(dtype: torch.dtype) -> bool:
    """Whether the operation runs for a dtype on this CPU. It is tried on a small product."""
    operation = linear_operation()
    if operation is None or dtype not in (torch.float32, torch.bfloat16):
        return False
    try:
        one = torch.ones(1, 1, dtype=dtype)
        return float(operation(one, one, one[0], "none", [], "")) == 2
    except (RuntimeError, TypeError):  # another version's arguments, or a CPU without bfloat16
        return False


class OneDnnLinear(nn.Linear):
    """A linear layer that uses oneDNN where it is enabled.

    Attributes:
        gelu: ``approximate`` of a GELU that is applied in the same pass over memory; None for no
            GELU.
    """

    gelu: str | None = None

    def forward(self, input: Tensor) -> Tensor:
        """The output of ``nn.Linear``, with ``nn.GELU`` applied to it if ``gelu`` is set."""
        if not torch.backends.mkldnn.enabled:
            plain = super().forward(input)
            return plain if self.gelu is None else F.gelu(plain, approximate=self.gelu)
        name, approximate = ("none", "") if self.gelu is None else ("gelu", self.gelu)
        output: Tensor = linear_operation()(input, self.weight, self.bias, name, [], approximate)
        return output
