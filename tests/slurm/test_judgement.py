"""What happens to a job, given the facts of its attempt."""

from dataclasses import replace

import pytest

from examples.slurm.end import Facts, judge

_RUNNING = Facts(
    code=0, warned=False, terminated=False, start=10, end=20, total=100, stops_early=False,
    attempts=1, max_attempts=3, retry_failures=False,
)  # fmt: skip

# What happened, action, state, part of the reason.
CASES = {
    "all steps": ({"end": 100}, "done", "completed", "reached step 100 of 100"),
    "all steps, after a warning": ({"end": 100, "warned": True}, "done", "completed", "reached"),
    "all steps, then a failure": ({"end": 100, "code": 1}, "fail", "failed", "exit status 1"),
    "saved after a warning": ({"warned": True}, "requeue", "requeued", "saved step 20"),
    "saved without one, as by SIGTERM or --exit-duration-in-mins": (
        {}, "requeue", "requeued", "was interrupted and saved step 20",
    ),
    "ended with 0 and saved nothing": ({"end": 10}, "fail", "failed", "no progress since step 10"),
    "warned, and nothing saved": ({"warned": True, "end": 10}, "fail", "failed", "no progress"),
    "warned, and the save failed, but an earlier one is new": (
        {"warned": True, "code": 1}, "requeue", "requeued", "failed after the warning signal",
    ),
    "an older checkpoint was loaded and a new one saved": (
        {"warned": True, "end": 5}, "requeue", "requeued", "saved step 5",
    ),
    "the last attempt": (
        {"warned": True, "attempts": 3}, "fail", "failed", "attempt 3 was the last one",
    ),
    "failed": ({"code": 137}, "fail", "failed", "failed with exit status 137"),
    "failed, to be retried": (
        {"code": 1, "retry_failures": True}, "requeue", "requeued", "failed with exit status 1",
    ),
    "failed twice at the same step": (
        {"code": 1, "retry_failures": True, "end": 10}, "fail", "failed", "no progress",
    ),
    "failed, the last attempt": (
        {"code": 1, "retry_failures": True, "attempts": 3}, "fail", "failed", "--max-attempts 3",
    ),
    "cancelled": ({"code": 143, "terminated": True}, "fail", "terminated", "Slurm ended the job"),
    "cancelled, and saved": ({"terminated": True}, "fail", "terminated", "Slurm ended the job"),
    "--exit-interval": ({"stops_early": True}, "done", "completed", "as --exit-interval asks"),
    "--exit-interval, interrupted before it": ({}, "requeue", "requeued", "was interrupted"),
    "--exit-interval, failed": ({"stops_early": True, "code": 1}, "fail", "failed", "status 1"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_judge(case):
    happened, *expected, reason = CASES[case]
    action, state, why = judge(replace(_RUNNING, **happened))
    assert [action, state] == expected
    assert reason in why


def test_only_success_is_done():
    """Whatever else is true, a job that failed or has too few iterations is not `done`."""
    booleans = (False, True)
    for code in (0, 1, 137):
        for end in (10, 20, 100):
            for warned in booleans:
                for terminated in booleans:
                    for retry in booleans:
                        facts = replace(
                            _RUNNING, code=code, end=end, warned=warned, terminated=terminated,
                            retry_failures=retry,
                        )  # fmt: skip
                        assert (judge(facts)[0] == "done") == (code == 0 and end == 100)
