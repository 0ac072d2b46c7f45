"""Messages of one attention layer under context parallelism, as counted."""

import pytest

from tests.distributed.properties import TRAFFIC

pytestmark = pytest.mark.slow

_BATCH, _HEAD, _FP32 = 2, 8, 4
each_case = pytest.mark.parametrize(
    ("world_size", "case"),
    [
        pytest.param(world, case, id=f"{world}-{case.name}")
        for world in (2, 4)
        for case in TRAFFIC[world]
    ],
)


@each_case
def test_the_shift_sends_a_few_tokens_to_each_neighbour_and_nothing_else(results, world_size, case):
    groups, back = case.model.num_query_groups, case.model.kv_shift.window - 1
    # Keys and values together, for the tokens before one chunk.
    size = 2 * back * _BATCH * groups * _HEAD * _FP32
    for rank, traffic in enumerate(results(world_size, f"property:traffic-{case.name}")):
        neighbours = [r for r in (rank + 1, rank - 1) if 0 <= r < case.cp]
        sends = sorted(("send", neighbour, size) for neighbour in neighbours)
        for tokens, passes in traffic["messages"].items():
            # The TE-free core attention itself gathers keys and values.
            local = tokens // case.cp * _BATCH * groups * _HEAD * _FP32
            gathers = [("_allgather_base_", None, local)] * 2
            scatters = [("_reduce_scatter_base_", None, local * case.cp)] * 2
            assert sorted(passes["forward"], key=str) == sorted(gathers + sends, key=str), rank
            assert sorted(passes["backward"], key=str) == sorted(scatters + sends, key=str), rank


def assert_overlapped(events: list) -> None:
    """Require that sending starts before the local part, and waiting after it."""
    spans = {name: (start, end) for name, start, end in events if name.startswith("kv_shift: ")}
    local = spans.pop("kv_shift: local part")
    (wait,) = spans.values()
    sent = [(start, end) for name, start, end in events if name == "gloo:send"]
    assert sent, "nothing was sent"
    for start, end in sent:
        assert start < local[0] and local[1] <= wait[0] and local[1] < end, (sent, local, wait)


@each_case
def test_a_trace_shows_messages_in_flight_while_the_local_part_runs(results, world_size, case):
    for traffic in results(world_size, f"property:traffic-{case.name}"):
        for events in traffic["trace"].values():
            assert_overlapped(events)


def test_waiting_for_the_exchange_at_once_is_caught():
    events = [("gloo:send", 0, 5), ("kv_shift: wait", 2, 6), ("kv_shift: local part", 6, 20)]
    with pytest.raises(AssertionError):
        assert_overlapped(events)
