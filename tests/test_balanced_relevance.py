"""The residual stream, found without names, and its balanced relevance."""

import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit
from test_balanced import ByHand
from test_model_families import TIMM, randomised, timm_model
from torch import nn
from torchvision.models import VisionTransformer as TorchvisionTransformer

from captum_reflected import BalancedRelevance, TokenLayout, UnsupportedModelError, balanced
from captum_reflected.inputs.batch import make_batch, preserving_state
from captum_reflected.relevance.residual_stream import stream_relevances

TARGETS = [2, 5, 0]


def relevance_of_inputs(modules, forward_func, images, targets):
    """Activation times balanced gradient at the inputs of modules, each input once: (L, B, N)."""
    inputs = []
    hooks = [
        module.register_forward_pre_hook(lambda _module, args: inputs.append(args[0]))
        for module in modules
    ]
    output = balanced(forward_func)(images)
    for hook in hooks:
        hook.remove()
    target = torch.tensor(targets)[:, None]
    gradients = torch.autograd.grad(output.gather(1, target).sum(), inputs)
    return torch.stack([(z * g).sum(-1).detach() for z, g in zip(inputs, gradients, strict=True)])


def found(forward_func, images, targets, **options):
    with preserving_state(make_batch(images, targets, None), gradients=True) as call:
        return stream_relevances(forward_func, call, **options)


def check(forward_func, images, targets, expected):
    torch.testing.assert_close(
        torch.stack(found(forward_func, images, targets).layers), expected, rtol=1e-3, atol=1e-5
    )


def test_equals_a_forward_written_by_hand(images):
    model, images = make_vit().double(), images.double()
    forward = ByHand(model, images)
    score = forward.output.gather(1, torch.tensor(TARGETS)[:, None]).sum()
    gradients = torch.autograd.grad(score, forward.inputs)
    layers = [(z * g).sum(-1) for z, g in zip(forward.inputs, gradients, strict=True)]
    expected = torch.stack(layers).mean(0)[:, 1:].detach()
    actual = BalancedRelevance(model).attribute(images, TARGETS)
    enlarged = F.interpolate(expected.view(3, 1, 4, 4), (32, 32), mode="bilinear")
    torch.testing.assert_close(actual, enlarged.expand_as(images), rtol=1e-9, atol=1e-12)


def test_every_block_has_the_same_sum(images):
    """The logit, but for the share of the biases from there on: here there are none."""
    model = make_vit().double()
    for name, parameter in model.named_parameters():
        if "bias" in name:
            nn.init.zeros_(parameter)
    sums = torch.stack(found(model, images.double(), TARGETS).layers).sum(-1)
    logits = model(images.double()).gather(1, torch.tensor(TARGETS)[:, None])[:, 0].detach()
    torch.testing.assert_close(sums, logits.expand(3, -1), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", TIMM)
def test_every_family_of_timm(kind):
    name, options, size, _ = TIMM[kind]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = timm_model(name, options, size)
    images = torch.randn(2, 3, *size, generator=torch.Generator().manual_seed(1))
    blocks = model.blocks if hasattr(model, "blocks") else model.encoder.blocks
    expected = relevance_of_inputs(blocks, model, images, [2, 1])
    # "prr" pooling is one more layer of self-attention.
    layers = torch.stack(found(model, images, [2, 1]).layers)[: len(expected)]
    torch.testing.assert_close(layers, expected, rtol=1e-3, atol=1e-5)
    maps = BalancedRelevance(model).attribute(images, [2, 1])
    assert (maps.amax(dim=(1, 2, 3)) > maps.amin(dim=(1, 2, 3))).all()


def test_torchvision(images):
    model = randomised(
        TorchvisionTransformer(32, 8, 2, 2, 32, 64, num_classes=7)  # nn.MultiheadAttention
    )
    expected = relevance_of_inputs(model.encoder.layers, model, images, TARGETS)
    check(model, images, TARGETS, expected)


class Tower(nn.Module):
    """A transformer of layers that are given, with the mean of the tokens as its output.

    Args:
        layers: modules from (B, N, D) to (B, N, D), or (N, B, D) if ``tokens_first``.
        tokens_first: whether tokens come before images.
    """

    def __init__(self, *layers, tokens_first=False):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.positions = nn.Parameter(torch.zeros(1, 16, 16))
        self.layers = nn.ModuleList(layers)
        self.tokens_first = tokens_first
        self.head = nn.Linear(16, 7)
        randomised(self)

    def forward(self, images):
        x = self.patches(images).flatten(2).mT + self.positions
        x = x.transpose(0, 1) if self.tokens_first else x
        for layer in self.layers:
            x = layer(x)
        return self.head(x.mean(0 if self.tokens_first else 1))


class Layer(nn.Module):
    def __init__(self, order):
        super().__init__()
        self.order = order
        self.attention = nn.MultiheadAttention(16, 2, batch_first=order != "tokens first")
        self.norm, self.other, self.mlp = nn.LayerNorm(16), nn.LayerNorm(16), nn.Linear(16, 16)

    def attend(self, x):
        return self.attention(x, x, x, need_weights=False)[0]

    def forward(self, x):
        if self.order == "post-norm":
            x = self.norm(x + self.attend(x))
            return self.other(x + F.gelu(self.mlp(x)))
        if self.order == "in place":
            x += self.attend(x)
            return x + F.gelu(self.mlp(x))
        if self.order == "parallel":
            y = self.norm(x)
            return x + self.attend(y) + F.gelu(self.mlp(y))
        x = x + self.attend(self.norm(x))
        return x + F.gelu(self.mlp(self.other(x)))


@pytest.mark.parametrize("order", ["pre-norm", "post-norm", "parallel", "tokens first"])
def test_the_stream_is_found_whatever_the_block(images, order):
    model = Tower(*(Layer(order) for _ in range(3)), tokens_first=order == "tokens first")
    expected = relevance_of_inputs(model.layers, model, images, TARGETS)
    if order == "tokens first":
        expected = expected.mT
    check(model, images, TARGETS, expected)


def test_a_stream_that_is_modified_in_place_is_refused(images):
    model = Tower(Layer("in place"), Layer("in place")).requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"modified in place; wanted: .* x = x \+ y"):
        BalancedRelevance(model).attribute(images, 1)


