"""Bad input: an error that says what was given and what is wanted, before any work."""

import pytest
import timm
import torch
from conftest import make_vit

from captum_reflected import (
    AttentionGradCam,
    AttentionRollout,
    BalancedRelevance,
    MaskRegression,
    RawAttention,
    ReflectedRelevance,
    TokenLayout,
    TransformerAttribution,
    UnsupportedModelError,
)
from captum_reflected.metrics import deletion

ATTRIBUTORS = [
    TransformerAttribution, ReflectedRelevance, MaskRegression, BalancedRelevance,
    AttentionRollout, RawAttention, AttentionGradCam,
]  # fmt: skip
each_attributor = pytest.mark.parametrize("attributor", ATTRIBUTORS)
# Those whose map is about a target, and comes of its gradient.
each_with_a_gradient = pytest.mark.parametrize(
    "attributor",
    [
        TransformerAttribution,
        ReflectedRelevance,
        MaskRegression,
        BalancedRelevance,
        AttentionGradCam,
    ],
)
each_that_rolls_out = pytest.mark.parametrize(
    "attributor", [TransformerAttribution, ReflectedRelevance, AttentionRollout]
)


@pytest.fixture
def calls(vit):
    """A forward function that counts its calls."""

    def forward(x, *args):
        forward.count += 1
        return vit(x)

    forward.count = 0
    return forward


X = torch.zeros(2, 3, 32, 32)


@each_attributor
@pytest.mark.parametrize(
    ("inputs", "error", "message"),
    [
        ([X], TypeError, r"list; wanted: a torch.Tensor"),
        (X.numpy(), TypeError, r"ndarray; wanted: a torch.Tensor"),
        (None, TypeError, r"NoneType; wanted"),
        ((X, X), ValueError, r"tuple of 2 tensors; wanted: one image tensor"),
        ((), ValueError, r"tuple of 0 tensors"),
        (([X],), TypeError, r"list; wanted"),
        (X[0], ValueError, r"\(3, 32, 32\); wanted: \(B, C, H, W\); add the batch dimension"),
        (X[None], ValueError, r"\(1, 2, 3, 32, 32\); wanted: \(B, C, H, W\)"),
        (X[:0], ValueError, r"\(0, 3, 32, 32\); wanted: at least one image"),
        (X[..., :0], ValueError, r"\(2, 3, 32, 0\); wanted"),
        (X.byte(), TypeError, r"torch.uint8; wanted: a floating point image"),
        (X + 1j, TypeError, r"torch.complex64; wanted: a floating point image"),
        (X.masked_fill(X == 0, float("nan")), ValueError, r"NaN or infinite"),
        (X - float("inf"), ValueError, r"NaN or infinite"),
    ],
    ids=lambda value: None if isinstance(value, (type, str)) else type(value).__name__,
)
def test_inputs(calls, attributor, inputs, error, message):
    with pytest.raises(error, match=message):
        attributor(calls).attribute(inputs, 1)
    assert calls.count == 0


@each_attributor
@pytest.mark.parametrize(
    ("target", "error", "message"),
    [
        (1.0, TypeError, r"1.0 is a float; wanted: an int"),
        ("cat", TypeError, r"'cat' is a str; wanted: an int"),
        (True, TypeError, r"True is a bool"),
        ((), TypeError, r"\(\) is a tuple"),
        ((1.5,), TypeError, r"tuple"),
        ([1], ValueError, r"list of 1; wanted: one entry for each of the 2 images"),
        ([], ValueError, r"list of 0"),
        ([1, 2.0], TypeError, r"2.0 is a float"),
        ([(1,), (1, 2)], ValueError, r"different lengths"),
        (torch.tensor([1.0, 2.0]), TypeError, r"torch.float32; wanted: an integer tensor"),
        (torch.tensor([True, False]), TypeError, r"torch.bool"),
        (torch.tensor([1, 2, 3]), ValueError, r"\(3,\); wanted: one index, or one for each"),
        (torch.tensor([[1], [2]]), ValueError, r"\(2, 1\); wanted"),
    ],
    ids=str,
)
def test_target_forms(calls, attributor, target, error, message):
    with pytest.raises(error, match=message):
        attributor(calls).attribute(X, target)
    assert calls.count == 0


@each_attributor
@pytest.mark.parametrize(
    ("target", "message"),
    [
        (7, r"\[7, 7\] is out of range .* from 0 up to, not including, \[7\]"),
        (-1, r"\[-1, -1\] is out of range"),
        ([0, 99], r"\[0, 99\] is out of range"),
        ((1, 2), r"2 index\(es\) does not select one number per image"),
    ],
    ids=str,
)
def test_targets_that_do_not_fit_the_output(calls, attributor, target, message):
    with pytest.raises(ValueError, match=message):
        attributor(calls).attribute(X, target)
    assert calls.count == 1


