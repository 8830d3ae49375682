"""No wrong map without a word: what the attributors prove before they trust it."""

import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from conftest import make_vit
from torch import nn

from captum_reflected import (
    AttentionGradCam,
    AttentionRollout,
    RawAttention,
    ReflectedRelevance,
    TokenLayout,
    TransformerAttribution,
    UnsupportedModelError,
)
from captum_reflected.attention.evidence import Evidence
from captum_reflected.attention.mode import AttentionMode

ATTRIBUTORS = [
    TransformerAttribution,
    ReflectedRelevance,
    AttentionRollout,
    RawAttention,
    AttentionGradCam,
]
each_attributor = pytest.mark.parametrize("attributor", ATTRIBUTORS)


def explained(attributor, forward, images, **options):
    """The map, and the texts of the warnings."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attributions = attributor(forward, **options).attribute(images, 1)
    texts = [str(warning.message) for warning in caught]
    return attributions, [text for text in texts if "zero throughout" not in text]


class Attention(nn.Module):
    """In place of timm's: attention in a spelling of its own."""

    def __init__(self, block, spelled):
        super().__init__()
        self.inner = block
        self.spelled = spelled

    def forward(self, x, **_):
        qkv = self.inner.qkv(x).unflatten(2, (3, self.inner.num_heads, -1)).permute(2, 0, 3, 1, 4)
        query, key, value = qkv.unbind()
        scores = query @ key.transpose(-2, -1) * self.inner.scale
        return self.inner.proj((self.spelled(scores) @ value).transpose(1, 2).flatten(2))


SPELLINGS = {
    "exp": lambda s: s.exp() / s.exp().sum(dim=-1, keepdim=True),
    "log-softmax": lambda s: s.log_softmax(dim=-1).exp(),
    "transposed": lambda s: s.transpose(-2, -1).softmax(dim=-2).transpose(-2, -1),
    "aten": lambda s: torch.ops.aten._softmax(s, -1, False),
}


# -- attention that is not seen ----------------------------------------------------------


@pytest.mark.parametrize("layer", [0, 1, 2], ids=["first", "middle", "last"])
@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("options", [{}, {"global_pool": "avg", "fc_norm": False}], ids=str)
def test_a_layer_whose_attention_is_not_seen(images, spelling, layer, options):
    model = make_vit(**options)
    model.blocks[layer].attn = Attention(model.blocks[layer].attn, SPELLINGS[spelling])
    for attributor in (TransformerAttribution, AttentionRollout):
        try:
            _, texts = explained(attributor, model, images)
        except UnsupportedModelError:
            continue
        said = ("mix outside the recorded attention", "the output is not a sum over tokens")
        assert any(words in text for words in said for text in texts)


@each_attributor
def test_what_is_not_seen_is_located(images, attributor):
    model = make_vit()
    model.blocks[1].attn = Attention(model.blocks[1].attn, SPELLINGS["exp"])
    _, texts = explained(attributor, model, images)
    assert len(texts) == 1
    assert "between attention layer 0 (blocks.0.attn (Attention))" in texts[0]
    assert "and attention layer 1 (blocks.2.attn (Attention))" in texts[0]


@each_attributor
def test_nothing_is_said_of_a_model_that_is_all_seen(images, attributor):
    model = make_vit(depth=4)
    assert explained(attributor, model, images)[1] == []
    assert explained(attributor, lambda x: model(x), images)[1] == []
    model.blocks[2].attn = Attention(model.blocks[2].attn, lambda s: s.softmax(dim=-1))
    assert explained(attributor, model, images)[1] == []


def test_token_mixing_beside_attention(images):
    class MeanAdded(nn.Module):
        def forward(self, x):
            return x + x.mean(dim=1, keepdim=True)

    model = make_vit()
    model.blocks[1].ls2 = MeanAdded()
    _, texts = explained(TransformerAttribution, model, images)
    assert any("mix outside the recorded attention" in text for text in texts)


class NoGradient(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **_):
        with torch.no_grad():
            return self.inner(x)


def test_first_blocks_without_gradient(images):
    """Their relevance cannot be had, and R would be that of the rest."""
    model = make_vit()
    model.blocks[0] = NoGradient(model.blocks[0])
    for attributor in (TransformerAttribution, ReflectedRelevance):
        _, texts = explained(attributor, model, images)
        assert len(texts) == 1
        assert "no gradient reached the attention of blocks.0.inner.attn (Attention)" in texts[0]
    # The maps themselves need no gradient.
    assert explained(AttentionRollout, model, images)[1] == []


