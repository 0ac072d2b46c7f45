"""A plan of a hybrid model is the plan of the GPT model that has the same layers."""

import copy
import json

import pytest

from tests.planning import compare
from tests.planning.cases import CASES, ONLY_PLANNED
from tests.planning.planned_cases import RECIPES

pytestmark = pytest.mark.slow

HIDDEN = 64
HIDDEN_STATE = 2 * 32 * HIDDEN * 2  # micro-batch x tokens x hidden size, bf16
_EQUAL = {*CASES, *ONLY_PLANNED, *(model for model, _ in RECIPES)} - {"mtp"}
_SEQUENCE_PARALLEL = ("tp2-pp2", "tp2-cp2", "13b", "19b")


@pytest.fixture(scope="module")
def forms(plan_folder) -> dict[str, list[list[dict]]]:
    """Return case -> [GPT, hybrid] of its first and last rank."""
    return json.loads((plan_folder / "forms.json").read_text())


@pytest.mark.parametrize("name", sorted(_EQUAL))
def test_both_forms_have_the_same_plan(name, forms):
    for gpt, hybrid in forms[name]:
        found = compare.forms(gpt, hybrid, name in _SEQUENCE_PARALLEL)
        assert found == []
        assert hybrid["args"]["num_layers"] == 2 * gpt["args"]["num_layers"]


def test_multi_token_prediction_differs_as_megatron_says(forms):
    """Its formula leaves out each depth's projection, and GPTModel holds one tensor longer."""
    for rank, (gpt, hybrid) in enumerate(forms["mtp"]):
        projection = 3 * 2 * (2 * HIDDEN * HIDDEN + 3 * HIDDEN) * gpt["args"]["global_batch_size"]
        hybrid["args"]["megatron_flops_per_step"] += projection * gpt["args"]["seq_length"]
        for step in hybrid["steps"] if rank == 1 else ():
            step["live_peak"] += HIDDEN_STATE
        assert compare.forms(gpt, hybrid) == []


def test_another_plan_is_not_taken_for_the_same(forms, planned):
    gpt, hybrid = forms["interleaved"][0]
    assert compare.forms(gpt, forms["interleaved"][-1][1]) != []  # the other pipeline stage
    assert compare.forms(planned["baseline"][0], forms["tp2-cp2"][0][1]) != []
    for path in (("static", "moment_bytes"), ("steps", 2, "saved_peak"),
                 ("steps", 2, "work", "forward", "matmul"), ("steps", 2, "traffic", 0, "bytes"),
                 ("args", "megatron_flops_per_step")):  # fmt: skip
        wrong = copy.deepcopy(hybrid)
        part = wrong
        for key in path[:-1]:
            part = part[key]
        part[path[-1]] += 1
        assert len(compare.forms(gpt, wrong)) == 1, path


def test_recomputing_each_layer_keeps_one_more_input_per_mlp(forms):
    """The one setting that counts layers: a hybrid model has twice as many."""
    ((gpt, hybrid),) = forms["each layer"]
    pairs = zip(gpt["steps"][2]["saved_per_forward"], hybrid["steps"][2]["saved_per_forward"])
    found = {theirs - ours for ours, theirs in pairs}
    # Each chunk of a stage is one attention and one MLP.
    assert found == {HIDDEN_STATE}


def test_the_command_plans_both_forms_alike(plan_folder):
    gpt, hybrid = (json.loads((plan_folder / f"{name}.json").read_text())
                   for name in ("plan", "hybrid"))  # fmt: skip
    assert hybrid["flags"]["hybrid-layer-pattern"] == "*-*-*-*-|*-*-*-*-"
    assert "num-layers" not in hybrid["flags"]
    for name in ("layout", "stages", "twin_stages", "other_ranks", "added_by_kv_shift"):
        assert hybrid[name] == gpt[name], name
    for name in ("estimate", "twin_estimate"):
        assert hybrid[name] == pytest.approx(gpt[name], rel=1e-12), name
    assert hybrid["figures"]["megatron_state_bytes"] is None


def test_the_search_finds_the_same_layouts(plan_folder):
    def lines(name: str) -> list[str]:
        text = (plan_folder / name).read_text()
        return [line for line in text.splitlines() if "theoretical" not in line
                and not line.startswith("Planned in")]  # fmt: skip

    gpt = lines("search.txt")
    assert lines("hybrid_search.txt") == gpt
    assert sum("PP 2" in line for line in gpt) > 1, "no proposal has pipeline stages"
