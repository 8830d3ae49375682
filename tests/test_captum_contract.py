"""What Captum's users rely on: every row of the contract of a drop-in attributor."""

import threading
import warnings
from inspect import signature

import captum.attr
import numpy as np
import pytest
import torch
from captum.attr import NoiseTunnel, visualization
from captum.metrics import infidelity, sensitivity_max
from conftest import DEVICE, make_vit

from captum_reflected import (
    AttentionGradCam,
    AttentionRollout,
    BalancedRelevance,
    MaskRegression,
    RawAttention,
    ReflectedRelevance,
    TokenLayout,
    TransformerAttribution,
    score_masks,
)
from captum_reflected.metrics import evaluate

ATTRIBUTORS = [
    TransformerAttribution,
    ReflectedRelevance,
    MaskRegression,
    BalancedRelevance,
    AttentionRollout,
    RawAttention,
    AttentionGradCam,
]
each_attributor = pytest.mark.parametrize("attributor", ATTRIBUTORS)


def comparable(attributor):
    """Options with which a map does not depend on what a model is wrapped in.

    MaskRegression leaves hidden tokens out of models that are known to allow it.
    """
    return {"baselines": 0.0} if attributor is MaskRegression else {}


def assert_same_map(found, expected):
    """Equal but for rounding, relative to the largest value of the map."""
    peak = expected.abs().max().item()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=3e-5 * peak)


def snapshot(model):
    """All that an attribution could leave behind on a model."""
    return {
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "requires_grad": [parameter.requires_grad for parameter in model.parameters()],
        "grad": [parameter.grad for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks))
            for m in model.modules()
        ],
        "attributes": [sorted(vars(module)) for module in model.modules()],
    }


def random_states():
    """The states of all random generators, CPU's and GPUs'."""
    gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []
    return torch.cat([torch.get_rng_state(), *gpus])


def assert_untouched(before, model):
    after = snapshot(model)
    torch.testing.assert_close(before.pop("values"), after.pop("values"), rtol=0, atol=0)
    assert before == after


@each_attributor
def test_kind_of_attribution(vit, attributor):
    method = attributor(vit)
    assert isinstance(method, captum.attr.Attribution)
    assert not method.multiplies_by_inputs
    assert not method.has_convergence_delta()
    assert method.forward_func is vit
    with pytest.raises(NotImplementedError):
        method.attribute_future()
    assert isinstance(TransformerAttribution(vit), captum.attr.GradientAttribution)
    assert isinstance(ReflectedRelevance(vit), captum.attr.PerturbationAttribution)
    assert isinstance(AttentionGradCam(vit), captum.attr.GradientAttribution)
    assert ReflectedRelevance.get_name() == "Reflected Relevance"


@each_attributor
def test_options_of_captum_raise_an_error_that_says_what_to_use(vit, images, attributor):
    """All options of Captum's methods for images, as far as ours do not have them."""
    own = signature(attributor.attribute).parameters
    foreign = {
        name
        for method in vars(captum.attr).values()
        if isinstance(method, type) and hasattr(method, "attribute")
        for names in [signature(method.attribute).parameters]
        if "inputs" in names
        for name in names
        if name not in own and name != "kwargs"
    }
    assert {"n_steps", "internal_batch_size", "sliding_window_shapes"} <= foreign
    method = attributor(vit)
    for name in foreign:
        message = rf"{attributor.__name__}.attribute\(\) has no option '{name}', .*; wanted: \w"
        with pytest.raises(TypeError, match=message):
            method.attribute(images, 1, **{name: 2})
    with pytest.raises(TypeError, match=r"got an unexpected keyword argument 'n_step'"):
        method.attribute(images, 1, n_step=2)


@pytest.mark.parametrize(
    ("attributor", "name", "wanted"),
    [
        (MaskRegression, "internal_batch_size", r"perturbations_per_eval="),
        (BalancedRelevance, "internal_batch_size", "fewer images in a call"),
        (MaskRegression, "n_steps", r"MaskRegression\(model, forwards=...\)"),
        (MaskRegression, "return_convergence_delta", r"IntegratedGradients\(balanced\(model\)\)"),
        (TransformerAttribution, "perturbations_per_eval", "nothing is masked"),
        (RawAttention, "nt_samples", r"NoiseTunnel\(attributor\).attribute\(inputs, nt_samples="),
    ],
)
def test_what_to_use_instead(vit, images, attributor, name, wanted):
    with pytest.raises(TypeError, match=f"wanted: .*{wanted}"):
        attributor(vit).attribute(images, 1, **{name: 2})