def test_a_stem_without_gradient_is_no_loss(images):
    model = make_vit()
    model.patch_embed = NoGradient(model.patch_embed)
    expected = TransformerAttribution(make_vit()).attribute(images, 1)
    actual, texts = explained(TransformerAttribution, model, images)
    torch.testing.assert_close(actual, expected)
    assert texts == []


def test_a_block_that_is_computed_and_not_used(images):
    class Unused(nn.Module):
        def __init__(self, block):
            super().__init__()
            self.block = block

        def forward(self, x, **_):
            self.block(x)
            return x

    model = make_vit()
    model.blocks[2] = Unused(model.blocks[2])
    _, texts = explained(TransformerAttribution, model, images)
    assert texts == []


def test_an_earlier_proof_does_not_hold_for_a_changed_model(images):
    model = make_vit()
    assert explained(TransformerAttribution, model, images)[1] == []
    model.blocks[1].attn = Attention(model.blocks[1].attn, SPELLINGS["exp"])
    assert len(explained(TransformerAttribution, model, images)[1]) == 1


def test_a_model_is_proved_once_for_a_shape_of_images(images):
    model, rows = make_vit(), []
    model.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    attributor = TransformerAttribution(model)
    attributor.attribute(images, 1)
    first = len(rows)
    attributor.attribute(images, 2)
    assert len(rows) == first + 1
    assert max(rows) <= len(images)


def test_a_forward_that_cannot_be_repeated_is_said_to_be_unproved(images):
    model = make_vit()

    def forward(x):
        assert len(x) == 3
        return model(x)

    _, texts = explained(TransformerAttribution, forward, images)
    assert len(texts) == 1
    assert "could not be checked" in texts[0]


def test_dropout_is_no_mixing(images):
    model = make_vit(proj_drop_rate=0.3, attn_drop_rate=0.3).train()
    assert explained(TransformerAttribution, model, images)[1] == []


# -- layouts -----------------------------------------------------------------------------


class Ordered(nn.Module):
    """A Vision Transformer whose tokens come in an order of its own."""

    def __init__(self, order, *, read=0, further=1, patch_size=8, **options):
        super().__init__()
        self.vit = make_vit(
            class_token=False, global_pool="", num_classes=0, patch_size=patch_size, **options
        )
        self.further = nn.Parameter(
            torch.randn(1, further, 32, generator=torch.Generator().manual_seed(2))
        )
        self.head = nn.Linear(32, 5)
        self.order, self.read = order, read

    def forward(self, x):
        x = self.vit.patch_drop(self.vit.pos_drop(self.vit.patch_embed(x) + self.vit.pos_embed))
        x = self.order(self.further.expand(len(x), -1, -1), x)
        return self.head(self.vit.norm(self.vit.blocks(x))[:, self.read])


def behind(further, patches):
    """[class, patches, registers]."""
    return torch.cat([further[:, :1], patches, further[:, 1:]], dim=1)


@each_attributor
def test_registers_behind_the_image_are_refused(images, attributor):
    model = Ordered(behind, further=5)
    with pytest.raises(UnsupportedModelError, match=r"changes token 1 most, where token 5 is"):
        attributor(model).attribute(images, 1)


@pytest.mark.parametrize(
    "make",
    [
        *ATTRIBUTORS,
        lambda forward: TransformerAttribution(forward, rule="lrp"),
        lambda forward: ReflectedRelevance(forward, rule="lrp"),
    ],
)
def test_a_class_token_behind_the_image_is_refused(images, make):
    model = Ordered(lambda further, patches: torch.cat([patches, further], dim=1), read=-1)
    message = "read from tokens 16, and of|changes token 0 most, where token 1 is"
    with pytest.raises(UnsupportedModelError, match=message):
        make(model).attribute(images, 1)


def first(further, patches):
    return torch.cat([further, patches], dim=1)


@each_attributor
@pytest.mark.parametrize("options", [{}, {"class_token": False, "global_pool": "avg"}], ids=str)
def test_a_single_patch_is_all_there_is(attributor, options):
    model = make_vit(img_size=8, **options)
    attributions = attributor(model).attribute(torch.randn(2, 3, 8, 8), 1)
    assert attributions.shape == (2, 3, 8, 8)


