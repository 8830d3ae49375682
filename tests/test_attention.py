"""The mode shows every kind of attention, and the model's output stays the same."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from captum_reflected.attention.mode import AttentionMode


def record(function):
    """Runs a function under the mode; its result and the maps that were shown."""
    maps = []

    def observe(attention):
        maps.append(attention)
        return attention

    with AttentionMode(observe):
        result = function()
    return result, maps


def qkv(heads=3, tokens=5, **options):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(2, heads, tokens, 4, generator=generator, **options) for _ in range(3)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"scale": 0.3},
        {"is_causal": True},
        {"attn_mask": torch.randn(5, 5)},
        {"attn_mask": torch.rand(2, 1, 5, 5) > 0.3},
    ],
    ids=str,
)
def test_fused_attention_gives_the_same_output(options):
    if (mask := options.get("attn_mask")) is not None and mask.dtype == torch.bool:
        mask[..., 0] = True  # every token may look somewhere
    query, key, value = qkv()
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    output, maps = record(lambda: F.scaled_dot_product_attention(query, key, value, **options))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    (attention,) = maps
    assert attention.shape == (2, 3, 5, 5)
    torch.testing.assert_close(attention.sum(-1), torch.ones(2, 3, 5))
    torch.testing.assert_close(attention @ value, expected, rtol=1e-5, atol=1e-6)


def test_grouped_query_attention():
    query, key, value = qkv(heads=4)
    key, value = key[:, :2], value[:, :2]
    arguments = (query, key, value)
    expected = F.scaled_dot_product_attention(*arguments, enable_gqa=True)
    output, maps = record(lambda: F.scaled_dot_product_attention(*arguments, enable_gqa=True))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert maps[0].shape == (2, 4, 5, 5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_types_keep_their_dtype(dtype):
    query, key, value = qkv(dtype=dtype)
    output, _ = record(lambda: F.scaled_dot_product_attention(query, key, value))
    assert output.dtype == dtype


@pytest.mark.parametrize("softmax", [F.softmax, torch.softmax, torch.Tensor.softmax])
def test_every_spelling_of_softmax(softmax):
    scores = torch.randn(2, 3, 5, 5)
    for spelled in (lambda: softmax(scores, dim=-1), lambda: softmax(scores, 3)):
        output, maps = record(spelled)
        assert len(maps) == 1
        assert maps[0] is output


def test_what_is_no_attention_is_not_shown():
    def others():
        torch.randn(2, 3, 5, 5).softmax(dim=1)
        torch.randn(2, 1000).softmax(dim=-1)
        query, key, value = qkv()
        return F.scaled_dot_product_attention(query[:, :, :2], key, value)

    _, maps = record(others)
    assert [tuple(attention.shape) for attention in maps] == [(2, 3, 2, 5)]


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("need_weights", [True, False])
@pytest.mark.parametrize("options", [{}, {"bias": False}, {"kdim": 8, "vdim": 8}], ids=str)
@pytest.mark.parametrize("gradients", [True, False])
def test_multi_head_attention(batch_first, need_weights, options, gradients):
    torch.manual_seed(0)
    module = nn.MultiheadAttention(8, 2, batch_first=batch_first, **options).eval()
    module.requires_grad_(gradients)
    x = torch.randn(3, 3, 8)
    expected, weights = module(x, x, x, average_attn_weights=False)
    (output, _), maps = record(lambda: module(x, x, x, need_weights=need_weights))
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)
    assert len(maps) == 1
    torch.testing.assert_close(maps[0].reshape(weights.shape), weights, rtol=1e-5, atol=1e-6)


def test_encoder_layer_takes_no_hidden_fast_path():
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval().requires_grad_(False)
    x = torch.randn(2, 5, 8)
    with torch.no_grad():
        expected = layer(x)
        output, maps = record(lambda: layer(x))
    assert len(maps) == 1
    torch.testing.assert_close(output, expected, rtol=1e-5, atol=1e-6)


def test_model_goes_on_with_what_the_observer_returns():
    query, key, value = qkv()
    with AttentionMode(torch.zeros_like):
        output = F.scaled_dot_product_attention(query, key, value)
    assert torch.count_nonzero(output) == 0