def test_repr(vit):
    layout = TokenLayout(1, (4, 4))
    for attributor, text in (
        (TransformerAttribution(vit), "TransformerAttribution(VisionTransformer)"),
        (RawAttention(lambda x: vit(x)), "RawAttention(<lambda>)"),
        (AttentionGradCam(vit.forward), "AttentionGradCam(VisionTransformer.forward)"),
        (
            AttentionRollout(vit, token_layout=layout, start_layer=1),
            f"AttentionRollout(VisionTransformer, start_layer=1, token_layout={layout!r})",
        ),
        (
            MaskRegression(vit, forwards=50, precision=torch.bfloat16),
            "MaskRegression(VisionTransformer, forwards=50, precision='bf16')",
        ),
        (
            ReflectedRelevance(vit, reflect="rows", rule="lrp", scale_by_maxima=False),
            "ReflectedRelevance(VisionTransformer, rule='lrp', reflect='rows', "
            "scale_by_maxima=False)",
        ),
    ):
        assert repr(attributor) == text


@each_attributor
def test_output_has_the_form_of_the_input(vit, images, attributor):
    plain = attributor(vit).attribute(images, 1)
    assert plain.shape == images.shape
    assert plain.is_contiguous()
    assert not plain.requires_grad
    in_tuple = attributor(vit).attribute((images,), 1)
    assert isinstance(in_tuple, tuple)
    assert len(in_tuple) == 1
    torch.testing.assert_close(in_tuple[0], plain, rtol=0, atol=0)


@each_attributor
@pytest.mark.parametrize(
    ("target", "same_as"),
    [
        (3, [3, 3, 3]),
        (np.int64(3), [3, 3, 3]),
        ((3,), [3, 3, 3]),
        (torch.tensor(3), [3, 3, 3]),
        (torch.tensor([3]), [3, 3, 3]),
        (torch.tensor([3, 0, 6]), [3, 0, 6]),
        (torch.tensor([3, 0, 6], dtype=torch.int32), [3, 0, 6]),
        ([3, 0, 6], [3, 0, 6]),
        ([(3,), (0,), (6,)], [3, 0, 6]),
    ],
    ids=str,
)
def test_every_form_of_target(vit, images, attributor, target, same_as):
    attributions = attributor(vit).attribute(images, target)
    for index, label in enumerate(same_as):
        alone = attributor(vit).attribute(images[index : index + 1], label)
        assert_same_map(attributions[index : index + 1], alone)


# MaskRegression scores the number itself where there is no probability.
@pytest.mark.parametrize("attributor", [each for each in ATTRIBUTORS if each is not MaskRegression])
def test_target_may_be_none_for_one_number_per_image(vit, images, attributor):
    expected = attributor(vit).attribute(images, 2)
    for forward in (lambda x: vit(x)[:, 2], lambda x: vit(x)[:, 2:3]):
        torch.testing.assert_close(attributor(forward).attribute(images), expected)


@each_attributor
def test_tuple_targets_select_in_more_dimensions(vit, images, attributor):
    def forward(x):
        return vit(x)[:, None].expand(-1, 2, -1)

    options = comparable(attributor)
    expected = attributor(vit).attribute(images, 2, **options)
    for target in ((1, 2), [(1, 2), (0, 2), (1, 2)]):
        actual = attributor(forward).attribute(images, target, **options)
        assert_same_map(actual, expected)


