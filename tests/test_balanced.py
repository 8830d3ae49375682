"""Balanced gradients: values unchanged, relevance complete, equal to forwards written by hand."""

import threading
import warnings
from dataclasses import dataclass

import pytest
import timm
import torch
import torch.nn.functional as F
from captum.attr import (
    GradientShap,
    InputXGradient,
    IntegratedGradients,
    LayerGradientXActivation,
    LayerIntegratedGradients,
    NeuronGradient,
    NoiseTunnel,
    Saliency,
)
from captum.metrics import infidelity
from conftest import make_vit
from test_captum_contract import assert_untouched, snapshot
from test_model_families import HUGGING_FACE, TIMM, Logits, hugging_face, randomised, timm_model
from torch import nn
from torch.utils.checkpoint import checkpoint
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import (
    ReflectedRelevance,
    TransformerAttribution,
    UnsupportedModelError,
    balanced,
)
from captum_reflected.attr.reference_methods import attn_lrp_maps, libra_full_grad_maps


@pytest.fixture
def no_warnings():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


# What is added to the tokens, and so carries a share of the output, by parts of its name. All other
# parameters multiply.
ADDED = ("bias", "cls_token", "pos_embed", "reg_token", "dist_token", "position_embeddings")
ADDED += (
    "register_tokens",
    "distillation_token",
    "class_token",
    "pos_embedding",
    "class_embedding",
)
ADDED += ("position_embedding", "latent", "probe", "positional_embedding", "posemb")
NOT_ADDED = ("relative_position_bias_table", "rel_pos", "q_bias", "norm_pre_bias")


def added(model):
    return {
        name: parameter
        for name, parameter in model.named_parameters()
        if any(part in name for part in ADDED)
        and not any(part in name for part in NOT_ADDED)
        and parameter.requires_grad
    }


def completeness_error(model, forward_func, images, target=1):
    """How far input and bias times gradient are from adding up to the output, relatively."""
    images = images.clone().requires_grad_()
    output = balanced(forward_func)(images)[:, target]
    parameters = added(model)
    gradients = torch.autograd.grad(output.sum(), [images, *parameters.values()], allow_unused=True)
    shares = [
        (tensor * gradient).sum().double()
        for tensor, gradient in zip([images, *parameters.values()], gradients, strict=True)
        if gradient is not None
    ]
    return float(((sum(shares) - output.sum()).abs() / output.abs().sum()).detach())


def check_family(model, forward_func, size):
    """Values equal to the last bit, completeness in both precisions, and no trace on the model."""
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    plain = forward_func(images)  # models may store what they compute first
    before = snapshot(model)
    assert torch.equal(balanced(forward_func)(images), plain)
    if type(model).__name__ == "Gemma4VitClassifier":
        return  # it shifts its pixels by a constant, whose share belongs to no parameter
    assert completeness_error(model, forward_func, images) < 1e-5
    assert_untouched(before, model)
    model.double()
    try:
        forward_func(images.double())
    except RuntimeError as error:
        if "Double" in str(error):  # some versions of timm compute rotary embeddings in float32
            return
        raise
    # NaFlexViT computes its positions in float32.
    least = 1e-8 if type(model).__name__ == "NaFlexVit" else 1e-10
    assert completeness_error(model, forward_func, images.double()) < least


@pytest.mark.parametrize("kind", TIMM)
@pytest.mark.usefixtures("no_warnings")
def test_timm(kind):
    name, options, size, _ = TIMM[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm_model(name, options, size)
    check_family(model, model, size)


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", HUGGING_FACE)
@pytest.mark.usefixtures("no_warnings")
def test_hugging_face(kind, attention):
    model_class, config_class, options, _ = HUGGING_FACE[kind]
    model = hugging_face(model_class, config_class, options, attention)
    check_family(model, Logits(model), (32, 32))


@pytest.mark.usefixtures("no_warnings")
def test_torchvision():
    model = TorchvisionTransformer(
        image_size=32,
        patch_size=8,
        num_layers=2,
        num_heads=2,
        hidden_dim=32,
        mlp_dim=64,
        num_classes=5,
    )
    check_family(randomised(model), model, (32, 32))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mixer_s32_224", {}),
        ("swin_tiny_patch4_window7_224", {"depths": (1, 1, 1, 1), "embed_dim": 16}),
        ("convnext_atto", {}),
    ],
)
@pytest.mark.usefixtures("no_warnings")
def test_models_without_global_attention(name, options):
    model = randomised(timm.create_model(name, num_classes=5, **options), std=0.1)
    check_family(model, model, (224, 224) if "swin" in name or "mixer" in name else (64, 64))


