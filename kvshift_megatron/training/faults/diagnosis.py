"""Find the rank that keeps the others waiting, from the last report of each rank."""

from collections.abc import Iterable
from typing import NamedTuple


class Report(NamedTuple):
    """What a rank reports about itself.

    Args:
        beat: Number of reports so far.
        host: Name of its machine.
        pid: Of its process.
        iteration: The current one, counted from 1; None before the first.
        phase: What it is doing, in words.
        still: Seconds since its last sign of progress.
        is_communicating: Whether its main thread is in a call of torch.distributed.
        calls: Process group -> number of collective operations started in it. Groups with
            point-to-point messages are left out, because their members' numbers differ.
        stack: Of its main thread.
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
        """Return the iteration and the phase in words."""
        where = "before the first iteration" if self.iteration is None else ""
        return f"{where or f'in iteration {self.iteration}'}, {self.phase}"


class Diagnosis(NamedTuple):
    """The ranks that hang, each with the evidence, and what to say if none can be named."""

    hanging: dict[int, str]
    otherwise: str = (
        "no rank is behind the others: all wait for an operation that does not end, so suspect a "
        "GPU or the network (with --hang-timeout-seconds 0, NCCL's own time-out dumps its records)"
    )


def diagnose(reports: dict[int, Report], silent: Iterable[int]) -> Diagnosis:
    """Find the ranks that the others wait for.

    Ranks that have stopped reporting come first. Next are those that others wait for and that wait
    for nobody themselves, judged by the operations that the members of each group have started.
    Last are those that are not communicating while others are.

    Args:
        reports: By rank.
        silent: Ranks that have stopped reporting.
    """
    silent = sorted(silent)
    if silent:
        frozen = "it has stopped reporting: its process is stopped or frozen, or its node is lost"
        return Diagnosis(
            {
                rank: "it has ended"
                if rank in reports and reports[rank].phase == "ended"
                else frozen
                for rank in silent
            }
        )
    if len(reports) == 1:
        return Diagnosis(dict.fromkeys(reports, "it is the only rank"))
    behind = _behind(reports)
    outside = {
        rank: "it is not communicating, and others are"
        for rank, report in reports.items()
        if not report.is_communicating
    }
    if len(outside) == len(reports):
        outside = {}
    # A rank may be behind only because it waits for a point-to-point message.
    both = {rank: reason for rank, reason in behind.items() if rank in outside}
    return Diagnosis(both or behind or outside)


def _behind(reports: dict[int, Report]) -> dict[int, str]:
    """Return the ranks that are behind in a group and ahead of the others in none."""
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
                    f"it has started {count} operations of process group {group}, others {most}"
                )
            elif min(counts.values()) < most:
                waiting.add(rank)
    return {rank: reason for rank, reason in found.items() if rank not in waiting}