@pytest.mark.parametrize("nt_type", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@each_attributor
def test_noise_tunnel(vit, images, attributor, nt_type):
    attributions = NoiseTunnel(attributor(vit)).attribute(
        images, nt_type=nt_type, nt_samples=3, nt_samples_batch_size=2, stdevs=0.1, target=[2, 4, 2]
    )
    assert attributions.shape == images.shape
    assert torch.isfinite(attributions).all()
    assert attributions.abs().max() > 0


@each_attributor
def test_noise_tunnel_without_noise_is_the_attribution(vit, images, attributor):
    quiet = NoiseTunnel(attributor(vit)).attribute(
        images, nt_type="smoothgrad", nt_samples=2, stdevs=1e-9, target=[1, 2, 3]
    )
    torch.testing.assert_close(
        quiet, attributor(vit).attribute(images, [1, 2, 3]), rtol=1e-3, atol=1e-4
    )


@each_attributor
def test_sensitivity_and_infidelity(vit, images, attributor):
    method = attributor(vit)
    sensitivity = sensitivity_max(method.attribute, images, target=1, n_perturb_samples=2)
    assert sensitivity.shape == (3,)
    assert torch.isfinite(sensitivity).all()

    def perturb(inputs):
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    attributions = method.attribute(images, 1)
    error = infidelity(vit, perturb, images, attributions, target=1, n_perturb_samples=2)
    assert error.shape == (3,)
    assert torch.isfinite(error).all()


@pytest.mark.parametrize("rows", [1, 3, 5, 16, 100])
def test_result_does_not_depend_on_perturbations_per_eval(vit, images, rows):
    sizes = []

    def forward(x):
        sizes.append(len(x))
        return vit(x)

    method = ReflectedRelevance(forward)
    expected = method.attribute(images, [1, 2, 3])
    sizes.clear()
    attributions = method.attribute(images, [1, 2, 3], perturbations_per_eval=rows)
    torch.testing.assert_close(attributions, expected, rtol=0, atol=1e-5)
    assert max(sizes) <= max(rows, 1) * 3
    assert sum(sizes[1:]) == 16 * 3


@each_attributor
def test_additional_forward_args_follow_their_image(vit, images, attributor):
    """Per-image tensors go with the rows, everything else passes through untouched."""
    seen = []

    def forward(x, shift, table, name, flag=None):
        assert shift.shape[0] == x.shape[0]
        assert table.shape == (5, 2)
        seen.append((name, flag))
        return vit(x + shift[:, None, None, None])

    shift = torch.tensor([0.0, 1.0, -1.0], device=DEVICE)
    arguments = (shift, torch.zeros(5, 2, device=DEVICE), "name", None)
    attributions = attributor(forward).attribute(images, 1, arguments)
    assert set(seen) == {("name", None)}
    for index in range(3):
        alone = attributor(lambda x, s=shift[index]: vit(x + s)).attribute(
            images[index : index + 1], 1
        )
        assert_same_map(attributions[index : index + 1], alone)


@each_attributor
def test_outer_autograd_modes_and_frozen_parameters(vit, images, attributor):
    expected = attributor(vit).attribute(images, 1)
    with torch.no_grad():
        torch.testing.assert_close(attributor(vit).attribute(images, 1), expected)
    with torch.inference_mode():
        inside = attributor(vit).attribute(images.clone(), 1)
        shifted = attributor(lambda x, y: vit(x + y)).attribute(
            images, 1, torch.zeros(3, 1, 1, 1, device=DEVICE), **comparable(attributor)
        )
    assert not inside.is_inference()
    torch.testing.assert_close(inside, expected)
    whole = attributor(vit).attribute(images, 1, **comparable(attributor))
    assert_same_map(shifted, whole)
    vit.requires_grad_(False)
    torch.testing.assert_close(attributor(vit).attribute(images, 1), expected)
    torch.testing.assert_close(
        attributor(vit).attribute(images.clone().requires_grad_(), 1), expected
    )


def test_relevance_in_inference_mode(vit, images):
    with torch.inference_mode():
        relevance = TransformerAttribution(vit).relevance(images, 1)
    assert not relevance.is_inference()
    torch.testing.assert_close(relevance, TransformerAttribution(vit).relevance(images, 1))


@each_attributor
def test_nothing_is_left_on_model_inputs_or_random_state(images, attributor):
    model = make_vit(proj_drop_rate=0.5, attn_drop_rate=0.5).train()
    model.blocks[1].requires_grad_(False)
    model.head.register_forward_hook(lambda *_: None)
    before, inputs = snapshot(model), images.clone().requires_grad_()
    random_state = random_states()
    first = attributor(model).attribute(inputs, 1)
    assert_untouched(before, model)
    assert torch.equal(random_state, random_states())
    assert inputs.requires_grad
    assert inputs.grad is None
    assert torch.equal(inputs, images)
    assert torch.isfinite(first).all()
    assert torch.equal(attributor(model).attribute(inputs, 1), first)


@each_attributor
def test_random_numbers_of_other_threads_are_not_drawn_again(vit, images, attributor):
    """In eval mode the process-wide generator is left alone, not put back."""
    drawn = []
    handle = vit.blocks[0].register_forward_hook(lambda *_: drawn.append(float(torch.rand(1))))
    attributor(vit).attribute(images, 1)
    attributor(vit).attribute(images, 1)
    handle.remove()
    assert len(set(drawn)) == len(drawn)


def test_outer_autocast_does_not_reach_the_roll_out(vit, images):
    with torch.autocast(images.device.type, torch.bfloat16):
        relevance = TransformerAttribution(vit).relevance(images, 1)
        reflection = ReflectedRelevance(vit).reflect(images, 1)
    assert relevance.dtype == reflection.class_relevance.dtype == torch.float32
    torch.testing.assert_close(reflection.class_relevance, relevance[:, 0, 1:])


@each_attributor
def test_nothing_is_left_after_an_exception(vit, images, attributor):
    def broken(x):
        vit(x)
        torch.rand(1)
        raise RuntimeError("broken on purpose")

    before, random_state = snapshot(vit), random_states()
    for _ in range(2):
        with pytest.raises(RuntimeError, match="broken on purpose"):
            attributor(broken).attribute(images, 1)
        assert torch.is_grad_enabled()
        assert torch.equal(random_state, random_states())
    assert_untouched(before, vit)
    assert torch.overrides._get_current_function_mode() is None
    attributor(vit).attribute(images, 1)


@each_attributor
def test_a_forward_that_works_in_place_does_not_reach_the_callers_image(vit, images, attributor):
    given = images.clone()
    attributor(lambda x: vit(x.sub_(0.5))).attribute(given, 1)
    assert torch.equal(given, images)


@each_attributor
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_dtypes(vit, images, attributor, dtype):
    expected = attributor(vit).attribute(images, 5)
    attributions = attributor(vit.to(dtype)).attribute(images.to(dtype), 5)
    assert attributions.dtype == dtype
    assert torch.isfinite(attributions).all()
    close = torch.nn.functional.cosine_similarity(
        attributions.double().flatten(), expected.double().flatten(), dim=0
    )
    # A regression on few probabilities enlarges the rounding of half precision.
    least = 0.9 if attributor is MaskRegression else 0.97
    assert close > (0.999999 if dtype == torch.float64 else least)


@each_attributor
def test_autocast(vit, images, attributor):
    expected = attributor(vit).attribute(images, 5)
    with torch.autocast(images.device.type, torch.bfloat16):
        attributions = attributor(vit).attribute(images, 5)
    assert attributions.dtype == torch.float32
    found = torch.corrcoef(torch.stack([attributions.flatten(), expected.flatten()]))[0, 1]
    assert found > (0.9 if attributor is MaskRegression else 0.95)


@each_attributor
def test_wrappers_of_the_model(vit, images, attributor):
    options = comparable(attributor)
    expected = attributor(vit).attribute(images, 1, **options)
    for forward in (
        torch.nn.DataParallel(vit),
        torch.nn.Sequential(torch.nn.Identity(), vit),
        vit.forward,
        lambda x: vit(x),
        torch.compile(vit, backend="eager"),
    ):
        attributions = attributor(forward).attribute(images, 1, **options)
        assert_same_map(attributions, expected)


def counting(model):
    """The model, compiled, and what has been compiled of it so far."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    return torch.compile(model, backend=backend), graphs


@each_attributor
def test_explaining_a_compiled_model_compiles_nothing(vit, images, attributor):
    compiled, graphs = counting(vit)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        attributions = attributor(compiled).attribute(images, 1)
    with warnings.catch_warnings(record=True) as expected:
        warnings.simplefilter("always")
        torch.testing.assert_close(attributions, attributor(vit).attribute(images, 1))
    assert [str(warning.message) for warning in told] == [str(each.message) for each in expected]
    assert graphs == []


def test_masked_images_of_a_compiled_model_are_of_few_sizes(vit, images):
    """One graph for the first number of images, one for any other."""
    compiled, graphs = counting(vit)
    for count in (3, 17, 40):
        for grid in ((4, 4), (7, 5)):
            score_masks(lambda x: compiled(x) / 2, images, torch.rand(count, *grid), 1)
    evaluate(compiled, images, torch.rand(3, 32, 32), target=1)
    assert 1 <= len(graphs) <= 2


@each_attributor
def test_activation_checkpointing(vit, images, attributor):
    expected = attributor(vit).attribute(images, 1)
    vit.set_grad_checkpointing()
    torch.testing.assert_close(attributor(vit).attribute(images, 1), expected)


@each_attributor
def test_two_threads_on_one_model(vit, images, attributor):
    expected = [attributor(vit).attribute(images, target) for target in range(4)]
    results, errors = {}, []

    def work(target):
        try:
            for _ in range(5):
                results[target] = attributor(vit).attribute(images, target)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(target,)) for target in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for target in range(4):
        torch.testing.assert_close(results[target], expected[target])


@each_attributor
def test_captum_draws_it(vit, images, attributor):
    attributions = attributor(vit).attribute(images, 5)
    figure, _ = visualization.visualize_image_attr(
        attributions[0].permute(1, 2, 0).cpu().numpy(),
        images[0].permute(1, 2, 0).sigmoid().cpu().numpy(),
        method="blended_heat_map",
        sign="all",
        use_pyplot=False,
    )
    figure.canvas.draw()


def test_show_progress(vit, images, capsys):
    ReflectedRelevance(vit).attribute(images, 1, show_progress=True)
    assert "ReflectedRelevance" in capsys.readouterr().err
    ReflectedRelevance(vit).attribute(images, 1)
    assert capsys.readouterr().err == ""


def test_memory_of_reflection_does_not_hold_all_images(vit, images):
    """The largest tensor in any forward is one chunk, never all J images."""
    largest = []

    def forward(x):
        largest.append(x.untyped_storage().nbytes())
        return vit(x)

    ReflectedRelevance(forward).attribute(images, 1, perturbations_per_eval=2)
    assert max(largest) <= 2 * images.untyped_storage().nbytes()