# -- a forward written by hand -----------------------------------------------------------


class ByHand:
    """A balanced forward of a timm model, written out.

    Attributes:
        inputs: what enters each block.
        maps: the attention maps, as leaf tensors.
        biases: every bias that is added to tokens, one copy for each token.
    """

    def __init__(self, model, images):
        self.inputs, self.maps, self.biases = [], [], []
        x = model._pos_embed(self.patches(model.patch_embed.proj, images))
        for block in model.blocks:
            self.inputs.append(x)
            x = x + self.attention(block.attn, self.normalised(block.norm1, x))
            y = self.linear(block.mlp.fc1, self.normalised(block.norm2, x))
            x = x + self.linear(block.mlp.fc2, y * (F.gelu(y) / y).detach())
        self.output = model.head(self.normalised(model.norm, x)[:, 0])

    def add(self, bias, x):
        self.biases.append(bias.detach().expand_as(x).clone().requires_grad_())
        return x + self.biases[-1]

    def patches(self, projection, images):
        x = F.conv2d(images, projection.weight, stride=projection.stride)
        return self.add(projection.bias, x.flatten(2).mT)

    def linear(self, layer, x):
        return self.add(layer.bias, x @ layer.weight.T)

    def normalised(self, norm, x):
        centred = x - x.mean(-1, keepdim=True)
        deviation = (centred.square().mean(-1, keepdim=True) + norm.eps).sqrt()
        return self.add(norm.bias, centred / deviation.detach() * norm.weight)

    def attention(self, layer, x):
        size, tokens, width = x.shape
        qkv = self.linear(layer.qkv, x).reshape(size, tokens, 3, layer.num_heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        self.maps.append((q @ k.mT * layer.scale).softmax(-1).detach().requires_grad_())
        return self.linear(
            layer.proj, (self.maps[-1] @ v).transpose(1, 2).reshape(size, tokens, width)
        )


def by_hand(model, images):
    """The output of the balanced forward, its blocks' inputs and its attention maps."""
    forward = ByHand(model, images)
    return forward.output, forward.inputs, forward.maps


@pytest.fixture
def double_vit():
    return make_vit().double()


@pytest.fixture
def double_images():
    return torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(3)).double()


def test_equals_a_forward_written_by_hand(double_vit, double_images):
    images = double_images.requires_grad_()
    output, inputs, _ = by_hand(double_vit, images)
    expected = torch.autograd.grad(output[:, 2].sum(), [images, *inputs])
    seen = []
    hooks = [
        block.register_forward_pre_hook(lambda _module, args: seen.append(args[0]))
        for block in double_vit.blocks
    ]
    actual_output = balanced(double_vit)(images)
    for hook in hooks:
        hook.remove()
    actual = torch.autograd.grad(actual_output[:, 2].sum(), [images, *seen])
    torch.testing.assert_close(actual_output, output)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-12)
    ordinary = torch.autograd.grad(double_vit(images)[:, 2].sum(), images)[0]
    assert (ordinary - actual[0]).abs().max() > 0.01 * ordinary.abs().max()


def test_rule_of_transformer_attribution(double_vit, double_images):
    output, _, maps = by_hand(double_vit, double_images)
    gradients = torch.autograd.grad(output[:, 2].sum(), maps)
    expected = torch.eye(17).double()
    for attention, gradient in zip(maps, gradients, strict=True):
        expected = expected + (attention * gradient).clamp(min=0).mean(1) @ expected
    actual = TransformerAttribution(double_vit, rule="balanced").relevance(double_images, 2)
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-9, atol=1e-12)
    reflection = ReflectedRelevance(double_vit, rule="balanced").reflect(double_images, 2)
    torch.testing.assert_close(reflection.relevance, actual)


def test_full_grad_of_libragrad(double_vit, double_images):
    """Blocks' inputs and biases times their gradients, token by token."""
    target = torch.tensor([2, 5])
    forward = ByHand(double_vit, double_images)
    score = forward.output.gather(1, target[:, None]).sum()
    tensors = [*forward.inputs, *forward.biases]
    gradients = torch.autograd.grad(score, tensors, allow_unused=True)
    expected = torch.zeros(2, 16).double()
    for tensor, gradient in zip(tensors, gradients, strict=True):
        if gradient is not None:
            expected += (tensor * gradient).sum(-1).detach()[:, -16:]
    actual = libra_full_grad_maps(double_vit, double_images, target)
    expected = F.interpolate(expected.view(2, 1, 4, 4), (32, 32), mode="bilinear")[:, 0]
    torch.testing.assert_close(actual, expected.float(), rtol=1e-4, atol=1e-5)