def test_as_many_images_as_tokens():
    model = Tower(Layer("pre-norm"), Layer("pre-norm"))
    images = torch.randn(16, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    targets = [number % 7 for number in range(16)]
    maps = BalancedRelevance(model).attribute(images, targets)
    for row in (0, 7, 15):
        alone = BalancedRelevance(model).attribute(images[row : row + 1], targets[row])
        torch.testing.assert_close(maps[row : row + 1], alone, rtol=1e-4, atol=1e-5)


def test_one_image_of_one_token():
    model = make_vit(img_size=8, class_token=False, global_pool="avg")
    maps = BalancedRelevance(model).attribute(torch.randn(1, 3, 8, 8), 1)
    assert maps.shape == (1, 3, 8, 8)
    assert maps.any()


def test_two_streams_are_refused(images):
    class Two(nn.Module):
        """Each half of the channels has blocks of its own, which meet in the head."""

        def __init__(self):
            super().__init__()
            self.left, self.right = Tower(Layer("pre-norm")), Tower(Layer("pre-norm"))

        def forward(self, x):
            return self.left(x) + self.right(x)

    with pytest.raises(UnsupportedModelError, match=r"side by side|no tensor of 16 tokens"):
        BalancedRelevance(Two()).attribute(images, 1)


def test_skipped_layers_share_the_input_that_carries_all(images):
    """The output also reads the first block's output, so nothing after it carries all."""
    model = Tower(Layer("pre-norm"), Layer("pre-norm"), Layer("pre-norm"))

    def forward(x):
        tokens = model.patches(x).flatten(2).mT
        first = model.layers[0](tokens)
        last = model.layers[2](model.layers[1](first))
        return model.head((first + last).mean(1))

    layers = found(forward, images, TARGETS).layers
    assert len(layers) == 2  # the inputs of the first and the second block


def test_prefix_tokens_in_another_place_are_refused(images):
    model = make_vit()

    def forward(x):
        x = model._pos_embed(model.patch_embed(x))
        x = model.blocks(torch.cat([x[:, 1:], x[:, :1]], dim=1))
        return model.head(model.norm(x)[:, -1])

    with pytest.raises(UnsupportedModelError, match="changes token 0 most, where token 1 is"):
        BalancedRelevance(forward).attribute(images, 1)


@pytest.mark.parametrize("read", [[4], range(1, 9)], ids=str)
def test_any_readout_is_explained(images, read):
    """The gradient knows which tokens are read; no layout has to say it."""
    model = make_vit()

    def forward(x):
        tokens = model.blocks(model._pos_embed(model.patch_embed(x)))
        return model.head(model.norm(tokens[:, list(read)]).mean(1))

    check(forward, images, TARGETS, relevance_of_inputs(model.blocks, forward, images, TARGETS))


def test_a_given_layout(images):
    layout = TokenLayout(1, (4, 4))
    expected = BalancedRelevance(make_vit()).attribute(images, 1)
    actual = BalancedRelevance(make_vit(), token_layout=layout).attribute(images, 1)
    assert torch.equal(actual, expected)


def test_a_model_without_gradients_is_refused(vit, images):
    def forward(x):
        with torch.no_grad():
            return vit(x)

    with pytest.raises(UnsupportedModelError, match="no gradient flows"):
        BalancedRelevance(forward).attribute(images, 1)


def test_probabilities_are_refused(vit, images):
    with pytest.raises(UnsupportedModelError, match="returns logits"):
        BalancedRelevance(lambda x: vit(x).softmax(-1)).attribute(images, 1)


def test_an_operation_without_a_rule_is_named(images):
    model = make_vit(act_layer=nn.Softplus)
    with pytest.warns(UserWarning, match="Softplus in blocks.0.mlp.act"):
        BalancedRelevance(model).attribute(images, 1)


def test_negative_values_speak_against_the_target(vit, images):
    maps = BalancedRelevance(vit).attribute(images, 1)
    assert (maps < 0).any()
    assert (maps > 0).any()
    negated = BalancedRelevance(lambda x: -vit(x)).attribute(images, 1)
    torch.testing.assert_close(negated, -maps)


@pytest.mark.filterwarnings("ignore")  # torch and this package warn of the layers
def test_layers_without_a_derivative(vit, images):
    """As dynamically quantised ones: torch goes on without their gradients."""
    quantised = torch.ao.quantization.quantize_dynamic(vit, {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(UnsupportedModelError, match="no derivative, as those of quantised layers"):
        BalancedRelevance(quantised).attribute(images, 1)
