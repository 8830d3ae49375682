"""Random models under balanced gradients, against the rules applied to torch's functions by hand.

The oracle runs a model whose attention is spelled out in plain arithmetic, with the functions of
torch that bend it exchanged for others whose constants are detached, and reads the tokens where the
model's own blocks begin. A map equals the oracle's, or an error or a warning says why it does not.
"""

import warnings
from contextlib import ExitStack, contextmanager
from unittest import mock

import naive
import pytest
import random_attention
import torch
import torch.nn.functional as F
from hypothesis import given
from random_models import Prepared, ReadsOtherwise, build, wrapped
from random_plans import CLASSES, ODDITIES, TORCHVISION
from test_differential import ANY, examine_one, plans, plans_of

from captum_reflected import BalancedRelevance, balanced


def detached(function):
    return lambda *args, **kwargs: function(*args, **kwargs).detach()


def proportional(function):
    def run(x, *args, **kwargs):
        value = function(x, *args, **kwargs)
        return x * (value / torch.where(x == 0, 1, x)).detach()

    return run


def layer_norm(x, normalized_shape, weight=None, bias=None, eps=1e-5):
    dims = tuple(range(-len(normalized_shape), 0))
    centred = x - x.mean(dims, keepdim=True)
    deviation = (centred.square().mean(dims, keepdim=True) + eps).sqrt().detach()
    return centred / deviation * (1 if weight is None else weight) + (0 if bias is None else bias)


@contextmanager
def rules_by_hand():
    with ExitStack() as patches:
        for owner, name, made in (
            (F, "layer_norm", layer_norm),
            (F, "gelu", proportional(F.gelu)),
            (F, "softmax", detached(F.softmax)),
            (torch, "softmax", detached(torch.softmax)),
            (torch.Tensor, "softmax", detached(torch.Tensor.softmax)),
            (torch.Tensor, "sigmoid", detached(torch.Tensor.sigmoid)),
            (torch.Tensor, "tanh", proportional(torch.Tensor.tanh)),
            (torch, "tanh", proportional(torch.tanh)),
            (random_attention, "spelled_out", detached(random_attention.spelled_out)),
        ):
            patches.enter_context(mock.patch.object(owner, name, made))
        yield


def blocks_of(model, plan):
    """The blocks of a model that attend, each once; inserted parts are none."""
    while isinstance(model, (Prepared, ReadsOtherwise)) or type(model) is torch.nn.Sequential:
        model = model[-1] if type(model) is torch.nn.Sequential else model.inner
    owner = model.encoder if plan.family == TORCHVISION else model
    blocks = owner.layers if plan.family == TORCHVISION else owner.blocks
    names = ("attention", "attn", "self_attention")
    found = [
        module
        for module in blocks.modules()
        if any(isinstance(getattr(module, name, None), torch.nn.Module) for name in names)
    ]
    # torchvision's and our own attention have a part of their own that is called so.
    return [block for block in dict.fromkeys(found) if hasattr(block, "mlp")]


def expected(plan, images, targets):
    """Maps (B, H, W), of all blocks and without each of them, and the gradient of the images.

    None where the output has no gradient.
    """
    model, truth = build(plan, [])
    model, images = model.double(), images.double().requires_grad_()
    inputs = []
    hooks = [
        block.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        for block in blocks_of(model, plan)
    ]
    with rules_by_hand():
        output = model(images)
        score = output.gather(1, torch.tensor(targets)[:, None]).sum()
        wanted = [images, *(tokens for tokens in inputs if tokens.requires_grad)]
        if not score.requires_grad:  # there is nothing to explain
            return [None], None
        gradients = torch.autograd.grad(score, wanted, allow_unused=True)
    for hook in hooks:
        hook.remove()
    layers = []
    for tokens, gradient in zip(wanted[1:], gradients[1:], strict=True):
        relevance = (tokens * (0 if gradient is None else gradient)).sum(-1).detach()
        layers.append(relevance.T if plan.tokens_first else relevance)
    chosen = [layers]
    if len(layers) > 1:
        chosen += [layers[:place] + layers[place + 1 :] for place in range(len(layers))]
    maps = []
    for kept in chosen:
        saliency = torch.stack(kept).mean(0)[:, truth.order[truth.specials :]]
        maps.append(
            torch.stack([naive.enlarged(row, truth.grid, images.shape[-2:]) for row in saliency])
        )
    return maps, gradients[0]


def examine(plan):
    """The outcomes of the map and of the gradient of the wrapped model."""
    generator = torch.Generator().manual_seed(plan.seed + 1)
    images = torch.randn(plan.batch, 3, *plan.image, generator=generator)
    targets = torch.randint(CLASSES, (plan.batch,), generator=generator).tolist()
    images = images.to(getattr(torch, plan.dtype))
    forward_func = wrapped(build(plan)[0], plan.wrap)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        forward_func(images.clone().requires_grad_())
    usual = {str(warning.message) for warning in heard}
    maps, of_images = expected(plan, images, targets)
    tolerance = 1e-8 if plan.dtype == "float64" else 1e-3

    def explain():
        attributor = BalancedRelevance(forward_func, token_layout=plan.layout())
        return attributor.attribute(images, targets)[:, 0]

    def differentiate():
        leaf = images.clone().requires_grad_()
        score = balanced(forward_func)(leaf).gather(1, torch.tensor(targets)[:, None]).sum()
        return torch.autograd.grad(score, leaf)[0]

    # Of one layer, attention may be in operations that do not show: its block does not count.
    hides = any(ODDITIES[name][1] == "attention" for name in plan.odd) and plan.where is not None
    outcomes = [
        examine_one(explain, None if right is None else (right, tolerance), usual)
        for right in maps[: None if hides else 1]
    ]
    return {
        "map": min(outcomes, key=lambda outcome: outcome.difference),
        "gradient": examine_one(
            differentiate, None if of_images is None else (of_images, tolerance), usual
        ),
    }


@ANY
@given(plans(most_oddities=0))
def test_ordinary_models_are_all_explained(plan):
    outcomes = examine(plan)
    assert all(outcome.is_plainly_equal for outcome in outcomes.values()), f"{plan}\n{outcomes}"


@pytest.mark.slow
@pytest.mark.parametrize("oddity", ODDITIES)
def test_each_oddity(oddity):
    for plan in plans_of(oddity, 2):
        outcomes = examine(plan)
        assert not any(outcome.is_wrong for outcome in outcomes.values()), f"{plan}\n{outcomes}"