def test_attn_lrp(double_vit, double_images):
    """Its rules, each as its formula has it, propagated by hand through one block."""
    model, target = make_vit(depth=1).double(), 3
    block, images = model.blocks[0], double_images[:1]
    x = model._pos_embed(model.patch_embed(images)).detach().requires_grad_()
    norm = ByHand.normalised
    hand = ByHand(model, images)  # for its values
    y = norm(hand, block.norm1, x).detach()
    size, tokens, width = y.shape
    q, k, v = block.attn.qkv(y).reshape(1, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4).detach()
    scores = q @ k.mT * block.attn.scale
    attention = scores.softmax(-1)
    mixed = attention @ v
    leaf = mixed.detach().requires_grad_()
    after = x + block.attn.proj(leaf.transpose(1, 2).reshape(size, tokens, width))
    z = norm(hand, block.norm2, after)
    z = block.mlp.fc1(z)
    after = after + block.mlp.fc2(z * (F.gelu(z) / z).detach())
    logit = model.head(norm(hand, model.norm, after)[:, 0])[0, target]
    # Above the mixed values, and on the way around them, all is linear.
    of_mixed, of_residual = torch.autograd.grad(logit, [leaf, x])
    of_mixed = leaf.detach() * of_mixed
    # Proposition 3.3: half to attention, half to values, by their share of each product.
    share = of_mixed / mixed
    of_attention = attention * (share @ v.mT) / 2
    of_values = v * (attention.mT @ share) / 2
    # Proposition 3.1: the softmax; then half of each score to its query and half to its key.
    of_scores = scores * (of_attention - attention * of_attention.sum(-1, keepdim=True))
    share = of_scores / scores
    of_queries = q * (share @ k * block.attn.scale) / 2
    of_keys = k * (share.mT @ q * block.attn.scale) / 2
    # Through the linear layer and the normalisation, whose backward is that of their values.
    source = images.clone().requires_grad_()
    tokens_in = model._pos_embed(model.patch_embed(source))
    normed = norm(hand, block.norm1, tokens_in)
    parts = block.attn.qkv(normed).reshape(1, tokens, 3, 4, width // 4).permute(2, 0, 3, 1, 4)
    carried = torch.stack([of_queries, of_keys, of_values]) / parts.detach()
    gradient = torch.autograd.grad([parts, tokens_in], source, [carried, of_residual])[0]
    expected = (images * gradient).sum(1)
    actual = attn_lrp_maps(model, images, torch.tensor([target]))
    torch.testing.assert_close(actual, expected.detach(), rtol=1e-6, atol=1e-9)


# -- operations --------------------------------------------------------------------------

X = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(0)).double()
GATE = torch.randn(4, 6, 8, generator=torch.Generator().manual_seed(1)).double()
WEIGHT = torch.randn(8, 8, generator=torch.Generator().manual_seed(2)).double()


def layer_norm_by_hand(x):
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-6).sqrt()


def rms_norm_by_hand(x):
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6)


