"""Initial taps, checkpoint entries, optimizer groups and the start-up report, at every layout."""

import pytest
import torch

from tests.distributed.cases import MQA, REFERENCES, Case
from tests.distributed.properties import LAYOUTS, expected_initial_taps

pytestmark = pytest.mark.slow

_LAYOUTS = [(world, case) for world, layouts in LAYOUTS.items() for case in layouts]
each_layout = pytest.mark.parametrize(
    ("world_size", "case"), _LAYOUTS, ids=[f"{world}-{case.name}" for world, case in _LAYOUTS]
)


@each_layout
def test_initial_taps_are_the_same_at_every_layout(results, world_size, case):
    actual = results(world_size, f"property:initial-taps-{case.name}")
    expected = expected_initial_taps(case)
    assert actual.keys() == expected.keys()
    for name, want in expected.items():
        assert torch.equal(actual[name], want), name
    # Another seed must give other taps, or the equality above would mean nothing.
    other = expected_initial_taps(case, seed=4321)
    assert not any(torch.equal(actual[name], other[name]) for name in other)


@each_layout
def test_sharded_state_dict_covers_each_tap_once(results, world_size, case):
    entries = results(world_size, f"property:sharded-state-dict-{case.name}")
    model, layers = case.model, 4
    names = [
        n.split(".")[-1] for n in expected_initial_taps(case) if n.startswith("decoder.layers.0")
    ]
    covered = set()
    for entry in entries:
        assert entry["global_shape"] == (layers, model.num_query_groups), entry
        offset, length = entry["global_offset"], entry["local_shape"][-1]
        expected = model.num_query_groups // case.tp or model.num_query_groups
        assert length == expected, entry
        if all(index == 0 for index in _flat(entry["replica_id"])):
            cells = {(entry["key"], offset[0], offset[1] + i) for i in range(length)}
            assert not cells & covered, f"two main replicas of {entry}"
            covered |= cells
    assert covered == {
        (f"decoder.layers.self_attention.{name}", layer, group)
        for name in names
        for layer in range(layers)
        for group in range(model.num_query_groups)
    }


def _flat(replica_id) -> tuple[int, ...]:
    return replica_id if isinstance(replica_id, tuple) else (replica_id,)


@each_layout
def test_report_names_every_layer_and_tap(results, world_size, case):
    model = case.model
    taps = 4 * model.num_query_groups * model.kv_shift.parameters_per_group
    assert results(world_size, f"property:report-{case.name}") == (
        f"attention: KV shifting ({model.kv_shift.describe()}) in layers 1-4; {taps} taps"
    )


@pytest.mark.parametrize("world_size", [2])
def test_a_vanilla_model_is_reported_and_refused_if_kv_shift_was_asked_for(results, world_size):
    assert results(world_size, "property:report-vanilla") == (
        "attention: vanilla (SelfAttention) in layers 1-4; 0 taps"
    )
    assert "not every attention of the model has it" in results(
        2, "property:report-refuses-vanilla"
    )


@pytest.mark.parametrize(("world_size", "case"), [(1, REFERENCES["gqa2"]), (2, Case(MQA, tp=2))])
def test_taps_have_no_weight_decay(results, world_size, case):
    multipliers = results(world_size, case.name)["weight_decay"]
    taps = [value for name, value in multipliers.items() if ".alpha_" in name or ".beta_" in name]
    assert len(taps) == 16
    assert set(taps) == {0.0}
    assert multipliers["decoder.layers.0.self_attention.linear_qkv.weight"] == 1.0
