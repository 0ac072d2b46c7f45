"""Every parallel layout trains like a single process: losses, gradients, norms, parameters."""

import itertools
import re

import pytest
import torch

from tests.distributed.cases import BF16, BF16_LAYOUTS, LAYOUTS, PLANTED, REFERENCES, Case
from tests.support.compare import assert_close_rel, relative_error
from tests.support.tolerances import BF16_SPREADS, FP32_REL

pytestmark = pytest.mark.slow


def compare_runs(actual: dict, expected: dict) -> None:
    """Compare losses and gradient norms of every step, first gradients and final parameters."""
    for step, (got, want) in enumerate(zip(actual["losses"], expected["losses"], strict=True)):
        assert abs(got - want) <= FP32_REL * abs(want), f"loss of step {step}: {got} != {want}"
    norms = zip(actual["grad_norms"], expected["grad_norms"], strict=True)
    for step, (got, want) in enumerate(norms):
        assert abs(got - want) <= FP32_REL * want, f"gradient norm of step {step}: {got} != {want}"
    for kind in ("grads", "params"):
        if kind in actual:
            got, want = taps_joined(actual[kind]), taps_joined(expected[kind])
            assert got.keys() == want.keys()
            for name in want:
                assert_close_rel(f"{kind} {name}", got[name], want[name])


def taps_joined(tensors: dict) -> dict:
    """Join the alphas of a layer into one vector, and its betas.

    The gradient of one tap is a sum over all tokens. It can cancel to almost nothing, and then its
    own relative error means nothing.
    """
    joined = {}
    for name, tensor in tensors.items():
        joined.setdefault(re.sub(r"(alpha|beta)_(\d)$", r"\1", name), []).append(tensor)
    return {name: torch.cat(parts) for name, parts in joined.items()}


def reference(results, case: Case) -> dict:
    return results(1, REFERENCES[case.model.like or case.model.name].name)


def each(table: dict[int, list[Case]]):
    return [
        pytest.param(world, case, id=f"{world}-{case.name}")
        for world, cases in table.items()
        for case in cases
        if case != REFERENCES[case.model.name] or world > 1 or case.model.like
    ]


@pytest.mark.parametrize(("world_size", "case"), each(LAYOUTS))
def test_layout_equals_single_process(results, world_size, case):
    compare_runs(results(world_size, case.name), reference(results, case))


@pytest.mark.parametrize(("world_size", "case"), each(PLANTED))
def test_planted_error_is_noticed(results, world_size, case):
    with pytest.raises(AssertionError):
        compare_runs(results(world_size, case.name), reference(results, case))


def test_reference_run_learns_its_taps(results):
    """Guard the comparison: taps without gradients would agree everywhere."""
    run = results(1, REFERENCES["gqa2"].name)
    taps = [name for name in run["grads"] if ".alpha_" in name or ".beta_" in name]
    assert len(taps) == 4 * 4
    assert all(run["grads"][name].abs().min() > 0 for name in taps)


def test_recompute_changes_nothing_at_all(results):
    """No sum is in another order, so that no tolerance is needed."""
    expected = reference(results, REFERENCES["gqa2"])
    for case in LAYOUTS[1]:
        if case.transformer:
            actual = results(1, case.name)
            assert actual["losses"] == expected["losses"]
            for name, want in expected["grads"].items():
                assert actual["grads"][name].equal(want), name


def bf16_distances(run: dict, base: dict) -> dict[str, float]:
    """Return a run's distance from the base run: of the worst loss, and of all parameters."""
    losses = zip(run["losses"], base["losses"], strict=True)
    names = sorted(base["params"])
    flat = [torch.cat([r["params"][name].flatten() for name in names]) for r in (run, base)]
    return {
        "loss": max(abs(got - want) for got, want in losses),
        "parameters": relative_error(*flat),
    }


def bf16_base_and_spread(results) -> tuple[dict, dict[str, float]]:
    """Return the single process and the largest distance between any two of its reordered runs."""
    base = results(1, REFERENCES[BF16.name].name)
    runs = [base, *(results(1, case.name) for case in BF16_LAYOUTS[1])]
    pairs = [bf16_distances(a, b) for a, b in itertools.combinations(runs, 2)]
    return base, {quantity: max(pair[quantity] for pair in pairs) for quantity in pairs[0]}


@pytest.mark.parametrize("world_size", [2, 4])
def test_bf16_layouts_stay_within_the_spread_of_reordering(results, world_size):
    """The bound is measured: the distance of single-process runs with other summation orders."""
    base, spread = bf16_base_and_spread(results)
    for case in BF16_LAYOUTS[world_size]:
        for quantity, distance in bf16_distances(results(world_size, case.name), base).items():
            assert distance <= BF16_SPREADS * spread[quantity], (
                f"{case.name}: {quantity} is {distance:.3e} away from the single process, whose "
                f"own spread is {spread[quantity]:.3e}"
            )


@pytest.mark.parametrize("world_size", [2])
def test_bf16_bound_notices_a_planted_error(results, world_size):
    """Swapped taps change a bf16 run far more than the order of summation does."""
    base, spread = bf16_base_and_spread(results)
    wrong = results(world_size, Case(BF16, tp=2, planted_error="taps_swapped").name)
    assert bf16_distances(wrong, base)["loss"] > BF16_SPREADS * spread["loss"]