# A forward of x, and the same with its constants detached.
OPERATIONS = {
    "softmax attention": (
        lambda x: torch.softmax(x @ x.mT, -1) @ (x @ WEIGHT),
        lambda x: torch.softmax(x @ x.mT, -1).detach() @ (x @ WEIGHT),
    ),
    "fused attention": (
        lambda x: F.scaled_dot_product_attention(x, x, x @ WEIGHT, is_causal=True),
        lambda x: F.scaled_dot_product_attention(
            x.detach(), x.detach(), x @ WEIGHT, is_causal=True
        ),
    ),
    "attention by einsum": (
        lambda x: torch.einsum(
            "bij,bjc->bic", torch.einsum("bic,bjc->bij", x, x).softmax(dim=-1), x
        ),
        lambda x: torch.einsum(
            "bij,bjc->bic", torch.einsum("bic,bjc->bij", x, x).softmax(dim=-1).detach(), x
        ),
    ),
    "linear attention": (
        lambda x: x @ (x.mT @ x),
        lambda x: (
            (x @ (x.mT @ x).detach() + x.detach() @ ((x.mT @ x.detach() + x.mT.detach() @ x) / 2))
            / 2
        ),
    ),
    "LayerNorm": (lambda x: F.layer_norm(x, (8,), eps=1e-6), layer_norm_by_hand),
    "LayerNorm by hand": (layer_norm_by_hand, layer_norm_by_hand),
    "RMSNorm": (
        lambda x: F.rms_norm(x, (8,), WEIGHT[0], 1e-6),
        lambda x: rms_norm_by_hand(x) * WEIGHT[0],
    ),
    "RMSNorm by hand": (rms_norm_by_hand, rms_norm_by_hand),
    "normalize": (
        lambda x: F.normalize(x, dim=-1),
        lambda x: x / x.norm(dim=-1, keepdim=True).detach(),
    ),
    "GELU": (F.gelu, lambda x: x * (F.gelu(x) / x).detach()),
    "GELU by tanh": (
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))),
        lambda x: 0.5 * x * (1 + torch.tanh(0.79788456 * (x + 0.044715 * x**3))).detach(),
    ),
    "GELU by erf": (
        lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4142135)),
        lambda x: x * 0.5 * (1.0 + torch.erf(x / 1.4142135)).detach(),
    ),
    "QuickGELU": (
        lambda x: x * torch.sigmoid(1.702 * x),
        lambda x: x * torch.sigmoid(1.702 * x).detach(),
    ),
    "SiLU in place": (
        lambda x: F.silu(x.clone(), inplace=True),
        lambda x: x * torch.sigmoid(x).detach(),
    ),
    "ReLU in place": (lambda x: (x @ WEIGHT).relu_(), lambda x: (x @ WEIGHT).relu()),
    "squared ReLU": (lambda x: F.relu(x).square(), lambda x: F.relu(x) * F.relu(x).detach()),
    "PReLU": (
        lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).double()),
        lambda x: F.prelu(x, torch.tensor([0.1, 0.2, 0.3, 0.4, 0.5, 0.6]).double()),
    ),
    "ReLU6": (F.relu6, lambda x: x * (F.relu6(x) / x).detach()),
    "clamp": (
        lambda x: x.clamp(min=-0.5, max=0.5),
        lambda x: x * (x.clamp(min=-0.5, max=0.5) / x).detach(),
    ),
    "SwiGLU": (
        lambda x: F.silu(x @ WEIGHT) * (x @ WEIGHT.T),
        lambda x: F.silu(x @ WEIGHT).detach() * (x @ WEIGHT.T),
    ),
    "GeGLU, chunked, in place": (
        lambda x: torch.cat([x, x @ WEIGHT], -1).chunk(2, -1)[0].clone().mul_(F.gelu(x @ WEIGHT)),
        lambda x: x * F.gelu(x @ WEIGHT).detach(),
    ),
    "GLU": (
        lambda x: F.glu(torch.cat([x, x @ WEIGHT], -1)),
        lambda x: x * torch.sigmoid(x @ WEIGHT).detach(),
    ),
    "two factors": (
        lambda x: (x @ WEIGHT) * (x @ WEIGHT.T),
        lambda x: (
            ((x @ WEIGHT).detach() * (x @ WEIGHT.T) + (x @ WEIGHT) * (x @ WEIGHT.T).detach()) / 2
        ),
    ),
    "what divides": (lambda x: x / (1 + x.abs().sum()), lambda x: x / (1 + x.abs().sum().detach())),
    "constant gate": (
        lambda x: x * GATE * torch.sigmoid(GATE),
        lambda x: x * GATE * torch.sigmoid(GATE),
    ),
    "GroupNorm": (
        lambda x: F.group_norm(x, 3, WEIGHT[0, :6], WEIGHT[1, :6], 1e-6),
        lambda x: (
            layer_norm_by_hand(x.reshape(4, 3, 16)).reshape(4, 6, 8) * WEIGHT[0, :6, None]
            + WEIGHT[1, :6, None]
        ),
    ),
}


def detached_norm(function):
    """A norm by hand, with the deviation as a constant."""

    def run(x):
        mean = x.mean(-1, keepdim=True) if function is layer_norm_by_hand else 0
        return (x - mean) * (function(x) / (x - mean)).detach()

    return run


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.usefixtures("no_warnings")
def test_operation(name):
    forward, expected = OPERATIONS[name]
    if expected in (layer_norm_by_hand, rms_norm_by_hand):
        expected = detached_norm(expected)
    x = X.clone().requires_grad_()
    direction = torch.randn(X.shape, generator=torch.Generator().manual_seed(5)).double()
    output = balanced(forward)(x)
    assert torch.equal(output, forward(X.clone()))
    actual = torch.autograd.grad((output * direction).sum(), x)[0]
    if name in (
        "RMSNorm",
        "GroupNorm",
    ):  # the deviation is a constant in the hand-written form, too
        complete = (actual * X).sum()
        bias = WEIGHT[1, :6, None] if name == "GroupNorm" else 0
        torch.testing.assert_close(complete, ((output - bias) * direction).sum().detach())
        return
    y = X.clone().requires_grad_()
    wanted = torch.autograd.grad((expected(y) * direction).sum(), y)[0]
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-7)