@each_with_a_gradient
def test_no_target(calls, attributor):
    message = r"target is None and forward_func returned shape \(2, 7\); wanted: a target"
    with pytest.raises(ValueError, match=message):
        attributor(calls).attribute(X)
    assert calls.count == 1


@each_attributor
@pytest.mark.parametrize(
    ("wrap", "error", "message"),
    [
        (
            lambda y: (y,),
            TypeError,
            r"a tuple of 0 \(2, 7\); wanted: a tensor of .*model\(x\)\[0\]",
        ),
        (lambda y: {"a": 1, "b": y}, TypeError, r"a dict of a \(int\), b \(2, 7\);.*\(x\)\['b'\]"),
        (lambda y: {"logits": [y]}, TypeError, r"a dict of logits \(list\); wanted"),
        (lambda y: y.sum(), ValueError, r"shape \(\) for 2 images"),
        (lambda y: y[:1], ValueError, r"shape \(1, 7\) for 2 images"),
        (lambda y: y[:, None], ValueError, r"shape \(2, 1, 7\).*one number per image"),
        (lambda y: y.argmax(dim=1), ValueError, r"shape \(2,\)"),
        (lambda y: y * float("inf"), ValueError, r"not finite"),
    ],
    ids=range(8),
)
def test_outputs(vit, attributor, wrap, error, message):
    with pytest.raises(error, match=message):
        attributor(lambda x: wrap(vit(x))).attribute(X, 1)


@each_with_a_gradient
def test_forward_without_gradients(vit, attributor):
    for forward in (
        torch.no_grad()(vit.forward),
        lambda x: vit(x).detach(),
        lambda x: vit(x).round().long(),
    ):
        with pytest.raises(ValueError, match="no gradient flows"):
            attributor(forward).attribute(X, 1)


@each_attributor
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("resnet18", r"no self-attention was seen.*Convolutional"),
        ("swin_tiny_patch4_window7_224", r"\(2, 24, 49, 49\).*wanted: in every layer one N x N"),
    ],
)
def test_models_without_usable_attention(attributor, name, message):
    model = timm.create_model(name).eval()
    with pytest.raises(UnsupportedModelError, match=message):
        attributor(model).attribute(torch.zeros(2, 3, 224, 224), 1)


# The others differentiate by the tokens, and need not know which of them are read.
each_with_a_readout = pytest.mark.parametrize(
    "attributor",
    [each for each in ATTRIBUTORS if each not in (MaskRegression, BalancedRelevance)],
)


@each_with_a_readout
def test_maximum_pooling_is_refused(attributor):
    with pytest.raises(UnsupportedModelError, match="'max' pooling, in which every channel"):
        attributor(make_vit(global_pool="max")).attribute(X, 1)


@each_with_a_readout
def test_attention_readout_of_a_model_without(vit, attributor):
    layout = TokenLayout(1, (4, 4), "attention")
    with pytest.raises(ValueError, match="runs no attention that pools the tokens"):
        attributor(vit, token_layout=layout).attribute(X, 1)


@each_attributor
def test_image_size_that_the_model_refuses(vit, attributor):
    with pytest.raises(AssertionError, match=r"\(40\) doesn't match model \(32\)"):
        attributor(vit).attribute(torch.zeros(1, 3, 40, 40), 1)


@pytest.mark.parametrize("attributor", [TransformerAttribution, ReflectedRelevance])
def test_rule(vit, attributor):
    with pytest.raises(ValueError, match="rule is 'magic'"):
        attributor(vit, rule="magic")


@each_attributor
def test_token_layout(vit, attributor):
    with pytest.raises(TypeError, match="tuple; wanted: TokenLayout"):
        attributor(vit, token_layout=(1, (4, 4)))


@each_that_rolls_out
@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"start_layer": -1}, ValueError, r"start_layer is -1; wanted: 0 or more"),
        ({"start_layer": 1.0}, TypeError, r"start_layer is 1.0; wanted: an int"),
    ],
    ids=str,
)
def test_start_layer(vit, attributor, options, error, message):
    with pytest.raises(error, match=message):
        attributor(vit, **options)


@each_attributor
def test_forward_func_is_callable(attributor):
    with pytest.raises(TypeError, match="forward_func is a str; wanted: a model or a function"):
        attributor("vit")


@each_that_rolls_out
def test_start_layer_beyond_the_model(vit, attributor):
    with pytest.raises(ValueError, match="start_layer is 3; wanted: less than the 3"):
        attributor(vit, start_layer=3).attribute(X, 1)


@each_attributor
def test_layout_that_does_not_fit(vit, attributor):
    with pytest.raises(ValueError, match=r"2 prefix tokens and a 4 x 4 grid, 18 tokens.*have 17"):
        attributor(vit, token_layout=TokenLayout(2, (4, 4))).attribute(X, 1)


