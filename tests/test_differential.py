"""Random models against an oracle that shares no code with the package.

Each attributor either equals the oracle, or says clearly why it does not explain the model, or
warns. It never gives another map without a word. Ordinary models are all explained.

    python tests/test_differential.py --models 5000 --jobs 2 [--device cuda]

tries more of them than a test run does, and prints what became of each oddity. Model 17 of
these alone: ``--first 17 --models 1``.
"""

from __future__ import annotations

import argparse
import math
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context

import naive
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from random_models import build, wrapped
from random_plans import CLASSES, FAMILIES, ODDITIES, OWN, Plan, draw_plan

from captum_reflected import (
    AttentionGradCam,
    AttentionRollout,
    RawAttention,
    ReflectedRelevance,
    TransformerAttribution,
    UnsupportedModelError,
)

TOLERANCES = {torch.float64: 1e-8, torch.float32: 1e-4}
OUTCOMES = ("equal", "refused", "warned", "silent", "unclear")
# Of a test run, by attributor; tests/conftest.py prints them.
COUNTS: dict[str, Counter[str]] = {}


@dataclass(frozen=True)
class Outcome:
    """What became of one attributor on one model.

    Attributes:
        kind: of OUTCOMES; "silent" is a difference without a word, "unclear" an error that
            does not say what is wanted.
        difference: of the maps, by the maximum of the right one.
        words: of the error, or of a warning that the right map does not explain.
    """

    kind: str
    difference: float = 0.0
    words: str = ""

    @property
    def is_wrong(self):
        return self.kind in ("silent", "unclear")

    @property
    def is_plainly_equal(self):
        return self.kind == "equal" and not self.words


# -- the oracle --------------------------------------------------------------------------


def expected(plan, images, targets):
    """The model's answers, and of each attributor the right map with its tolerance.

    Maps are (B, H, W), in float64; none where there is no right one. Rounding counts by how
    much it is enlarged where terms cancel, and in float32 by what it does to the oracle itself.
    """
    dtype = getattr(torch, plan.dtype)
    answers, right, conditions = expected_in(torch.float64, plan, images, targets)
    tolerances = {name: TOLERANCES[dtype] * condition for name, condition in conditions.items()}
    if right and dtype == torch.float32:
        _, rounded, _ = expected_in(dtype, plan, images, targets)
        for name, saliency in right.items():
            lost = relative_difference(rounded[name].double(), saliency)
            tolerances[name] = max(tolerances[name], 10 * lost)
    return answers, {name: (right[name], tolerances[name]) for name in right}


def expected_in(dtype, plan, images, targets):
    """The model's answers, the map of each attributor and its condition, in one precision."""
    record = []
    model, truth = build(plan, record)
    model, images = model.to(images.device, dtype), images.to(dtype)
    answers = model(images).detach()
    maps: dict[str, list[torch.Tensor]] = {}
    conditions: Counter[str] = Counter()
    for image, target in zip(images, targets, strict=True):
        if not truth.is_defined:
            break
        record.clear()
        model.zero_grad(set_to_none=True)
        answer = model(image[None].clone().requires_grad_())[0, target]
        if answer.requires_grad:
            answer.backward()
        found = expected_of_one(model, truth, list(record), image, target, plan.baseline)
        for name, (saliency, condition) in found.items():
            maps.setdefault(name, []).append(saliency)
            conditions[name] = max(conditions[name], condition)
    return answers, {name: torch.stack(each) for name, each in maps.items()}, conditions


