"""Who hangs, from what the ranks said last: layouts that no machine here can start."""

import pytest

from kvshift_megatron.training.faults.diagnosis import Report, diagnose


def report(calls=None, *, communicating=True, phase="training", beat=9):
    return Report(beat, "host", 7, 3, phase, 300.0, communicating, calls or {}, "stack")


def named(reports, silent=()):
    return list(diagnose(reports, silent).hanging)


def test_a_rank_that_reports_no_more_comes_first():
    reports = {0: report({"tp": 4}), 1: report({"tp": 3}, communicating=False), 2: report()}
    found = diagnose(reports, {2}).hanging
    assert list(found) == [2] and "reports no more" in found[2]
    assert named({0: report()}, silent={1, 2}) == [1, 2]


def test_one_that_has_ended_is_told_from_one_that_is_lost():
    reports = {0: report(), 1: report(phase="ended")}
    assert diagnose(reports, {1}).hanging == {1: "it has ended"}


def test_the_one_that_is_behind_in_a_group():
    reports = {rank: report({"world": 5, "dp": 80}) for rank in range(4)}
    reports[2] = report({"world": 5, "dp": 79})
    found = diagnose(reports, ()).hanging
    assert list(found) == [2]
    assert found[2] == "it has begun 79 operations of process group dp, others 80"


def test_those_that_wait_for_it_are_behind_elsewhere_and_not_to_blame():
    """Rank 1 waits for rank 0 in TP, and so keeps rank 3 waiting in DP, and that rank 2 in TP."""
    reports = {
        0: report({"tp a": 99, "dp a": 5}, communicating=False),
        1: report({"tp a": 100, "dp b": 4}),
        2: report({"tp b": 101, "dp a": 5}),
        3: report({"tp b": 100, "dp b": 5}),
    }
    assert named(reports) == [0]


def test_one_that_waits_for_a_message_is_behind_and_not_to_blame():
    """Two pipelines: rank 0 hangs, rank 2 waits for what it sends, 1 and 3 in DP for both."""
    reports = {
        0: report({"dp a": 4}, communicating=False),
        1: report({"dp a": 5}),
        2: report({"dp b": 4}),
        3: report({"dp b": 5}),
    }
    assert named(reports) == [0]


def test_a_pipeline_without_groups_goes_by_who_communicates():
    reports = {rank: report({"world": 2}, communicating=rank != 3) for rank in range(4)}
    found = diagnose(reports, ()).hanging
    assert list(found) == [3] and "in no communication" in found[3]


@pytest.mark.parametrize("communicating", [True, False])
def test_nobody_is_named_where_all_look_alike(communicating):
    reports = {rank: report({"world": 2}, communicating=communicating) for rank in range(4)}
    diagnosis = diagnose(reports, ())
    assert diagnosis.hanging == {} and "no rank is behind" in diagnosis.otherwise


def test_one_rank_alone_is_the_one():
    assert named({0: report()}) == [0]