class Averaged(nn.Module):
    """Tokens (B, N, D) averaged over some of them."""

    def __init__(self, read):
        super().__init__()
        self.read = read

    def forward(self, x):
        return x[:, self.read].mean(dim=1, keepdim=True)


@pytest.mark.parametrize("read", [[4], [4, 7], range(1, 9)], ids=str)
@pytest.mark.parametrize(
    "make", [*ATTRIBUTORS, lambda forward: TransformerAttribution(forward, rule="lrp")]
)
def test_an_answer_read_from_some_image_tokens_is_refused(images, make, read):
    model = Ordered(first, read=0)
    model.vit.norm = nn.Sequential(model.vit.norm, Averaged(list(read)))
    with pytest.raises(UnsupportedModelError, match="the output is read from tokens"):
        make(model).attribute(images, 1)


class Swapped(nn.Module):
    def forward(self, x):
        return x.transpose(1, 2)


@each_attributor
def test_patches_that_are_not_square(images, attributor):
    model = Ordered(first, patch_size=(4, 8))
    model.vit.patch_embed = nn.Sequential(model.vit.patch_embed.proj, nn.Flatten(2), Swapped())
    with pytest.raises(ValueError, match="cannot tell which of the model's 33 tokens"):
        attributor(lambda x: model(x)).attribute(images, 1)
    layout = TokenLayout(17, (4, 4))
    _, texts = explained(attributor, model, images, token_layout=layout)
    assert any("the map is misaligned with the image" in text for text in texts)
    layout = TokenLayout(1, (8, 4))
    assert explained(attributor, model, images, token_layout=layout)[1] == []


@each_attributor
@pytest.mark.parametrize("options", [{}, {"reg_tokens": 3}], ids=str)
def test_dropped_patches_are_refused(images, attributor, options):
    model = make_vit(patch_size=4, patch_drop_rate=0.75, **options).train()
    with pytest.raises(ValueError, match="the model states a grid of 8 x 8 image tokens"):
        attributor(model).attribute(images, 1)


@each_attributor
@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.flip(-1),
        lambda x: x.flip(-2),
        lambda x: x.transpose(-2, -1),
        lambda x: x.roll(8, -1),
    ],
    ids=["mirrored", "upside down", "transposed", "rolled"],
)
def test_images_that_the_forward_moves_are_refused(images, attributor, move):
    model = make_vit()
    with pytest.raises(UnsupportedModelError, match="does not flip, transpose or crop"):
        attributor(lambda x: model(move(x))).attribute(images, 1)


@pytest.mark.parametrize("rule", ["gradient", "lrp"])
def test_images_resized_by_the_forward_keep_their_places(rule):
    model = make_vit()
    images = torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))
    forward = nn.Sequential(nn.Upsample((32, 32), mode="bilinear"), model)
    assert explained(TransformerAttribution, forward, images, rule=rule)[1] == []


