"""What one attention layer sends under context parallelism: counted, not assumed."""

import pytest

from tests.distributed.properties import TRAFFIC

_BATCH, _HEAD, _FP32 = 2, 8, 4
each_case = pytest.mark.parametrize(
    ("world_size", "case"),
    [
        pytest.param(world, case, id=f"{world}-{case.name}")
        for world in (2, 4)
        for case in TRAFFIC[world]
    ],
)


def messages(log: list) -> list:
    return [entry for entry in log if entry[0] not in ("local", "wait")]


@each_case
def test_the_shift_sends_a_few_tokens_to_each_neighbour_and_nothing_else(results, world_size, case):
    groups, back = case.model.num_query_groups, case.model.kv_shift.window - 1
    # Keys and values together, of the tokens that one boundary needs.
    size = 2 * back * _BATCH * groups * _HEAD * _FP32
    for rank, traffic in enumerate(results(world_size, f"property:traffic-{case.name}")):
        neighbours = [r for r in (rank + 1, rank - 1) if 0 <= r < case.cp]
        sends = sorted(("send", neighbour, size) for neighbour in neighbours)
        for tokens, passes in traffic.items():
            # The TE-free core attention gathers keys and values: its own traffic, not the shift's.
            local = tokens // case.cp * _BATCH * groups * _HEAD * _FP32
            gathers = [("_allgather_base_", None, local)] * 2
            scatters = [("_reduce_scatter_base_", None, local * case.cp)] * 2
            assert sorted(messages(passes["forward"]), key=str) == sorted(
                gathers + sends, key=str
            ), rank
            assert sorted(messages(passes["backward"]), key=str) == sorted(
                scatters + sends, key=str
            ), rank


@each_case
def test_messages_are_under_way_while_the_local_part_runs(results, world_size, case):
    for traffic in results(world_size, f"property:traffic-{case.name}"):
        for passes in traffic.values():
            for name, log in passes.items():
                kinds = [entry[0] for entry in log]
                sent = max(i for i, kind in enumerate(kinds) if kind == "send")
                waited = kinds.index("wait")
                assert "local" in kinds[sent:waited], (name, kinds)
