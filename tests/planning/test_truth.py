"""A plan equals a real run: gloo, up to four ranks, Megatron's own loop."""

import copy

import pytest

from tests.planning import compare
from tests.planning.cases import CASES

pytestmark = pytest.mark.slow

each_case = pytest.mark.parametrize("case", CASES)


@each_case
@pytest.mark.parametrize("what", ["static", "saved", "work", "traffic"])
def test_every_rank_is_as_planned(case, what, planned, real):
    for rank, (mine, theirs) in enumerate(zip(planned[case], real[case], strict=True)):
        assert getattr(compare, what)(mine, theirs) == [], f"rank {rank}"


@pytest.mark.parametrize(
    ("case", "recomputed"), [("one-rank", 0), ("dropout", 0), ("selective", 8)]
)
def test_saved_activations_are_what_the_profiler_finds(case, recomputed, planned, real):
    assert compare.allocated(planned[case][0], real[case][0], recomputed) == []


def test_the_cases_differ_in_what_they_are_for(real):
    """Without these messages and sizes, equal numbers would prove little."""
    kinds = {(row["group"], row["operation"]) for run in real.values() for rank in run
             for row in rank["steps"][2]["traffic"]}  # fmt: skip
    assert kinds >= {
        ("TP", "all-gather"), ("TP", "reduce-scatter"), ("TP", "all-reduce"), ("TP", "broadcast"),
        ("CP", "send"), ("CP", "all-gather"), ("PP", "send"), ("embedding", "all-reduce"),
        ("DP", "reduce-scatter"), ("DP", "all-gather"), ("DP", "all-reduce"),
    }  # fmt: skip
    padded = real["dp2-sharded"][0]["static"]
    assert padded["parameter_bytes"] > 2 * padded["parameters"]
    in_flight = real["interleaved"][0]["steps"][2]
    assert in_flight["saved_peak"] > 4 * max(in_flight["saved_per_forward"])


def _more_state(rank):
    rank["static"]["moment_bytes"] += 4


def _more_parameters(rank):
    rank["static"]["parameters"] += 1


def _less_saved(rank):
    step = rank["steps"][2]
    step["saved_per_forward"] = [int(size * 0.98) for size in step["saved_per_forward"]]


def _fewer_in_flight(rank):
    step = rank["steps"][2]
    step["saved_peak"] -= max(step["saved_per_forward"])


def _lower_peak(rank):
    rank["steps"][2]["live_peak"] *= 0.9


def _lost_message(rank):
    rank["steps"][2]["traffic"].pop()


def _longer_message(rank):
    next(r for r in rank["steps"][2]["traffic"] if r["operation"] == "send")["bytes"] += 2


def _half_the_attention(rank):
    rank["steps"][2]["work"]["backward"]["attention"] //= 2


@pytest.mark.parametrize(
    ("plant", "what"),
    [
        (_more_state, "static"),
        (_more_parameters, "static"),
        (_less_saved, "saved"),
        (_less_saved, "allocated"),
        (_fewer_in_flight, "saved"),
        (_lower_peak, "saved"),
        (_lost_message, "traffic"),
        (_longer_message, "traffic"),
        (_half_the_attention, "work"),
    ],
)
def test_each_comparator_fails_on_an_error(plant, what, planned, real):
    case = "one-rank" if what == "allocated" else "tp2-pp2"
    wrong = copy.deepcopy(planned[case][0])
    plant(wrong)
    assert getattr(compare, what)(wrong, real[case][0]) != []


@pytest.mark.parametrize("what", ["static", "saved", "work", "traffic"])
def test_the_baselines_plan_is_not_taken_for_the_models(what, planned, real):
    """A plan of the baseline model stands for a plan with a real error."""
    assert getattr(compare, what)(planned["baseline"][0], real["tp2-cp2"][0]) != []
