"""Balanced gradients of any forward call, without changing the model.

A :class:`torch.overrides.TorchFunctionMode` sees every torch function that the forward calls, in
this thread only, and runs those that have a rule (:mod:`captum_reflected.relevance.balanced_rules`)
with a backward of their own. What depends on the inputs is read from the autograd graph.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.graph import Node
from torch.overrides import TorchFunctionMode

from captum_reflected.attention.mode import multi_head_attention
from captum_reflected.inputs.modules import innermost_name, running_modules, tensors_in
from captum_reflected.relevance.balanced_nodes import (
    FROZEN,
    LIVE,
    TAPPED,
    sources_of,
    what_loses_relevance,
)
from captum_reflected.relevance.balanced_operations import RULES, constant, frozen, named
from captum_reflected.relevance.balanced_rules import Frozen, Half, Operation
from captum_reflected.relevance.dependence import CONSTANT, MOVES, Dependence, operation_of

_GATE, _FROZEN_NODE = "Proportional", "Frozen"
# Nodes that a gate may pass through on its way to the product.
_ELEMENTWISE = MOVES | frozenset(["Add", "Sub", "Rsub", "Neg", "Mul", "Div"])
# The names that torch gives to the first operands of operations, in their order.
_OPERANDS = (
    "input mat mat1 batch1 tensor1 vec1 other mat2 batch2 tensor tensor2 vec vec2".split()  # noqa: SIM905
)


class BalancedMode(TorchFunctionMode):
    """Gives the operations of a forward the backward of balanced gradients.

    Has to be entered before :class:`captum_reflected.attention.mode.AttentionMode`, which splits
    fused attention into single operations, and to stay active during the backward if the model uses
    activation checkpointing.

    Args:
        sources: the inputs of the forward; each requires a gradient and is not a leaf.
        leaves: whether other leaf tensors that require a gradient are inputs, too, except
            parameters. Captum's methods for layers put such tensors in the place of activations.
    """

    def __init__(self, sources: Iterable[Tensor], *, leaves: bool = False) -> None:
        super().__init__()

        def leaf_level(leaf: Tensor) -> int:
            return LIVE if leaves and not isinstance(leaf, nn.Parameter) else CONSTANT

        self._dependence = Dependence(
            [(source, LIVE) for source in sources], self._level_of, leaf_level
        )
        # The operation, and the modules that ran it; to name them takes long.
        self._unbalanced: dict[Node, tuple[str, list[nn.Module]]] = {}

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        """Applies the rule of an operation that depends on the inputs."""
        kwargs = dict(kwargs or {})
        if not torch.is_grad_enabled() or func in _OF_SHAPE:
            return func(*args, **kwargs)
        tensors = list(tensors_in((args, kwargs)))
        if self._dependence.level(tensors) < LIVE:
            return func(*args, **kwargs)
        name = func.__name__
        is_in_place = (
            (name.endswith("_") and not name.endswith("__"))
            or name in _IN_PLACE
            or bool(kwargs.get("inplace"))
        )
        name = _IN_PLACE.get(name, name.strip("_"))
        rule = self._rule(name)
        output = NotImplemented
        if rule is not None:
            args = (*args, *(kwargs.pop(key) for key in _OPERANDS if key in kwargs))
            operation, operands = func, list(args)
            if is_in_place:  # on a copy, which is then written to the tensor
                operation = getattr(Tensor, name, None) or getattr(F, name)
                operands[0] = operands[0].clone()
            options = {key: arg for key, arg in kwargs.items() if key != "inplace"}
            output = rule(operation, *operands, **options)
        was_balanced = output is not NotImplemented
        if not was_balanced:
            output = func(*args, **kwargs)
        elif is_in_place:
            output = args[0].copy_(output)
        self._dependence.level(tensors_in(output))
        if is_in_place and not was_balanced and name not in _LINEAR_IN_PLACE:
            self._note_hidden(args[0], name)
        self.ran(output)
        return output

    def ran(self, output: Any) -> None:
        """Called with the output of every operation that the inputs' gradient passes through."""

    def _rule(self, name: str) -> Callable[..., Any] | None:
        """The function that runs an operation of this name by its rule."""
        if name in RULES:
            return RULES[name]
        method = _METHODS.get(name)
        return None if method is None else partial(method, self)

    # -- rules that need to know what an operand depends on; the others are below ----------

    def _multiply(self, operation: Operation, a: Any, b: Any, **kwargs: Any) -> Any:
        if self._is_live(a) and self._is_live(b) and self._is_gate(a) != self._is_gate(b):
            a, b = (Frozen.apply(a), b) if self._is_gate(a) else (a, Frozen.apply(b))
        return operation(*self._shared((a, b)), **kwargs)

    def _product(self, operation: Operation, a: Any, b: Any, *args: Any, **kwargs: Any) -> Any:
        return operation(*self._shared((a, b)), *args, **kwargs)

    def _added_product(self, operation: Operation, input: Any, *factors: Any, **kwargs: Any) -> Any:
        return operation(input, *self._shared(factors), **kwargs)

    def _einsum(self, operation: Operation, equation: Any, *factors: Any) -> Any:
        if len(factors) == 1 and isinstance(factors[0], (tuple, list)):
            factors = tuple(factors[0])
        if not isinstance(equation, str) or sum(map(self._is_live, factors)) > 2:
            return NotImplemented
        return operation(equation, *self._shared(factors))

    def _shared(self, factors: Sequence[Any]) -> Sequence[Any]:
        """The factors of a product; if two are live, each gets half of the gradient."""
        levels = [self._level(factor) for factor in factors]
        is_shared = levels.count(LIVE) > 1
        return [
            # Not even parameters behind a frozen factor may get a gradient.
            Frozen.apply(factor)
            if level == FROZEN
            else Half.apply(factor)
            if level == LIVE and is_shared
            else factor
            for factor, level in zip(factors, levels, strict=True)
        ]

    def _divide(self, operation: Operation, a: Any, b: Any, **kwargs: Any) -> Any:
        if kwargs.get("rounding_mode") is not None:
            return frozen(operation, a, b, **kwargs)
        if not self._is_live(b):
            return operation(a, b, **kwargs)
        if not self._is_live(a):
            return frozen(operation, a, b, **kwargs)
        return operation(a, Frozen.apply(b), **kwargs)

    def _attention(
        self,
        operation: Operation,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *args: Any,
        **kwargs: Any,
    ) -> Any:
        if not self._is_live(value):
            return frozen(operation, query, key, value, *args, **kwargs)
        if args:
            args = (constant(args[0]), *args[1:])
        kwargs = {name: constant(arg) for name, arg in kwargs.items()}
        return operation(query.detach(), key.detach(), value, *args, **kwargs)

    def _multi_head_attention(self, operation: Operation, *args: Any, **kwargs: Any) -> Any:
        with self:
            return multi_head_attention(*args, **kwargs)

    # -- what nodes depend on -----------------------------------------------------------

    def _level(self, operand: Any) -> int:
        return self._dependence.level([operand] if isinstance(operand, Tensor) else [])

    def _is_live(self, operand: Any) -> bool:
        return self._level(operand) == LIVE

    def _is_gate(self, operand: Tensor) -> bool:
        """Whether a factor is the result of an activation, up to elementwise operations."""
        node = operand.grad_fn
        while node is not None:
            name = operation_of(node)
            if name == _GATE:
                return True
            operands = [node.next_functions[position][0] for position in sources_of(node)]
            parents = [parent for parent in operands if self._dependence.levels.get(parent) == LIVE]
            if name not in _ELEMENTWISE or len(parents) != 1:
                return False
            (node,) = parents
        return False

    def _level_of(self, node: Node, parents: Sequence[Node | None], levels: Sequence[int]) -> int:
        name = operation_of(node)
        if name == _FROZEN_NODE:
            return FROZEN
        levels = [levels[position] for position in sources_of(node)]
        if name == "_Tap" or max(levels) < LIVE:
            return max(TAPPED if name == "_Tap" else CONSTANT, *levels)
        if operation := what_loses_relevance(node, self._dependence.levels):
            self._note(node, operation)
        return LIVE

    def _note(self, node: Node, operation: str) -> None:
        self._unbalanced[node] = operation, running_modules()

    def _note_hidden(self, tensor: Any, name: str) -> None:
        """Notes an operation in place on a view: the graph shows only that the view was written."""
        base = tensor._base if isinstance(tensor, Tensor) else None
        if base is not None and base.grad_fn is not None and self._is_live(base):
            self._note(base.grad_fn, f"{name}_")

    def is_constant(self, outputs: Iterable[Tensor]) -> bool:
        """Whether no gradient passes from the outputs to the inputs."""
        return self._dependence.level(outputs) < LIVE

    def unbalanced(self, outputs: Iterable[Tensor]) -> list[str]:
        """The operations without a rule that the gradient of the outputs passes through."""
        self._dependence.level(outputs := list(outputs))
        pending: list[Node | None] = [output.grad_fn for output in outputs]
        visited: set[Node | None] = set()
        while pending:
            node = pending.pop()
            if node not in visited and self._dependence.levels.get(node) == LIVE:
                assert node is not None  # None is a constant
                visited.add(node)
                pending += [parent for parent, _ in node.next_functions]
        names = (
            f"{operation} in {innermost_name(running).removeprefix('forward_func.')}"
            for node, (operation, running) in self._unbalanced.items()
            if node in visited
        )
        return list(dict.fromkeys(names))