def in_place(function):
    """A forward whose function works in place, on an activation or on a part of one."""

    def run(x):
        y = x @ WEIGHT
        function(y)
        return y * x

    return run


PLACES = torch.tensor([0, 1, 2, 0, 1, 2])
# Forwards without additive constants: input times gradient adds up to the output.
COMPLETE = {
    "sigmoid in place": in_place(lambda y: y.sigmoid_()),
    "Hardsigmoid in place": lambda x: x * F.hardsigmoid(x @ WEIGHT, inplace=True),
    "exp in place": in_place(lambda y: y.exp_()),
    "copied gate": in_place(lambda y: y.copy_(y.softmax(-1))),
    "softmax by hand, in place": lambda x: (
        (lambda a: a / a.sum(-1, keepdim=True))((x @ x.mT).exp_()) @ x
    ),
    "variance, then in place": lambda x: (
        (x - x.mean(-1, keepdim=True)) * x.var(-1, keepdim=True).add_(1e-6).rsqrt_()
    ),
    "RMSNorm, then in place": lambda x: F.rms_norm(x, (8,)).mul_(WEIGHT[0]),
    "attention, then in place": lambda x: (
        (x @ x.mT).softmax(-1).masked_fill_(torch.eye(6) == 1, 0) @ x
    ),
    "batch norm in train mode": lambda x: F.batch_norm(x, None, None, training=True),
    "instance norm": F.instance_norm,
    "var_mean with axis": lambda x: (
        x - torch.var_mean(x, axis=-1, keepdim=True)[1]  # an alias of dim
    ),
    "mul by keywords": lambda x: torch.mul(input=x, other=x @ WEIGHT) + x.mul(other=x),
    "div by keywords": lambda x: torch.div(input=x, other=1 + x.abs()),
    "bmm by keywords, swapped": lambda x: torch.bmm(mat2=x @ x.mT, input=x.mT @ x @ x.mT),
    "ReLU by keywords": lambda x: F.relu(input=x @ WEIGHT, inplace=True),
    "layer_norm by keywords": lambda x: torch.layer_norm(x, [8], cudnn_enable=False),
    "addmm": lambda x: torch.addmm(x[0], x[1] @ WEIGHT, WEIGHT),
    "addmm of two": lambda x: torch.addmm(x[0] @ x[1].mT, x[1], x[2].mT, alpha=0.5),
    "baddbmm": lambda x: torch.baddbmm(x @ x.mT, batch1=x, batch2=x.mT, beta=0.3),
    "addcmul": lambda x: torch.addcmul(x, x @ WEIGHT, x) + torch.addcmul(x, x, WEIGHT[0]),
    "addcdiv": lambda x: torch.addcdiv(x, x @ WEIGHT, WEIGHT[0]),
    "lerp": lambda x: torch.lerp(x, x @ WEIGHT, 0.3) + torch.lerp(x, x @ WEIGHT, x.sigmoid()),
    "einsum of three": lambda x: torch.einsum("bic,cd,bjd->bij", x, WEIGHT, x),
    "einsum of a list": lambda x: torch.einsum("bic,bjc->bij", [x, x]),
    "tensordot": lambda x: torch.tensordot(x, x[0], ([2], [1])),
    "outer, dot": lambda x: torch.outer(x[0, 0], x[1, 0]) * torch.dot(x[2, 0], x[3, 0]),
    "special functions": lambda x: x * torch.special.expit(x) * torch.exp2(x) * torch.pow(2.0, x),
    "index_add": lambda x: torch.zeros(4, 3, 8).double().index_add(1, PLACES, x),
    "merged tokens": lambda x: x[:, :3].scatter_reduce(
        1, PLACES[:3].view(1, 3, 1).expand(4, 3, 8), x[:, 3:], reduce="mean"
    ),
    "masked_select": lambda x: torch.masked_select(x, X > 0),
    "min": lambda x: x.min(1).values,
    "FFT": lambda x: torch.fft.ifft(torch.fft.fft(x).conj()).real,
}


