"""Read the command line of pretrain.sbatch, and what Slurm says about the job."""

import argparse
import os
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

# Flags that the script sets itself: places below the run directory, and its way to end a run.
_OWN_FLAGS = ("--save", "--load", "--tensorboard-dir", "--metrics-file", "--exit-signal",
              "--exit-signal-handler")  # fmt: skip
_USAGE = (
    "sbatch [Slurm's options] examples/slurm/pretrain.sbatch RUN_DIRECTORY MODEL LAYOUT "
    "[options] [-- flags of kvshift_megatron.pretrain]"
)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (usage: {_USAGE})")


@dataclass(frozen=True)
class Settings:
    """One job's settings.

    Attributes:
        run: The run directory, absolute. A task of an array has its own below the given one.
        job: The job as Slurm's commands name it.
        cluster: Slurm's name of the cluster; may be empty.
        nodes: Number of nodes of the job.
        ranks_per_node: Number of ranks per node, by default one per GPU.
        show: Arguments of `python -m kvshift_megatron.recipes`.
        megatron: Flags of kvshift_megatron.pretrain that override the configuration's.
        max_attempts: The most starts of this job, the first one included.
        retry_failures: Whether a failed attempt that made progress is started again too.
    """

    run: Path
    job: str
    cluster: str
    nodes: int
    ranks_per_node: int
    show: list[str]
    megatron: list[str]
    max_attempts: int
    retry_failures: bool


def read(argv: list[str], environment: dict[str, str] | None = None) -> Settings:
    """Return the settings of the job that this process belongs to.

    Args:
        argv: The batch script's arguments.
        environment: The variables that Slurm sets; by default, those of this process.

    Raises:
        ValueError: A mistake on the command line, in one sentence.
    """
    environment = dict(os.environ) if environment is None else environment
    own, megatron = _split(argv)
    options = _parser().parse_args(own)
    run, job = Path(options.run_directory).resolve(), environment["SLURM_JOB_ID"]
    given = {word.partition("=")[0] for word in megatron}
    given |= {f"--{text.partition('=')[0]}" for text in options.set}
    if broken := [word for word in (*megatron, str(run)) if len(word.splitlines()) != 1]:
        raise ValueError(f"{broken[0]!r}: a path or a flag's value has exactly one line")
    if environment.get("KVSHIFT_CONTAINER_IMAGE") and set(",:") & set(str(run)):
        raise ValueError(f"{run}: a container's mounts are separated by commas and colons: use "
                         "another run directory")  # fmt: skip
    if taken := sorted(given & set(_OWN_FLAGS)):
        raise ValueError(f"{taken[0]}: the script sets this flag itself: leave it out")
    for flag in ("--ckpt-step", "--finetune"):
        if flag in given:
            raise ValueError(
                f"{flag}: every start of the job would go back to the same step: leave it out, or "
                "start from another checkpoint by --pretrained-checkpoint"
            )
    if "--save-interval" not in given:
        raise ValueError("--save-interval is missing after --: give the steps between checkpoints")
    if task := environment.get("SLURM_ARRAY_TASK_ID"):
        if "--seed" in given:
            raise ValueError("--seed: in an array the task's number is the seed: leave it out")
        run, megatron = run / f"seed-{task}", [*megatron, "--seed", task]
        # The id of one task is also that of the whole array, so the task's number is needed too.
        job = f"{environment['SLURM_ARRAY_JOB_ID']}_{task}"
    nodes = int(environment["SLURM_JOB_NUM_NODES"])
    ranks = options.ranks_per_node or int(environment.get("SLURM_GPUS_ON_NODE") or 0)
    if ranks < 1:
        raise ValueError(
            "the job has no GPUs: ask for them (--gpus-per-node), or give --ranks-per-node"
        )
    if options.max_attempts < 1:
        raise ValueError(f"--max-attempts must be at least 1, got {options.max_attempts}")
    overrides = [*options.set, *(["no-kv-shift"] if options.vanilla else [])]
    show = [options.model, options.layout, "--nproc", str(nodes * ranks)]
    show += ["--hybrid"] if options.hybrid else []
    return Settings(
        run=run,
        job=job,
        cluster=environment.get("SLURM_CLUSTER_NAME", ""),
        nodes=nodes,
        ranks_per_node=ranks,
        show=[*show, *(word for text in overrides for word in ("--set", text))],
        megatron=megatron,
        max_attempts=options.max_attempts,
        retry_failures=options.retry_failures,
    )


def _split(argv: list[str]) -> tuple[list[str], list[str]]:
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="pretrain.sbatch", add_help=False, allow_abbrev=False)
    parser.add_argument("run_directory")
    parser.add_argument("model")
    parser.add_argument("layout")
    parser.add_argument("--vanilla", action="store_true")
    parser.add_argument("--hybrid", action="store_true")
    parser.add_argument("--set", action="append", default=[])
    parser.add_argument("--ranks-per-node", type=int)
    parser.add_argument("--max-attempts", type=int, default=20)
    parser.add_argument("--retry-failures", action="store_true")
    return parser
