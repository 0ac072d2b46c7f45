"""End a job: judge its attempt, and say whether the job starts again.

    python -m examples.slurm.end ATTEMPT CODE WARNED TERMINATED <arguments of pretrain.sbatch>

ATTEMPT is the attempt's directory and CODE srun's exit status. WARNED is 1 if the batch script got
the warning signal, and TERMINATED if it got SIGTERM. Prints `done`, `requeue` or `fail`; the reason
goes to standard error. It needs only Python's standard library.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from examples.slurm import claim, failure, settings, status
from kvshift_megatron.utils.flag_lines import to_words


@dataclass(frozen=True)
class Facts:
    """What an attempt is judged by.

    Attributes:
        code: srun's exit status; 0 only if every rank's was.
        warned: Time was running out, and the ranks were told to save and end.
        terminated: Slurm is ending the job, and decides whether it starts again.
        start, end: Iteration of the newest checkpoint before and after.
        total: Iterations that the run is to reach.
        stops_early: The newest checkpoint is where --exit-interval asks to end.
        attempts: Number of attempts of this job, this one included.
        max_attempts, retry_failures: See Settings.
    """

    code: int
    warned: bool
    terminated: bool
    start: int
    end: int
    total: int
    stops_early: bool
    attempts: int
    max_attempts: int
    retry_failures: bool


def judge(facts: Facts) -> tuple[str, str, str]:
    """Decide what happens to the job.

    Returns:
        The action (`done`, `requeue` or `fail`), the attempt's state, and the reason in a sentence.
    """
    at = f"step {facts.end} of {facts.total}"
    if facts.code == 0 and facts.end >= facts.total:
        return "done", "completed", f"reached {at}"
    if facts.terminated:
        return "fail", "terminated", f"Slurm ended the job; the newest checkpoint is {at}"
    if facts.code == 0 and facts.stops_early:
        return "done", "completed", f"ended at {at}, as --exit-interval asks"
    # Megatron ends early with status 0 if it was told to: by a signal, which Slurm may have sent to
    # the ranks directly, or by --exit-duration-in-mins.
    if facts.code and facts.warned:
        why = f"failed after the warning signal (exit status {facts.code}), at {at}"
    elif facts.code:
        why = f"failed with exit status {facts.code}; the newest checkpoint is {at}"
        if not facts.retry_failures:
            return "fail", "failed", why
    else:
        why = f"was interrupted and saved {at}"
    # A lower step is progress too: a damaged checkpoint was skipped, and a new one saved since.
    if facts.end == facts.start:
        return "fail", "failed", f"{why}: no progress since step {facts.start}, so the job ends"
    if facts.attempts >= facts.max_attempts:
        limit = f"attempt {facts.attempts} was the last one (--max-attempts {facts.max_attempts})"
        return "fail", "failed", f"{why}, and {limit}"
    return "requeue", "requeued", why


def _split(words: list[str]) -> list[str]:
    """Return a flag's words with `--flag=value` as two."""
    flag, equals, value = (words or [""])[0].partition("=")
    return [flag, value, *words[1:]] if equals else words


def _flag(lines: list[list[str]], name: str) -> str | None:
    """Return a flag's last value, as argparse takes it; empty for a switch, None if missing."""
    values = [words[1] if len(words) > 1 else "" for words in lines if words[:1] == [name]]
    return values[-1] if values else None


def end(attempt: Path, code: int, warned: bool, terminated: bool, argv: list[str]) -> str:
    """Judge the attempt, store the verdict and print the reason.

    Returns:
        The action.

    Raises:
        ValueError: The run directory is not as `begin` left it.
    """
    job = settings.read(argv)
    known = status.read(job.run)
    current = known.attempts[-1]
    path = attempt / status.FLAGS
    if path.exists():
        flags = [_split(to_words(line)) for line in path.read_text().splitlines()]
        newest = status.newest_checkpoint(job.run)
        interval = int(_flag(flags, "--exit-interval") or 0)
        facts = Facts(
            code=code,
            warned=warned,
            terminated=terminated,
            start=current.start,
            end=newest,
            total=int(_flag(flags, "--train-iters")),
            stops_early=interval > 0 and newest > current.start and newest % interval == 0,
            attempts=len(known.of_job(job.job)),
            max_attempts=job.max_attempts,
            retry_failures=job.retry_failures,
        )
        action, current.state, current.message = judge(facts)
        current.end = facts.end
    else:
        action, current.state = "fail", "failed"
        current.message = "the configuration was refused: the reason is above"
    status.write(job.run, known)
    # A requeued job keeps its claim, and so does one that Slurm ends: Slurm may requeue it.
    if current.state in ("completed", "failed"):
        claim.give_back(job.run, job.job, job.cluster)
    print(f"attempt {current.number} {current.message}", file=sys.stderr)
    if code:
        for line in failure.summary(attempt, job.ranks_per_node):
            print(line, file=sys.stderr)
    return action


def main(argv: list[str]) -> int:
    """Run the command line and return the exit status."""
    attempt, code, warned, terminated, *rest = argv
    try:
        print(end(Path(attempt), int(code), warned == "1", terminated == "1", rest))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
