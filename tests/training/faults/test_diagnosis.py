"""Which rank hangs, from the ranks' last reports: layouts too large to start here."""

import pytest

from kvshift_megatron.training.faults.diagnosis import Report, diagnose


def report(calls=None, *, communicating=True, phase="training", beat=9):
    return Report(beat, "host", 7, 3, phase, 300.0, communicating, calls or {}, "stack")


def named(reports, silent=()):
    return list(diagnose(reports, silent).hanging)


def test_a_rank_that_has_stopped_reporting_comes_first():
    reports = {0: report({"tp": 4}), 1: report({"tp": 3}, communicating=False), 2: report()}
    found = diagnose(reports, {2}).hanging
    assert list(found) == [2] and "has stopped reporting" in found[2]
    assert named({0: report()}, silent={1, 2}) == [1, 2]


def test_an_ended_rank_is_told_from_a_lost_one():
    reports = {0: report(), 1: report(phase="ended")}
    assert diagnose(reports, {1}).hanging == {1: "it has ended"}


def test_a_rank_that_is_behind_in_a_group_is_named():
    reports = {rank: report({"world": 5, "dp": 80}) for rank in range(4)}
    reports[2] = report({"world": 5, "dp": 79})
    found = diagnose(reports, ()).hanging
    assert list(found) == [2]
    assert found[2] == "it has started 79 operations of process group dp, others 80"


def test_ranks_that_wait_for_it_and_are_behind_elsewhere_are_not_blamed():
    """Rank 1 waits for 0 in TP, so rank 3 waits for 1 in DP, and rank 2 for 3 in TP."""
    reports = {
        0: report({"tp a": 99, "dp a": 5}, communicating=False),
        1: report({"tp a": 100, "dp b": 4}),
        2: report({"tp b": 101, "dp a": 5}),
        3: report({"tp b": 100, "dp b": 5}),
    }
    assert named(reports) == [0]


def test_a_rank_that_waits_for_a_message_is_behind_and_not_blamed():
    """Two pipelines: rank 0 hangs, rank 2 waits for its message, 1 and 3 wait for both in DP."""
    reports = {
        0: report({"dp a": 4}, communicating=False),
        1: report({"dp a": 5}),
        2: report({"dp b": 4}),
        3: report({"dp b": 5}),
    }
    assert named(reports) == [0]


def test_without_group_counts_the_rank_that_does_not_communicate_is_named():
    reports = {rank: report({"world": 2}, communicating=rank != 3) for rank in range(4)}
    found = diagnose(reports, ()).hanging
    assert list(found) == [3] and "not communicating" in found[3]


@pytest.mark.parametrize("communicating", [True, False])
def test_no_rank_is_named_if_all_look_alike(communicating):
    reports = {rank: report({"world": 2}, communicating=communicating) for rank in range(4)}
    diagnosis = diagnose(reports, ())
    assert diagnosis.hanging == {} and "no rank is behind" in diagnosis.otherwise


def test_a_single_rank_is_named():
    assert named({0: report()}) == [0]