class HeadsFirst(nn.Module):
    """Attention whose heads are the first dimension, before the images."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x, **_):
        qkv = self.inner.qkv(x).unflatten(2, (3, self.inner.num_heads, -1)).permute(2, 3, 0, 1, 4)
        query, key, value = qkv.unbind()
        scores = query @ key.transpose(-2, -1) * self.inner.scale
        return self.inner.proj((scores.softmax(dim=-1) @ value).permute(1, 2, 0, 3).flatten(2))


@each_attributor
def test_heads_before_images_are_refused(attributor):
    images = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    model = make_vit()
    for block in model.blocks:
        block.attn = HeadsFirst(block.attn)
    with pytest.raises(UnsupportedModelError, match="images before heads"):
        attributor(model).attribute(images, [0, 1, 2, 3])


# -- masks, numbers that are not finite, random numbers ----------------------------------


@pytest.mark.parametrize("kind", ["bool", "float", "causal"])
def test_rows_that_are_masked_throughout_are_zero(kind):
    query, key, value = torch.randn(3, 2, 4, 5, 8, generator=torch.Generator().manual_seed(0))
    query.requires_grad_()
    allowed = torch.ones(2, 1, 5, 5, dtype=torch.bool)
    allowed[0, :, 3] = False
    allowed[1, :, :, 4] = False
    options = {
        "bool": {"attn_mask": allowed},
        "float": {"attn_mask": torch.zeros(allowed.shape).masked_fill(~allowed, -torch.inf)},
        "causal": {"is_causal": True},
    }[kind]
    expected = F.scaled_dot_product_attention(query, key, value, **options)
    with AttentionMode(lambda attention: attention):
        actual = F.scaled_dot_product_attention(query, key, value, **options)
    torch.testing.assert_close(actual, expected)
    (slope,) = torch.autograd.grad(actual.sum(), query)
    assert slope.isfinite().all()


@each_attributor
def test_padding_tokens_that_see_nothing(images, attributor):
    """A model that is valid: two of its tokens are padding, and attend to nothing."""
    model = make_vit(reg_tokens=2)
    mask = torch.ones(19, 19, dtype=torch.bool)
    mask[1:3] = mask[:, 1:3] = False
    attributions, texts = explained(
        attributor, lambda x: model(x, attn_mask=mask), images, token_layout=TokenLayout(3, (4, 4))
    )
    assert texts == []
    assert attributions.isfinite().all()
    # Grad-CAM's weighted heads may be negative everywhere.
    assert attributions.any() or attributor is AttentionGradCam


@pytest.mark.parametrize("precision", [None, "bf16"])
def test_scores_that_are_not_finite_are_refused(images, precision):
    """A model that standardises its own input divides 0 by 0 where it is black."""
    model = make_vit()

    def forward(x):
        mean, spread = x.mean(dim=(1, 2, 3), keepdim=True), x.std(dim=(1, 2, 3), keepdim=True)
        return model((x - mean) / spread)

    attributor = ReflectedRelevance(forward, precision=precision)
    with pytest.raises(
        ValueError, match=r"masked versions is not finite for image\(s\) \[0, 1, 2\]"
    ):
        attributor.attribute(images, 1)
    assert attributor.attribute(images, 1, baselines=torch.randn(1, 3, 32, 32)).isfinite().all()


class SteepAtZero(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[1] = torch.nan
        return gradient


@pytest.mark.parametrize(
    "attributor", [TransformerAttribution, ReflectedRelevance, AttentionGradCam]
)
def test_gradients_that_are_not_finite_are_refused(images, attributor):
    model = make_vit()
    with pytest.raises(ValueError, match=r"is not finite for image\(s\) \[1\] of the batch"):
        attributor(lambda x: SteepAtZero.apply(model(x))).attribute(images, 1)


def test_random_numbers_of_another_thread_are_not_repeated(images):
    """Under a lambda, of which nobody knows whether it draws."""
    model, drawn, done = make_vit(), [], threading.Event()

    def draw():
        while not done.is_set():
            drawn.append(float(torch.rand((), dtype=torch.float64)))

    thread = threading.Thread(target=draw)
    thread.start()
    try:
        for _ in range(20):
            TransformerAttribution(lambda x: model(x)).attribute(images, 1)
    finally:
        done.set()
        thread.join()
    assert len(drawn) > 100
    assert len(set(drawn)) == len(drawn)


@each_attributor
def test_a_function_that_draws_leaves_the_random_state(images, attributor):
    model = make_vit()
    state = torch.get_rng_state()
    attributor(lambda x: F.dropout(model(x), 0.1)).attribute(images, 1)
    assert torch.equal(torch.get_rng_state(), state)


# -- one start layer ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "attributor", [TransformerAttribution, ReflectedRelevance, AttentionRollout]
)
def test_the_start_layer_is_asked_of_the_model(images, attributor):
    model = make_vit()
    everything = attributor(model).attribute(images, 1)
    model.recommended_start_layer = 2
    expected = attributor(model, start_layer=2).attribute(images, 1)
    assert not torch.equal(expected, everything)
    for forward in (model, nn.Sequential(model), lambda x: model(x), model.forward):
        torch.testing.assert_close(attributor(forward).attribute(images, 1), expected)
    torch.testing.assert_close(attributor(model, start_layer=0).attribute(images, 1), everything)


def test_evidence_is_judged_once(vit, images, monkeypatch):
    judged = []
    judge = Evidence._mixing_between_layers
    monkeypatch.setattr(
        Evidence, "_mixing_between_layers", lambda *args: judged.append(1) or judge(*args)
    )
    for _ in range(3):
        TransformerAttribution(vit).attribute(images, 1)
    assert len(judged) == 1
    TransformerAttribution(vit, token_layout=TokenLayout(1, (4, 4), "mean")).attribute(images, 1)
    assert len(judged) == 2  # another layout is another question
