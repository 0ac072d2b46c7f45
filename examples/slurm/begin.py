"""Begin a job: claim its run directory and open an attempt in it.

    python -m examples.slurm.begin <arguments of pretrain.sbatch>

Prints variables for the batch script. It needs only Python's standard library, as it runs outside
the container, where Slurm's commands are. Exit status: 0, or 2 if the job must not go on.
"""

import shlex
import shutil
import sys
from argparse import Namespace
from pathlib import Path

from examples.slurm import claim, settings, status
from examples.slurm.settings import Settings
from examples.slurm.status import Attempt, Status, attempt_directory
from kvshift_megatron.training.files_read import files_read
from kvshift_megatron.utils.flag_lines import to_line
from kvshift_megatron.utils.output_paths import check_outputs


def begin(job: Settings) -> Path:
    """Open an attempt.

    Returns:
        Its directory. If an earlier attempt of this job resolved the configuration, the directory
        already holds it: a job keeps its configuration.

    Raises:
        ValueError: Another job has the directory, or this job has had all its attempts.
    """
    try:
        job.run.mkdir(parents=True, exist_ok=True)
        claim.take(job.run, job.job, job.cluster)
    except OSError as error:
        raise ValueError(
            f"{job.run} cannot be used as a run directory ({error.strerror}: {error.filename}): "
            "give a directory that this user may write to"
        ) from error
    try:
        return _open_attempt(job)
    except ValueError:
        claim.give_back(job.run, job.job, job.cluster)
        raise


def _open_attempt(job: Settings) -> Path:
    known = status.read(job.run)
    newest = status.newest_checkpoint(job.run)
    for attempt in known.attempts:
        if attempt.state == "running":
            attempt.state = "lost"
            attempt.message = "it ended without a message, for example because its node went down"
    status.write(job.run, known)
    earlier = known.of_job(job.job)
    _check(job, earlier, newest)
    number = 1 + max((attempt.number for attempt in known.attempts), default=0)
    directory = attempt_directory(job.run, number)
    directory.mkdir(parents=True, exist_ok=True)
    if earlier:
        resolved = attempt_directory(job.run, earlier[0].number) / status.FLAGS
        if resolved.exists():
            shutil.copy(resolved, directory / status.FLAGS)
    status.write(job.run, Status([*known.attempts, Attempt(job.job, number, newest)]))
    return directory


def _check(job: Settings, earlier: list[Attempt], newest: int) -> None:
    if len(earlier) >= job.max_attempts:
        raise ValueError(
            f"job {job.job} has had its {len(earlier)} attempts (--max-attempts) and is at step "
            f"{newest}: find out why it was interrupted so often, then submit it again"
        )
    # A lower step is progress too: a damaged checkpoint was skipped, and a new one saved since.
    if earlier and newest == earlier[-1].start:
        raise ValueError(
            f"no progress: attempt {earlier[-1].number} ({earlier[-1].state}) started from step "
            f"{earlier[-1].start}, and the newest checkpoint is still of step {newest}: another "
            "attempt would repeat it; look at its logs, or save more often (--save-interval)"
        )


def check_places(job: Settings, flags: list[list[str]]) -> None:
    """Refuse a run directory in which files would be written that the job reads.

    Raises:
        ValueError: A file of the run is, or lies inside, something that the job reads.
    """
    # The words after "python -m kvshift_megatron.recipes": MODEL LAYOUT, then options.
    given = [text.split("=", 1) for text in job.show if "=" in text] + flags
    values = {name.removeprefix("--").replace("-", "_"): words for name, *words in given}
    read = [Path(name) for name in job.show[:2] if Path(name).is_file()]
    written = [job.run / name for name in (status.FILE, "metrics.jsonl", status.CHECKPOINTS)]
    check_outputs(written, [*read, *files_read(Namespace(**values))], look_inside=False)


def own_flags(job: Settings) -> list[list[str]]:
    """Return what the script adds to the configuration: flags, each with its values."""
    checkpoints = str(job.run / status.CHECKPOINTS)
    flags = [
        ["--save", checkpoints],
        ["--load", checkpoints],  # without a checkpoint Megatron starts from the beginning
        ["--tensorboard-dir", str(job.run / "tensorboard")],
        ["--metrics-file", str(job.run / "metrics.jsonl")],
        # Save, and end with exit status 0, on a signal that processes ignore by default: it goes to
        # every process of the job, and Python drops its handlers some time before it ends.
        ["--exit-signal", "SIGURG"],
        ["--exit-signal-handler"],
    ]
    for word in job.megatron:
        if word.startswith("--"):
            flags.append([word])
        elif flags[-1][0] == "--exit-signal-handler":
            raise ValueError(
                f"{word}: expected a flag of kvshift_megatron.pretrain (--NAME) directly after --"
            )
        else:
            flags[-1].append(word)
    return flags


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    try:
        job = settings.read(argv)
        flags = own_flags(job)
        check_places(job, flags)
        directory = begin(job)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    (directory / "own_flags.txt").write_text("".join(f"{to_line(words)}\n" for words in flags))
    values = {"run": job.run, "attempt": directory, "job": job.job,
              "ranks_per_node": job.ranks_per_node}  # fmt: skip
    for name, value in values.items():
        print(f"{name}={shlex.quote(str(value))}")
    print(f"show=({shlex.join(job.show)})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
