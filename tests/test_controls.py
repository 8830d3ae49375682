"""Controls: maps that know nothing of the model, and say only that."""

import pytest
import torch

from captum_reflected.attr.controls import center_gaussian_maps, random_maps
from captum_reflected.attr.methods import METHODS


def test_the_noise_of_an_image_is_its_own(images):
    maps = random_maps(images)
    assert maps.shape == (3, 32, 32)
    assert len({tuple(heat.flatten().tolist()) for heat in maps}) == 3
    torch.manual_seed(7)
    before = torch.get_rng_state()
    for row in range(3):
        assert torch.equal(random_maps(images[row : row + 1])[0], maps[row])
    assert torch.equal(random_maps(images.flip(0)).flip(0), maps)
    assert torch.equal(random_maps(images.mT.contiguous().mT), maps)
    assert torch.equal(torch.get_rng_state(), before)
    changed = images.clone()
    changed[0, 0, 0, 0] += 1e-3
    assert not torch.equal(random_maps(changed)[0], maps[0])


def test_the_noise_is_uniform_and_as_coarse_as_tokens():
    images = torch.randn(40, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    maps = random_maps(images, grid_size=(4, 2))
    # Bilinear, so that the border shows the corner tokens themselves.
    corners = maps[:, [0, 0, -1, -1], [0, -1, 0, -1]]
    assert corners.mean().item() == pytest.approx(0.5, abs=0.07)
    assert corners.std().item() == pytest.approx((1 / 12) ** 0.5, abs=0.05)
    # Between the centres of two tokens the noise is a straight line.
    assert maps[:, 0, 7:21].diff(n=2, dim=1).abs().max() < 1e-6
    assert maps[:, 4:10, 0].diff(n=2, dim=1).abs().max() < 1e-6
    assert maps[:, :, 0].diff(dim=1).abs().max() > 0.05


def test_the_gaussian_is_at_the_centre():
    maps = center_gaussian_maps(torch.randn(2, 3, 21, 11), sigma=0.5)
    assert maps.shape == (2, 21, 11)
    assert maps[0, 10, 5] == maps.max() == 1
    assert torch.equal(maps, maps.flip(1)) or torch.allclose(maps, maps.flip(1), atol=1e-6)
    # Half a side from the centre would be one standard deviation.
    distance = ((torch.arange(21) - 10) / 21) ** 2
    torch.testing.assert_close(maps[1, :, 5], torch.exp(-2 * distance))


@pytest.mark.parametrize("control", [random_maps, center_gaussian_maps])
def test_dtype_and_bad_input(control, images):
    assert control(images.half()).dtype == torch.float16
    with pytest.raises(TypeError, match=r"torch.uint8; wanted: a floating point image"):
        control(images.byte())
    with pytest.raises(ValueError, match=r"\(3, 32, 32\); wanted: \(B, C, H, W\)"):
        control(images[0])


@pytest.mark.parametrize(
    ("sigma", "error"), [(0, ValueError), (float("inf"), ValueError), ("1", TypeError)]
)
def test_bad_sigma(images, sigma, error):
    with pytest.raises(error, match="sigma is"):
        center_gaussian_maps(images, sigma=sigma)


def test_bad_grid(images):
    with pytest.raises(ValueError, match=r"grid_size is \(0, 4\); wanted: \(rows, columns\)"):
        random_maps(images, grid_size=(0, 4))


def test_gradient_methods_by_name_are_gradients(vit, images):
    targets = torch.tensor([2, 4, 0])
    inputs = images.clone().requires_grad_()
    vit(inputs)[range(3), targets].sum().backward()
    vit.zero_grad()
    found = images.clone()
    torch.testing.assert_close(
        METHODS["saliency"].explain(vit, found, targets), inputs.grad.abs().amax(dim=1)
    )
    torch.testing.assert_close(
        METHODS["input_x_gradient"].explain(vit, found, targets), (inputs.grad * images).sum(dim=1)
    )
    assert not found.requires_grad
    assert found.grad is None


@pytest.mark.parametrize(
    ("name", "maps"), [("random", random_maps), ("center_gaussian", center_gaussian_maps)]
)
def test_controls_by_name_run_no_model(images, name, maps):
    assert torch.equal(METHODS[name].explain(None, images, torch.zeros(3)), maps(images))