def expected_of_one(model, truth, record, image, target, baseline):
    """The right maps of one image, from its recorded attention."""
    order = torch.tensor(truth.order, device=image.device)
    prefix, count = truth.specials, len(truth.order)
    image_tokens = order[prefix:]
    layers, pooling = [], []
    for attention in record:
        a, g = attention.detach()[0], attention.grad
        g = torch.zeros_like(a) if g is None else g[0]
        keys = order if a.shape[2] == count else image_tokens.argsort().argsort()
        if a.shape[1] == a.shape[2] == count:
            layers.append((a[:, order][:, :, keys], g[:, order][:, :, keys]))
        else:
            pooling.append((a[:, :, keys], g[:, :, keys]))
    relevance = naive.relevance_matrix(layers)
    if pooling:
        readout = naive.pooling_weights(pooling, count)
        plainly = [(a, torch.ones_like(a)) for a, _ in pooling]
        rollout_readout = naive.pooling_weights(plainly, count)
        last = pooling[-1]
        raw = torch.stack([head.mean(dim=0) for head in last[0]]).mean(dim=0)
        raw = raw[len(raw) - (count - prefix) :]
        queries = last[0].shape[1]
        weights = torch.ones(queries).to(raw) / queries
        last, own = (last, weights), last[0].shape[2] - (count - prefix)
    else:
        readout = rollout_readout = truth.readout.to(relevance)
        raw = torch.stack([readout @ head for head in layers[-1][0]]).mean(dim=0)[prefix:]
        last, own = (layers[-1], readout), prefix
    (attention, gradient), rows = last
    heat = naive.grad_cam([(attention, gradient)], rows, own)
    most_heat = naive.grad_cam([(attention, gradient.abs())], rows, own)
    class_relevance = (readout @ relevance)[prefix:]
    columns = naive.masks(relevance[prefix:, prefix:])
    scores = naive.reflected_scores(model, image, target, columns, truth.grid, baseline)
    reflected = naive.min_max(scores) + naive.min_max(class_relevance)
    if not columns.any() and not class_relevance.any():
        reflected = torch.zeros_like(reflected)
    saliencies = {
        "TransformerAttribution": class_relevance,
        "AttentionRollout": (rollout_readout @ naive.rollout(layers))[prefix:],
        "RawAttention": raw,
        "AttentionGradCam": heat,
        "ReflectedRelevance": reflected,
    }
    maps = {
        name: (naive.enlarged(saliency, truth.grid, image.shape[-2:]), 1.0)
        for name, saliency in saliencies.items()
    }
    conditions = {
        "AttentionGradCam": condition_of(most_heat, heat),
        "ReflectedRelevance": condition_of(scores, scores - scores.min()),
    }
    for name, condition in conditions.items():
        maps[name] = maps[name][0], condition
    # The scores themselves, held against the fast forward of masked images.
    return {**maps, SCORES: (scores, 1.0)}


def condition_of(terms, result):
    """How much larger the terms of a sum are than what they leave of each other."""
    largest = float(result.abs().max())
    return max(1.0, float(terms.abs().max()) / largest) if largest else 1.0


# -- what the package says ---------------------------------------------------------------

SCORES = "ReflectedRelevance.reflect"
ATTRIBUTORS: dict[str, Callable] = {
    "TransformerAttribution": TransformerAttribution,
    "AttentionRollout": AttentionRollout,
    "RawAttention": RawAttention,
    "AttentionGradCam": AttentionGradCam,
    "ReflectedRelevance": ReflectedRelevance,
    SCORES: ReflectedRelevance,
}


def examine(plan, device="cpu"):
    """The outcome of each attributor on the model of a plan."""
    dtype = getattr(torch, plan.dtype)
    generator = torch.Generator().manual_seed(plan.seed + 1)
    images = torch.randn(plan.batch, 3, *plan.image, generator=generator)
    targets = torch.randint(CLASSES, (plan.batch,), generator=generator).tolist()
    images = images.to(device, dtype)
    model, _ = build(plan)
    forward_func = wrapped(model.to(device), plan.wrap)
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        answers = forward_func(images.clone().requires_grad_()).detach().double()
    usual = {str(warning.message) for warning in heard}
    spelled, right = expected(plan, images, targets)
    close = 1e-9 if dtype == torch.float64 else 1e-3
    assert torch.isfinite(answers).all(), f"the model's answer is not finite: {plan}"
    assert (spelled - answers).abs().max() <= close * answers.abs().max(), (
        f"attention spelled out is another model: {plan}"
    )
    return {
        name: examine_one(
            partial(explain, name, plan, forward_func, images, targets),
            right.get(name),
            usual,
        )
        for name in ATTRIBUTORS
        # One's scores are looked at where a fast forward may give them.
        if name != SCORES or plan.family != OWN
    }


