"""Which rank keeps the others waiting? From what each rank last said of itself."""

from collections.abc import Iterable
from typing import NamedTuple


class Report(NamedTuple):
    """What a rank says of itself.

    Args:
        beat: how often it has, so far.
        host: name of its machine.
        pid: of its process.
        iteration: the one under way, from 1; None before the first.
        phase: what it is doing, in words.
        still: seconds since its last sign of progress.
        is_communicating: whether its main thread is in a call of torch.distributed.
        calls: process group -> collective operations begun in it. Groups in which ranks also send
            to single others are left out, as their members count differently.
        stack: of its main thread.
    """

    beat: int
    host: str
    pid: int
    iteration: int | None
    phase: str
    still: float
    is_communicating: bool = False
    calls: dict[str, int] = {}  # noqa: RUF012 (never changed)
    stack: str = ""

    def at(self) -> str:
        where = "before the first iteration" if self.iteration is None else ""
        return f"{where or f'in iteration {self.iteration}'}, {self.phase}"


class Diagnosis(NamedTuple):
    """The ranks that hang, by rank number, each with the evidence; and what to say if none does."""

    hanging: dict[int, str]
    otherwise: str = (
        "no rank is behind the others: all wait for an operation that does not end (a GPU or the "
        "network; with --hang-timeout-seconds 0 NCCL's own time-out leaves its records of them)"
    )


def diagnose(reports: dict[int, Report], silent: Iterable[int]) -> Diagnosis:
    """Find the ranks that the others wait for.

    A rank that reports no more comes first; then those that others wait for and that wait for
    nobody themselves, by the operations that each group's members have begun; then those that are
    in no communication at all while others are.

    Args:
        reports: by rank.
        silent: ranks whose reports have stopped.
    """
    silent = sorted(silent)
    if silent:
        frozen = "it reports no more: its process is stopped or frozen, or its machine is lost"
        return Diagnosis(
            {
                rank: "it has ended"
                if rank in reports and reports[rank].phase == "ended"
                else frozen
                for rank in silent
            }
        )
    if len(reports) == 1:
        return Diagnosis(dict.fromkeys(reports, "it is the only one"))
    behind = _behind(reports)
    outside = {
        rank: "it is in no communication, and others are"
        for rank, report in reports.items()
        if not report.is_communicating
    }
    if len(outside) == len(reports):
        outside = {}
    # A rank may be behind because it waits for one that sends to it.
    both = {rank: reason for rank, reason in behind.items() if rank in outside}
    return Diagnosis(both or behind or outside)


def _behind(reports: dict[int, Report]) -> dict[int, str]:
    """Ranks that are behind in a group and ahead in none where others are behind."""
    found: dict[int, str] = {}
    waiting = set()
    groups: dict[str, dict[int, int]] = {}
    for rank, report in reports.items():
        for group, count in report.calls.items():
            groups.setdefault(group, {})[rank] = count
    for group, counts in groups.items():
        most = max(counts.values())
        for rank, count in counts.items():
            if count < most:
                found[rank] = (
                    f"it has begun {count} operations of process group {group}, others {most}"
                )
            elif min(counts.values()) < most:
                waiting.add(rank)
    return {rank: reason for rank, reason in found.items() if rank not in waiting}
