"""Equations 1-4 and Figure 4 against their literal form, and at their edges."""

import naive
import pytest
import torch

from captum_reflected import reflected_images
from captum_reflected.masking.reflection import (
    combine_terms,
    min_max,
    reflection_masks,
    replace_diagonal,
)


@pytest.fixture
def relevance():
    return torch.rand(2, 6, 6, generator=torch.Generator().manual_seed(3))


def test_equations_1_and_2_replace_the_diagonal():
    matrix = torch.tensor([[[9.0, 1.0, 2.0], [3.0, 9.0, 0.0], [4.0, 5.0, 9.0]]])
    expected = [[[4.0, 1.0, 2.0], [3.0, 5.0, 0.0], [4.0, 5.0, 2.0]]]
    assert replace_diagonal(matrix).tolist() == expected
    assert matrix[0, 0, 0] == 9  # the caller's matrix stays


@pytest.mark.parametrize("scale_by_maxima", [True, False])
def test_masks_are_those_of_the_paper(relevance, scale_by_maxima):
    masks = reflection_masks(relevance, (2, 3), scale_by_maxima=scale_by_maxima)
    assert masks.shape == (2, 6, 2, 3)
    for image in range(2):
        expected = naive.masks(relevance[image], scale_by_maxima)
        torch.testing.assert_close(masks[image].flatten(1), expected.T)


def test_rows_are_the_columns_of_the_transpose(relevance):
    torch.testing.assert_close(
        reflection_masks(relevance, (2, 3), reflect="rows"), reflection_masks(relevance.mT, (2, 3))
    )
    assert not torch.allclose(
        reflection_masks(relevance, (2, 3), reflect="rows"), reflection_masks(relevance, (2, 3))
    )


def test_constants_become_zero_and_never_nan(relevance):
    constant_column = relevance.clone()
    constant_column[:, :, 1] = 0.3
    masks = reflection_masks(constant_column, (2, 3), scale_by_maxima=False)
    assert torch.count_nonzero(masks[:, 1]) == 0
    assert torch.isfinite(masks).all()
    equal_maxima = relevance / replace_diagonal(relevance).amax(dim=1, keepdim=True)
    assert torch.count_nonzero(reflection_masks(equal_maxima.round(decimals=6), (2, 3))) == 0
    for degenerate in (torch.zeros(1, 6, 6), torch.eye(6)[None], torch.ones(1, 6, 6)):
        assert torch.count_nonzero(reflection_masks(degenerate, (2, 3))) == 0
    assert reflection_masks(torch.rand(1, 1, 1), (1, 1)).tolist() == [[[[0.0]]]]


def test_min_max():
    values = torch.tensor([[2.0, 4.0, 3.0], [5.0, 5.0, 5.0]])
    assert min_max(values, dim=-1).tolist() == [[0.0, 1.0, 0.5], [0.0, 0.0, 0.0]]


@pytest.mark.parametrize("baseline", [0.0, 0.7])
def test_equations_3_and_4_show_the_image_through_the_mask(relevance, baseline):
    images = torch.randn(2, 3, 8, 12)
    masks = reflection_masks(relevance, (2, 3))
    seen = reflected_images(images, masks, baseline)
    assert seen.shape == (2, 6, 3, 8, 12)
    for image in range(2):
        for token in range(6):
            expected = naive.reflected_image(
                images[image], masks[image, token].flatten(), (2, 3), baseline
            )
            torch.testing.assert_close(seen[image, token], expected)
    tensor = reflected_images(images, masks, torch.full_like(images, baseline))
    torch.testing.assert_close(tensor, seen)


def test_terms_are_combined_as_named():
    scores = torch.tensor([[1.0, 3.0, 2.0]])
    relevance = torch.tensor([[0.0, 0.1, 0.2]])
    assert combine_terms(scores, relevance).tolist() == [[0.0, 1.5, 1.5]]
    torch.testing.assert_close(
        combine_terms(scores, relevance, reflected_weight=0.5), torch.tensor([[0.0, 1.0, 1.25]])
    )
    torch.testing.assert_close(
        combine_terms(scores, relevance, combine="sum"), torch.tensor([[1.0, 3.1, 2.2]])
    )