def explain(name, plan, forward_func, images, targets):
    """(B, H, W), or the scores (B, J)."""
    attributor = ATTRIBUTORS[name](forward_func, token_layout=plan.layout())
    more = {}
    if name.startswith("Reflected"):
        more = {"baselines": plan.baseline, "perturbations_per_eval": plan.rows}
    if name == SCORES:
        return attributor.reflect(images, targets, **more).scores
    attributions = attributor.attribute(images, targets, **more)
    assert attributions.shape == images.shape
    return attributions[:, 0]


def examine_one(run, right, usual):
    """The outcome of one attributor: its map held against the right one."""
    with warnings.catch_warnings(record=True) as heard:
        warnings.simplefilter("always")
        try:
            found = run()
        except UnsupportedModelError as error:
            return Outcome("refused", words=str(error))
        except ValueError as error:
            return Outcome("refused" if "wanted" in str(error) else "unclear", words=str(error))
        except (RuntimeError, TypeError, AttributeError, IndexError, KeyError) as error:
            return Outcome("unclear", words=f"{type(error).__name__}: {error}")
    said = [
        str(warning.message)
        for warning in heard
        if issubclass(warning.category, UserWarning) and str(warning.message) not in usual
    ]
    difference = float("inf")
    if right is not None:
        saliency, tolerance = right
        difference = relative_difference(found.double(), saliency)
        if difference <= tolerance:
            if bool((found.flatten(1) == 0).all(dim=1).any()):
                # That a map is zero is rightly said.
                said = [words for words in said if "zero" not in words]
            return Outcome("equal", difference, "; ".join(said))
    return Outcome("warned" if said else "silent", difference, "; ".join(said))


def relative_difference(found, right):
    """The largest difference by the largest value, of the worst image."""
    if found.shape != right.shape or not torch.isfinite(found).all():
        return float("inf")
    largest = right.abs().flatten(1).amax(dim=1)
    apart = (found - right).abs().flatten(1).amax(dim=1)
    return float((apart / torch.where(largest > 0, largest, 1)).max())


# -- tests -------------------------------------------------------------------------------


@st.composite
def plans(draw, most_oddities):
    """Plans with up to so many oddities, of different kinds."""
    odd = draw_oddities(lambda options: draw(st.sampled_from(options)), most_oddities)
    return draw_plan(lambda options: draw(st.sampled_from(options)), odd)


def draw_oddities(choose, most):
    """Names of oddities that one model can have."""
    odd = []
    for _ in range(choose(range(most + 1))):
        groups = {ODDITIES[name][1] for name in odd}
        shared = set(FAMILIES).intersection(*(ODDITIES[name][0] for name in odd))
        fitting = [
            name
            for name, (families, group) in ODDITIES.items()
            if group not in groups and shared & set(families)
        ]
        odd.append(choose(fitting))
    return odd


def has_hidden_weights(plan):
    """Whether tokens mix where docs/checks.md says that it cannot be seen.

    After the last attention, by fixed weights, in a model that pools and says so; or the pooling
    itself has fixed weights that differ from token to token.
    """
    if "weighted mean of the patches" in plan.odd:
        return True
    says_so = plan.told == "layout and readout" or plan.stated
    pools = plan.readout not in ("class", "distilled", "attention")
    fixed = {"linear over tokens after the blocks", "mean added after the blocks"}
    return bool(fixed.intersection(plan.odd)) and says_so and pools


def may_be_doubted(plan):
    """Whether an ordinary model is rightly said to be unsure of: it pools, and its head mixes."""
    return plan.head != "linear" and plan.told != "layout and readout"


def count(outcomes):
    for name, outcome in outcomes.items():
        COUNTS.setdefault(name, Counter())[outcome.kind] += 1


def explained(plan):
    """The outcomes, counted; none may be wrong."""
    outcomes = examine(plan)
    count(outcomes)
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome.is_wrong}
    if has_hidden_weights(plan):
        wrong = {}
    assert not wrong, f"{plan}\n{wrong}"
    return outcomes


ANY = settings(
    derandomize=True,
    deadline=None,
    database=None,
    max_examples=40,
    suppress_health_check=list(HealthCheck),
)


@ANY
@given(plans(most_oddities=0))
def test_ordinary_models_are_all_explained(plan):
    outcomes = explained(plan)
    for outcome in outcomes.values():
        doubted = may_be_doubted(plan) and "the output is not a sum over tokens" in outcome.words
        assert outcome.is_plainly_equal or (outcome.kind == "equal" and doubted), (
            f"{plan}\n{outcomes}"
        )


