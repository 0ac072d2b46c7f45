"""Read and write the status of a run, `status.json` in its directory.

    python -m examples.slurm.status RUN_DIRECTORY

prints it. Only the job that holds the directory writes it. The command needs only Python's standard
library.
"""

import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from kvshift_megatron.checks.checkpoint_paths import read_tracker
from kvshift_megatron.utils.atomic_files import replace

FILE = "status.json"
CHECKPOINTS = "checkpoints"
FLAGS = "flags.txt"


@dataclass
class Attempt:
    """One start of the run.

    Attributes:
        job: The job as Slurm's commands name it.
        number: Counts the attempts of all jobs in this directory, from 1.
        start: Iteration of the newest checkpoint when it started; 0 if there was none.
        end: The same when it ended; None while it runs, and if it was cut off.
        state: running, completed, failed, requeued, terminated (by Slurm: cancelled, out of time
            or requeued by it), or lost (it ended without a message).
        message: The reason, in a sentence.
    """

    job: str
    number: int
    start: int
    end: int | None = None
    state: str = "running"
    message: str = ""


@dataclass
class Status:
    """All attempts, oldest first."""

    attempts: list[Attempt] = field(default_factory=list)

    def of_job(self, job: str) -> list[Attempt]:
        """Return the attempts of one job: its first start and its requeues."""
        return [attempt for attempt in self.attempts if attempt.job == job]


def read(directory: Path) -> Status:
    """Return the status of a run directory, which is empty for a new one.

    Raises:
        ValueError: The file is not one that `write` wrote.
    """
    try:
        stored = json.loads((directory / FILE).read_text())
        return Status([Attempt(**attempt) for attempt in stored["attempts"]])
    except FileNotFoundError:
        return Status()
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(
            f"{directory / FILE} does not hold the status of a run ({error}): use another "
            "directory for the run"
        ) from error


def write(directory: Path, status: Status) -> None:
    """Store the status, completely or not at all."""
    text = json.dumps(asdict(status), indent=1) + "\n"
    replace(directory / FILE, lambda path: path.write_text(text))


def attempt_directory(directory: Path, number: int) -> Path:
    """Return the folder of an attempt, below the run directory."""
    return directory / "attempts" / f"{number:03d}"


def newest_checkpoint(directory: Path) -> int:
    """Return the iteration that Megatron's tracker file in a run directory names; 0 if none.

    Also 0 if its content is no number, or it cannot be read: the run itself says at its start what
    it does about that.
    """
    try:
        return int(read_tracker(directory / CHECKPOINTS) or 0)
    except ValueError:
        return 0


def main(argv: list[str]) -> int:
    """Print the attempts and return the exit status."""
    if len(argv) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    directory = Path(argv[0])
    try:
        status, newest = read(directory), newest_checkpoint(directory)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for attempt in status.attempts:
        end = "" if attempt.end is None else f" to {attempt.end}"
        words = f"attempt {attempt.number}, job {attempt.job}: from step {attempt.start}{end}"
        print(f"{words}, {attempt.state}{attempt.message and ': ' + attempt.message}")
    print(f"newest checkpoint: step {newest}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