_METHODS: dict[str, Callable[..., Any]] = (
    named("mul multiply rmul", BalancedMode._multiply)
    | named("matmul bmm mm rmatmul mv dot vdot inner outer ger", BalancedMode._product)
    | named("linalg_matmul linalg_vecdot tensordot kron", BalancedMode._product)
    | named("addmm baddbmm addbmm addmv addr addcmul", BalancedMode._added_product)
    | named("einsum", BalancedMode._einsum)
    | named("div divide true_divide truediv", BalancedMode._divide)
    | named("scaled_dot_product_attention", BalancedMode._attention)
    | named("multi_head_attention_forward", BalancedMode._multi_head_attention)
)
# What a forward asks of tensors most often, and is no tensor.
_OF_SHAPE = frozenset(
    [Tensor.dim, Tensor.size, Tensor.numel]
    + [
        getattr(Tensor, name).__get__
        for name in ("shape", "dtype", "grad_fn", "_version", "device")
    ]
)
_IN_PLACE = {"__imul__": "mul", "__idiv__": "div", "__itruediv__": "div", "__ipow__": "pow"}
_IN_PLACE["__imod__"] = "remainder"
# Operations in place that are linear, or write a value.
_LINEAR_IN_PLACE = frozenset(
    """
    add sub subtract neg negative copy zero fill masked_fill masked_scatter index_add index_copy
    index_fill index_put scatter scatter_add fill_diagonal tril triu put cumsum requires_grad detach
    squeeze unsqueeze transpose swapaxes swapdims t dropout alpha_dropout feature_dropout
    feature_alpha_dropout resize resize_as set as_strided rename relu leaky_relu
    """.split()  # noqa: SIM905
)
