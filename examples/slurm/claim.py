"""Claim a run directory, which one job at a time may use.

The file `owner` in it holds the job's id and cluster. A requeued job is the same job. A file that
an ended job left is taken over, once Slurm says that the job is over.
"""

import fcntl
import os
import subprocess
from pathlib import Path

FILE = "owner"
_OVER = ("", "BOOT_FAIL", "CANCELLED", "COMPLETED", "DEADLINE", "FAILED", "NODE_FAIL",
         "OUT_OF_MEMORY", "PREEMPTED", "REVOKED", "TIMEOUT")  # fmt: skip


def take(directory: Path, job: str, cluster: str) -> None:
    """Claim the directory for the job.

    Args:
        directory: An existing run directory.
        job: The job as Slurm's commands name it; `12_3` for a task of an array.
        cluster: Slurm's name of the cluster; empty if it has none.

    Raises:
        ValueError: Another job holds the directory, and it is not over or its state is unknown.
    """
    owner = directory / FILE
    mine = f"{job} {cluster}\n"
    candidate = directory / f"{FILE}.{job}"
    candidate.write_text(mine)
    lock = (directory / f".{FILE}.lock").open("w")
    try:
        # Of two jobs that find the same stale claim, one waits here for the other.
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Bounded: every round but the last removes the claim of a job that is over.
        for _ in range(10):
            try:
                os.link(candidate, owner)  # atomic: the file appears complete, or one exists
                return
            except FileExistsError:
                pass
            try:
                found = owner.read_text()
            except FileNotFoundError:
                continue  # given back at this moment
            if found == mine:
                return
            _refuse_unless_over(directory, found, cluster)
            _take_away(owner, found, directory / f"{FILE}.stale.{job}")
    finally:
        lock.close()
        candidate.unlink()
    raise ValueError(f"{owner}: other jobs keep taking the directory: use a directory of your own")


def give_back(directory: Path, job: str, cluster: str) -> None:
    """End the job's claim, if it has one on the directory."""
    owner = directory / FILE
    if owner.exists() and owner.read_text() == f"{job} {cluster}\n":
        owner.unlink()


def _take_away(owner: Path, stale: str, aside: Path) -> None:
    """Remove the claim of a job that is over, but not one that has replaced it meanwhile."""
    try:
        owner.rename(aside)  # of two jobs that try, one gets the file
    except FileNotFoundError:
        return
    if aside.read_text() != stale:
        os.link(aside, owner)
    aside.unlink()


def _refuse_unless_over(directory: Path, found: str, cluster: str) -> None:
    job, _, owner_cluster = found.strip().partition(" ")
    if owner_cluster != cluster:
        raise ValueError(
            f"{directory} is in use by job {job} of cluster {owner_cluster or '(no name)'}, whose "
            f"state is unknown here: remove {directory / FILE} if that job is over"
        )
    if state := state_of(job):
        raise ValueError(
            f"{directory} is in use by job {job} ({state.lower()}): wait for it, cancel it, or use "
            "another directory"
        )


def state_of(job: str) -> str | None:
    """Return the state of a job that Slurm still has in its queue; None if it is over.

    Raises:
        ValueError: Slurm does not answer.
    """
    # All states: by default squeue hides suspended jobs, which may go on.
    command = ["squeue", "--noheader", "--states=all", f"--jobs={job}", "--format=%T"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    # For a job that it no longer remembers, Slurm says that the id is invalid.
    if result.returncode and "Invalid job id" not in result.stderr:
        raise ValueError(f"squeue cannot say whether job {job} is over: {result.stderr.strip()}")
    state = result.stdout.strip()
    return None if state in _OVER else state