@each_attributor
def test_interpolate_mode(calls, attributor):
    with pytest.raises(ValueError, match="interpolate_mode is 'cubic'; wanted: one of bilinear"):
        attributor(calls).attribute(X, 1, interpolate_mode="cubic")
    assert calls.count == 0


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"reflect": "diagonal"}, ValueError, r"reflect is 'diagonal'; wanted: one of columns"),
        ({"combine": "max"}, ValueError, r"combine is 'max'; wanted: one of minmax, sum"),
        ({"score": "loss"}, ValueError, r"score is 'loss'; wanted: one of logit, probability"),
        ({"aggregate": "mean"}, ValueError, r"aggregate is 'mean'; wanted: one of token, mask_w"),
        ({"scale_by_maxima": 1}, TypeError, r"scale_by_maxima is 1; wanted: True or False"),
        ({"reflected_weight": "1"}, TypeError, r"reflected_weight is '1'; wanted: a number"),
        ({"reflected_weight": -1}, ValueError, r"reflected_weight is -1"),
        ({"reflected_weight": float("nan")}, ValueError, r"reflected_weight is nan"),
    ],
    ids=str,
)
def test_options_of_reflected_relevance(vit, options, error, message):
    with pytest.raises(error, match=message):
        ReflectedRelevance(vit, **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"perturbations_per_eval": 0}, ValueError, r"is 0; wanted: 1 or more"),
        ({"perturbations_per_eval": 2.0}, TypeError, r"is 2.0; wanted: an int"),
        ({"baselines": "blur"}, TypeError, r"baselines is a str; wanted: a number or a tensor"),
        ({"baselines": True}, TypeError, r"baselines is a bool"),
        ({"baselines": float("nan")}, ValueError, r"baselines is nan"),
        ({"baselines": torch.zeros(3, 32, 32)}, ValueError, r"\(3, 32, 32\); wanted: a number"),
        ({"baselines": torch.zeros(3, 3, 32, 32)}, ValueError, r"\(2, 3, 32, 32\) or \(1, 3"),
        ({"baselines": X[:1] / 0}, ValueError, r"NaN or infinite"),
        ({"baselines": (0, 0)}, TypeError, r"baselines is a tuple"),
    ],
    ids=range(9),
)
@pytest.mark.parametrize("method", ["attribute", "reflect"])
def test_arguments_of_reflected_relevance(calls, method, options, error, message):
    with pytest.raises(error, match=message):
        getattr(ReflectedRelevance(calls), method)(X, 1, **options)
    assert calls.count == 0


class Rearranged(torch.nn.Module):
    """Attention whose maps are not one of all tokens for each image and head."""

    def __init__(self, kind):
        super().__init__()
        self.kind = kind
        self.embed = torch.nn.Conv2d(3, 16, 4, 4)
        self.attention = torch.nn.MultiheadAttention(16, 2, batch_first=True)
        self.head = torch.nn.Linear(16, 5)

    def forward(self, images):
        x = self.embed(images).flatten(2).mT  # (B, 64, 16)
        if self.kind == "windows":
            x = x.unflatten(1, (4, 16)).flatten(0, 1)
            x = x + self.attention(x, x, x)[0]
            x = x.unflatten(0, (-1, 4)).flatten(1, 2)
        else:  # heads before images, in one dimension
            heads = torch.cat(x.split(8, dim=-1))
            x = x + torch.cat(((heads @ heads.mT).softmax(dim=-1) @ heads).chunk(2), dim=-1)
        return self.head(x.mean(dim=1))


@each_attributor
@pytest.mark.parametrize(
    ("kind", "message"),
    [("windows", "inside windows"), ("heads first", "images and heads .* one dimension")],
)
def test_attention_that_only_looks_like_a_vision_transformers(attributor, kind, message):
    with pytest.raises(UnsupportedModelError, match=message):
        attributor(Rearranged(kind).eval()).attribute(X, 1)


def test_a_probability_needs_to_know_the_classes(vit):
    """In the output of a segmentation, they are not in the last dimension."""

    def forward(images):
        return vit(images)[:, :, None, None].expand(-1, -1, 4, 6)

    with pytest.raises(
        ValueError, match=r"shape \(\d+, \d+, 4, 6\), of which it is not known where"
    ):
        MaskRegression(forward).attribute(X, (1, 2, 3))
    logits = ReflectedRelevance(forward).attribute(X, (1, 2, 3))
    torch.testing.assert_close(logits, ReflectedRelevance(vit).attribute(X, 1))


def test_a_probability_needs_two_classes(vit):
    for forward in (lambda x: vit(x)[:, :1], lambda x: vit(x)[:, 0]):
        with pytest.raises(ValueError, match=r"one number per image; wanted: .*score=\"logit\""):
            ReflectedRelevance(forward, score="probability").attribute(X)
        with pytest.raises(ValueError, match="wanted: logits of two classes or more"):
            deletion(forward, X, torch.zeros(2, 32, 32))
