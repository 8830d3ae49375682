"""What happens where memory does not suffice, with an allocator that really fails."""

import warnings

import pytest
import torch

from captum_reflected import ReflectedRelevance
from captum_reflected.inputs.chunks import default_rows_per_forward
from captum_reflected.metrics import evaluate

ROWS = default_rows_per_forward(torch.device("cpu"))


def needs_memory(model, most, seen, error=None):
    """A forward of ``most`` images at a time; more ask for more memory than there is."""

    def forward(images):
        seen.append(len(images))
        if len(images) > most and not images.requires_grad and not torch.is_grad_enabled():
            if error is not None:
                raise error
            torch.empty(2**58)
        return model(images)

    return forward


@pytest.mark.parametrize("error", [None, torch.OutOfMemoryError("CUDA out of memory")], ids=str)
@pytest.mark.parametrize("most", [1, 3, 7])
def test_fewer_images_at_a_time_and_one_warning(vit, images, most, error):
    expected = ReflectedRelevance(vit).attribute(images, 1)
    seen = []
    attributor = ReflectedRelevance(needs_memory(vit, most, seen, error))
    with pytest.warns(UserWarning, match="out of memory with 12 images") as caught:
        attributions = attributor.attribute(images, 1, perturbations_per_eval=4)
    assert len(caught) == 1
    torch.testing.assert_close(attributions, expected, rtol=1e-4, atol=1e-5)
    reflected = seen[seen.index(12) :]  # what is proved of the model comes before
    failed = [rows for rows in reflected if rows > most]
    assert failed == [12, 6, 3, 1][: len(failed)]
    assert sum(reflected) - sum(failed) == 3 * 16


def test_metrics_too(vit, images):
    attributions = torch.rand(3, 32, 32)
    expected = evaluate(vit, images, attributions, target=1)
    with pytest.warns(UserWarning, match=f"out of memory with {ROWS} images"):
        result = evaluate(needs_memory(vit, 2, []), images, attributions, target=1)
    torch.testing.assert_close(result.deletion, expected.deletion)
    torch.testing.assert_close(result.insertion, expected.insertion)


def test_not_even_one_image(vit, images):
    attributor = ReflectedRelevance(needs_memory(vit, 0, []))
    with (
        pytest.warns(UserWarning, match=f"out of memory with {ROWS} images"),
        pytest.raises(
            torch.OutOfMemoryError, match=r"single image in a forward .*allocate.*wanted: more free"
        ),
    ):
        attributor.attribute(images, 1)


def test_other_errors_are_the_callers(vit, images):
    attributor = ReflectedRelevance(needs_memory(vit, 1, [], RuntimeError("shapes differ")))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        with pytest.raises(RuntimeError, match="shapes differ"):
            attributor.attribute(images, 1)


@pytest.mark.parametrize("most", [1, 3, 16])
@pytest.mark.filterwarnings("ignore:out of memory")
def test_the_bar_ends_at_all_rows(vit, images, capsys, most):
    """Whatever the chunks were halved to."""
    attributor = ReflectedRelevance(needs_memory(vit, most, []))
    attributor.attribute(images, 1, perturbations_per_eval=4, show_progress=True)
    last = capsys.readouterr().err.rstrip().rpartition("\r")[2]
    assert last.startswith("ReflectedRelevance: 100%")
    assert " 48/48 " in last