@pytest.mark.slow
@ANY
@given(plans(most_oddities=2))
def test_odd_models_are_explained_right_or_not_at_all(plan):
    explained(plan)


@pytest.mark.slow
@pytest.mark.parametrize("oddity", ODDITIES)
def test_each_oddity(oddity):
    for plan in plans_of(oddity, 2):
        explained(plan)


def plans_of(oddity, number, seed=0):
    """So many plans with one oddity, always the same ones."""
    choose = random.Random(f"{oddity} {seed}").choice
    return [draw_plan(choose, [oddity]) for _ in range(number)]


def test_a_difference_is_seen():
    """The oracle is no copy of what it judges: a wrong map is found."""
    images = torch.randn(1, 3, 16, 16, generator=torch.Generator().manual_seed(0))
    _, right = expected(Plan(batch=1), images, [0])
    assert set(right) == set(ATTRIBUTORS)
    for saliency, tolerance in right.values():
        assert saliency.max() > saliency.min()
        turned = saliency.flip(-1)
        assert examine_one(lambda t=turned: t, (saliency, tolerance), set()).kind == "silent"
        assert examine_one(lambda s=saliency: s, (saliency, tolerance), set()).kind == "equal"


# -- many more, by a command -------------------------------------------------------------


def examine_numbered(number, device, most_oddities):
    """Plan number so-and-so of the command, with its outcomes."""
    choose = random.Random(f"model {number}").choice
    plan = draw_plan(choose, draw_oddities(choose, most_oddities))
    try:
        return plan, examine(plan, device)
    except Exception as error:
        return plan, {"the test itself": Outcome("unclear", words=repr(error))}


def prepare():
    """One thread a process, and float32 that is float32 on a GPU."""
    torch.set_num_threads(1)
    torch.backends.cudnn.allow_tf32 = False


def table(counts):
    """Outcomes by what they are counted for."""
    width = max(map(len, counts), default=0)
    lines = [" " * width + "".join(f"{kind:>9}" for kind in OUTCOMES)]
    lines += [
        f"{name:{width}}" + "".join(f"{counts[name][kind]:9}" for kind in OUTCOMES)
        for name in counts
    ]
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(
        description="Random models against the oracle. Fails where one is wrong, or where an "
        "ordinary one is not explained."
    )
    parser.add_argument("--models", type=int, default=1000, help="how many")
    parser.add_argument("--first", type=int, default=0, help="number of the first")
    parser.add_argument("--odd", type=int, default=2, help="most oddities of a model")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--jobs", type=int, default=1, help="number of processes")
    parser.add_argument("--seconds", type=float, default=math.inf, help="stop after this time")
    parser.add_argument("--show", type=int, default=20, help="most wrong models to print")
    options = parser.parse_args()
    began, done, wrong = time.perf_counter(), 0, 0
    by_oddity = {name: Counter() for name in ("none", *ODDITIES)}
    work = partial(examine_numbered, device=options.device, most_oddities=options.odd)
    numbers = range(options.first, options.first + options.models)
    # A process that was forked from one that has used a GPU cannot use it.
    context = get_context(None if options.device == "cpu" else "spawn")
    with ProcessPoolExecutor(options.jobs, mp_context=context, initializer=prepare) as pool:
        for number, (plan, outcomes) in zip(numbers, pool.map(work, numbers), strict=True):
            done += 1
            count(outcomes)
            for name in plan.odd or ["none"]:
                by_oddity[name].update(outcome.kind for outcome in outcomes.values())
            failed = {
                name: outcome
                for name, outcome in outcomes.items()
                if (outcome.is_wrong and not has_hidden_weights(plan))
                or not (plan.odd or outcome.is_plainly_equal or may_be_doubted(plan))
            }
            wrong += bool(failed)
            if failed and wrong <= options.show:
                print(f"model {number}: {plan}", *failed.items(), sep="\n    ", flush=True)
            if time.perf_counter() - began > options.seconds:
                pool.shutdown(cancel_futures=True)
                break
    met = {name: counts for name, counts in by_oddity.items() if counts}
    print(table(COUNTS), table(met), sep="\n\n")
    print(f"\n{wrong} of {done} models wrong, {time.perf_counter() - began:.0f} s")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