@pytest.mark.parametrize("name", COMPLETE)
@pytest.mark.usefixtures("no_warnings")
def test_complete(name):
    x = X.clone().requires_grad_()
    output = balanced(COMPLETE[name])(x)
    assert torch.equal(output, COMPLETE[name](X.clone()))
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(5)).double()
    (gradient,) = torch.autograd.grad((output * direction).sum(), x)
    torch.testing.assert_close((gradient * X).sum(), (output * direction).sum().detach())


def on_a_part(function):
    """A forward that changes the first tokens in place."""

    def run(x):
        y = x.clone()
        function(y[:, 0])
        return y

    return run


class Mul(torch.autograd.Function):
    """A user's function, with the name of an operation of torch."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.exp()

    @staticmethod
    def backward(ctx, gradient):
        return gradient * ctx.saved_tensors[0].exp()


# Forwards that lose relevance, and how the warning names the operation.
NAMED = {
    "added sigmoid": (lambda x: x + torch.sigmoid(x @ WEIGHT) @ WEIGHT, "Add of a gate"),
    "subtracted quotient": (lambda x: x - 1 / (2 + x.abs()), "Sub of a gate"),
    "concatenated softmax": (lambda x: torch.cat([x, x.softmax(-1)], -1), "Cat of a gate"),
    "greater norm": (lambda x: torch.maximum(x, x.norm()), "Maximum of a gate"),
    "rounded quotient": (
        lambda x: x + torch.div(x, 0.2, rounding_mode="floor"),
        "Add of a gate",
    ),
    "sine of a part": (on_a_part(lambda y: y.sin_()), "sin_"),
    "sigmoid of a part": (on_a_part(lambda y: y.sigmoid_()), "CopySlices of a gate"),
    "threshold of a part": (on_a_part(lambda y: F.threshold(y, 0.1, 0.5, True)), "threshold_"),
    "sampled at live places": (
        lambda x: F.grid_sample(WEIGHT.expand(4, 1, 8, 8), x[:, :, None, :2], align_corners=False),
        "GridSampler2D",
    ),
    "divided inside an operator": (
        lambda x: torch.ops.aten.div.Tensor(torch.ones(1).double(), 2 + x),
        "Div",
    ),
    "batch norm inside an operator": (
        lambda x: torch.native_batch_norm(x, None, None, None, None, True, 0.1, 1e-5)[0],
        "NativeBatchNorm",
    ),
    "LayerNorm with a live weight": (lambda x: F.layer_norm(x, (8,), x[0, 0]), "Normalised"),
    "a function of the user": (Mul.apply, "Mul in"),
}


@pytest.mark.parametrize("name", NAMED)
def test_what_loses_relevance_is_named(name):
    forward, words = NAMED[name]
    with pytest.warns(UserWarning, match=f"no rule for .*{words}"):
        output = balanced(forward)(X)
    assert torch.equal(output, forward(X.clone()))


def test_zero_activations():
    x = torch.tensor([0.0, -0.0, 1.0]).requires_grad_()
    for activation, slope in (
        (F.gelu, 0.5),
        (F.silu, 0.5),
        (torch.tanh, 1.0),
        (torch.erf, 1.128379),
    ):
        gradient = torch.autograd.grad(balanced(activation)(x).sum(), x)[0]
        torch.testing.assert_close(gradient[:2], torch.full((2,), slope), rtol=1e-4, atol=0)
        assert gradient.isfinite().all()


class Plus(nn.Module):
    def __init__(self):
        super().__init__()
        self.odd = nn.Softplus()
        self.linear = nn.Linear(8, 8)

    def forward(self, x):
        return self.linear(self.odd(x))


def test_an_operation_without_a_rule_is_named_with_its_module():
    with pytest.warns(UserWarning, match=r"Softplus in odd \(Softplus\)"):
        balanced(Plus())(torch.randn(2, 8))


@pytest.mark.usefixtures("no_warnings")
def test_no_warning_where_no_gradient_passes():
    """Queries and keys get no gradient, so nothing there needs a rule."""

    def forward(x):
        return torch.softmax(F.softplus(x) @ x.mT, -1) @ x

    balanced(forward)(torch.randn(2, 4, 8))


@pytest.mark.parametrize(
    "forward", [lambda x: x.softmax(-1), torch.sigmoid, lambda x: torch.ones(2, 3)]
)
def test_an_output_without_a_gradient_is_refused(forward):
    with pytest.raises(UnsupportedModelError, match="logits"):
        balanced(forward)(torch.randn(2, 3))


# -- the wrapper -------------------------------------------------------------------------


def test_not_without_gradients(vit, images):
    for context in (torch.no_grad(), torch.inference_mode()):
        with context, pytest.raises(RuntimeError, match="gradients on"):
            balanced(vit)(images)
    with pytest.raises(TypeError, match="forward_func is a str"):
        balanced("vit")


def test_attributors_that_record_attention_say_what_to_use(vit, images):
    with pytest.raises(UnsupportedModelError, match='rule="balanced"'):
        TransformerAttribution(balanced(vit)).attribute(images, 1)


def test_nested_arguments(double_vit, double_images):
    def forward(batch, scale=1.0):
        return {"scores": double_vit(batch["pixels"]) * scale}

    images = double_images.requires_grad_()
    output = balanced(forward)({"pixels": images}, scale=torch.tensor(2.0))["scores"]
    actual = torch.autograd.grad(output[:, 1].sum(), images)[0]
    expected = torch.autograd.grad(balanced(double_vit)(images)[:, 1].sum(), images)[0]
    torch.testing.assert_close(actual, 2 * expected)
    # A scale that requires a gradient is an input, too, and takes half of the product's gradient.
    scale = torch.tensor(2.0, requires_grad=True)
    output = balanced(forward)({"pixels": images}, scale=scale)["scores"]
    torch.testing.assert_close(torch.autograd.grad(output[:, 1].sum(), images)[0], expected)


def test_additional_arguments_are_constants(double_vit, double_images):
    mask = torch.rand(2, 1, 32, 32).double()
    method = InputXGradient(balanced(lambda x, m: double_vit(x * m)))
    actual = method.attribute(double_images.clone(), 2, mask)
    expected = InputXGradient(balanced(double_vit)).attribute(double_images * mask, 2)
    torch.testing.assert_close(actual, expected)


def test_captums_gradient_methods(double_vit, double_images):
    output, inputs, _ = by_hand(double_vit, double_images.requires_grad_())
    gradient, first = torch.autograd.grad(output[:, 2].sum(), [double_images, inputs[1]])
    images, wrapped = double_images.detach(), balanced(double_vit)
    close = {"rtol": 1e-8, "atol": 1e-10}
    torch.testing.assert_close(
        InputXGradient(wrapped).attribute(images, 2), images * gradient, **close
    )
    torch.testing.assert_close(Saliency(wrapped).attribute(images, 2), gradient.abs(), **close)
    torch.testing.assert_close(
        LayerGradientXActivation(wrapped, double_vit.blocks[0]).attribute(images, 2),
        (inputs[1] * first).detach(),
        **close,
    )
    attributions, delta = IntegratedGradients(wrapped).attribute(
        images, target=2, return_convergence_delta=True, n_steps=4
    )
    assert attributions.shape == images.shape
    assert delta.isfinite().all()
    ordinary = IntegratedGradients(double_vit).attribute(images, target=2, n_steps=4)
    assert (ordinary - attributions).abs().max() > 1e-3
    noisy = NoiseTunnel(InputXGradient(wrapped)).attribute(
        images, target=2, nt_samples=2, stdevs=0.0
    )
    torch.testing.assert_close(noisy, images * gradient, **close)
    assert (
        GradientShap(wrapped).attribute(images, torch.zeros_like(images), target=2).isfinite().all()
    )
    layer = LayerIntegratedGradients(wrapped, double_vit.blocks[1])
    assert layer.attribute(images, target=2, n_steps=3).isfinite().all()
    neuron = NeuronGradient(wrapped, double_vit.blocks[0]).attribute(images, (0, 1))
    assert neuron.isfinite().all()

    def perturb(inputs):
        return torch.full_like(inputs, 0.01), inputs - 0.01

    assert infidelity(wrapped, perturb, images, images * gradient, target=2).isfinite().all()


def test_leaves_the_model_as_it_was(vit, images):
    before = snapshot(vit)
    InputXGradient(balanced(vit)).attribute(images, 1)
    assert_untouched(before, vit)

    def fails(x):
        vit(x)
        raise KeyError("broken")

    before = snapshot(vit)
    with pytest.raises(KeyError):
        balanced(fails)(images)
    assert_untouched(before, vit)
    assert torch._C._len_torch_function_stack() == 0


def test_threads_do_not_see_each_other(vit, images):
    x = images.clone().requires_grad_()
    expected = torch.autograd.grad(vit(x)[:, 1].sum(), x)[0]
    inside, done, results = threading.Event(), threading.Event(), []

    def slow(x):
        inside.set()
        assert done.wait(30)
        return vit(x)

    def explain():
        y = images.clone().requires_grad_()
        results.append(torch.autograd.grad(balanced(slow)(y)[:, 1].sum(), y)[0])

    thread = threading.Thread(target=explain)
    thread.start()
    assert inside.wait(30)
    ordinary = torch.autograd.grad(vit(x)[:, 1].sum(), x)[0]
    done.set()
    thread.join()
    assert torch.equal(ordinary, expected)
    assert not torch.allclose(results[0], expected)


def test_threads_leave_compilation_as_it_was(vit, images):
    compiled_graphs = []

    def backend(graph, _):
        compiled_graphs.append(graph)
        return graph.forward

    compiled = torch.compile(lambda x: x + 1, backend=backend)
    inside = [threading.Event(), threading.Event()]
    leave = [threading.Event(), threading.Event()]

    def explain(number):
        def slow(x):
            inside[number].set()
            assert leave[number].wait(30)
            return compiled(vit(x))

        balanced(slow)(images)

    threads = [threading.Thread(target=explain, args=(number,)) for number in (0, 1)]
    for thread, event in zip(threads, inside, strict=True):
        thread.start()
        assert event.wait(30)
    for thread, event in zip(threads, leave, strict=True):  # the first to come leaves first
        event.set()
        thread.join()
    assert not compiled_graphs
    compiled(images)
    assert compiled_graphs


def test_rows_of_a_batch_do_not_depend_on_each_other(double_vit, double_images):
    method = InputXGradient(balanced(double_vit))
    together = method.attribute(double_images, [1, 4])
    alone = [method.attribute(double_images[i : i + 1], t) for i, t in enumerate([1, 4])]
    torch.testing.assert_close(together, torch.cat(alone), rtol=1e-10, atol=1e-12)


def test_with_autocast(vit, images):
    with torch.autocast("cpu", torch.bfloat16):
        x = images.clone().requires_grad_()
        output = balanced(vit)(x)
        assert torch.equal(output, vit(images.clone().requires_grad_()))
        gradient = torch.autograd.grad(output[:, 1].float().sum(), x)[0]
    y = images.clone().requires_grad_()
    exact = torch.autograd.grad(balanced(vit)(y)[:, 1].sum(), y)[0]
    correlation = torch.corrcoef(torch.stack([gradient.flatten(), exact.flatten()]))[0, 1]
    assert correlation > 0.98


def test_checkpointing_inside_an_attributor(vit, images):
    """The blocks run again during the backward, and need the same rules there."""

    def forward(x):
        x = vit._pos_embed(vit.patch_embed(x))
        for block in vit.blocks:
            x = checkpoint(block, x, use_reentrant=False)
        return vit.head(vit.norm(x)[:, 0])

    expected = TransformerAttribution(vit, rule="balanced").attribute(images, 1)
    actual = TransformerAttribution(forward, rule="balanced").attribute(images, 1)
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-6)


def test_checkpointing_under_the_wrapper_is_refused(vit, images):
    vit.set_grad_checkpointing()
    with pytest.raises(UnsupportedModelError, match="without it"):
        balanced(vit)(images)
    assert torch._C._len_torch_function_stack() == 0


@pytest.mark.parametrize("inside", [F.gelu, F.relu, nn.LayerNorm(32), nn.Linear(32, 32)])
def test_checkpointing_is_refused_by_the_wrapper(vit, images, inside):
    """Its second forward would run without the rules, and may save tensors of the same shapes."""

    def forward(x):
        tokens = checkpoint(inside, vit.patch_embed(x), use_reentrant=False)
        return tokens.mean(1)

    with pytest.raises(UnsupportedModelError, match="activation checkpointing"):
        balanced(forward)(images)


def test_inputs_that_are_not_floating_point():
    """Relevance starts at the embeddings, which Captum puts in the place of a layer's output."""
    model = nn.Sequential(nn.Embedding(5, 8), Plus(), nn.Flatten(), nn.Linear(24, 3))
    ids = torch.tensor([[0, 1, 2], [2, 3, 4]])
    with pytest.warns(UserWarning, match="without a floating-point tensor"):
        balanced(model)(ids)
    with pytest.warns(UserWarning, match="Softplus"):
        LayerIntegratedGradients(balanced(model), model[0]).attribute(ids, target=1, n_steps=2)


def test_outputs_in_a_dataclass(vit, images):
    @dataclass
    class Output:
        scores: torch.Tensor

    output = balanced(lambda x: Output(vit(x)))(images)
    assert torch.equal(output.scores, vit(images))
