"""Run one rank's training steps in a process of its own, on the meta device."""

import contextlib
import io
import json
import os
import signal
import sys
import tempfile
import time
import traceback
import warnings
from argparse import Namespace
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kvshift_megatron import cpu
from kvshift_megatron.planning.dry_run_flags import dry_run_flags, undo_cpu_choices
from kvshift_megatron.planning.observe import EnoughSteps, StepObserver

# The validated arguments of Megatron that a report or an estimate needs.
_SIZES = (
    "global_batch_size",
    "micro_batch_size",
    "seq_length",
    "num_layers",
    "padded_vocab_size",
    "overlap_grad_reduce",
    "overlap_param_gather",
    "use_distributed_optimizer",
)
_SECONDS = 600  # for one rank; the largest models take less than a minute


@dataclass(frozen=True)
class DryRank:
    """What one process counts.

    Attributes:
        flags: Command line of kvshift_megatron.pretrain, as words.
        world_size, rank: The rank's place in the layout.
        micro_batches: Micro-batches of each step; see StepObserver.
        kernels: "gpu" or "cpu"; see assumed_kernels.py.
    """

    flags: tuple[str, ...]
    world_size: int
    rank: int
    micro_batches: tuple[int, ...]
    kernels: str = "gpu"


def prepare() -> None:
    """Import what every process needs, so that the children inherit it.

    Raises:
        ValueError: megatron-core is too old.
    """
    # The CPU layer is forced even if there is a GPU: no part of a plan runs on one.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu.enable(force=True)
        import megatron.core.models.mimo
        import megatron.training.training  # noqa: F401

        try:
            import kvshift_megatron.planning.assumed_kernels
            import kvshift_megatron.planning.meta_device
            import kvshift_megatron.pretrain
            import kvshift_megatron.training.forward_step
            import kvshift_megatron.training.gpt_builder
            import kvshift_megatron.training.hybrid_builder  # noqa: F401
        except ImportError as error:
            raise ValueError(f"a plan needs megatron-core 0.19: {error}") from error


def count(ranks: list[DryRank], jobs: int = 2) -> list[dict]:
    """Run the ranks' steps, `jobs` at a time.

    Returns:
        For each rank {static, steps, args, seconds, peak_rss}. For the first two see StepObserver;
        `args` are those of Megatron's validated arguments that a plan needs.

    Raises:
        ValueError: A rank's run failed; the message holds its error.
    """
    prepare()
    with tempfile.TemporaryDirectory(prefix="kvshift_plan_") as folder:
        waiting = list(enumerate(ranks))[::-1]
        running: dict[int, tuple[int, float]] = {}
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    number, rank = waiting.pop()
                    running[_start(rank, Path(folder) / str(number))] = (number, time.monotonic())
                # Remove all of them before one can raise: an ended child must not be killed below.
                for number in [running.pop(pid)[0] for pid in list(_ended(running))]:
                    _raise_if_failed(Path(folder) / str(number), ranks[number])
                time.sleep(0.02)
        finally:
            for pid in running:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [
            json.loads((Path(folder) / f"{number}.json").read_text())
            for number in range(len(ranks))
        ]


def _start(rank: DryRank, output: Path) -> int:
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    try:
        log = os.open(output.with_suffix(".log"), os.O_WRONLY | os.O_CREAT)
        os.dup2(log, 1)
        os.dup2(log, 2)
        # The parent's streams may not be file descriptors 1 and 2.
        sys.stdout, sys.stderr = (os.fdopen(n, "w", closefd=False) for n in (1, 2))
        counted = _run(rank)
        output.with_suffix(".json").write_text(json.dumps(counted))
    except BaseException as error:
        traceback.print_exc()
        output.with_suffix(".error").write_text(f"{type(error).__name__}: {error}")
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the parent's exit handlers, such as a test runner's.
    os._exit(0)


def _ended(running: dict[int, tuple[int, float]]) -> Iterator[int]:
    for pid, (_, start) in running.items():
        if os.waitpid(pid, os.WNOHANG)[0]:
            yield pid
        elif time.monotonic() - start > _SECONDS:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            yield pid


def _raise_if_failed(output: Path, rank: DryRank) -> None:
    if output.with_suffix(".json").exists():
        return
    error = output.with_suffix(".error")
    reason = error.read_text() if error.exists() else f"it was killed (limit: {_SECONDS} s)"
    log = output.with_suffix(".log")
    if "KVSHIFT_PLAN_LOG" in os.environ and log.exists():
        Path(os.environ["KVSHIFT_PLAN_LOG"]).write_text(log.read_text())
    raise ValueError(
        f"rank {rank.rank} of {rank.world_size} cannot be planned: {reason} (set "
        "KVSHIFT_PLAN_LOG=FILE to keep its output)"
    )


def _run(rank: DryRank) -> dict:
    """Run Megatron's own `pretrain`, in the child, until enough steps have been counted."""
    import resource

    start = time.monotonic()
    os.environ |= {
        "RANK": str(rank.rank),
        "WORLD_SIZE": str(rank.world_size),
        "LOCAL_RANK": "0",
        "LOCAL_WORLD_SIZE": "1",
    }
    from megatron.core.enums import ModelType
    from megatron.training import training

    from kvshift_megatron.planning import assumed_kernels, meta_device
    from kvshift_megatron.training.forward_step import ForwardStep
    from kvshift_megatron.training.run_config import configurations, parse_and_check
    from kvshift_megatron.training.stages import embedding_ranks
    from kvshift_megatron.training.task import load_task

    sys.argv = ["plan", *dry_run_flags(rank.flags)]
    args = parse_and_check()
    undo_cpu_choices(args, rank.flags, rank.kernels)
    meta_device.enter()
    assumed_kernels.use(rank.kernels)
    task = load_task(args.task_module)

    def provide_datasets(_: Any, vp_stage: int | None = None) -> tuple[Iterator, ...]:
        return (meta_device.samples(args, tuple(task.batch_keys)),) * 3

    datasets_provider: Any = provide_datasets
    datasets_provider.is_distributed = True  # Megatron then calls it on every rank
    observer = StepObserver(list(rank.micro_batches))
    try:
        with (
            meta_device.MetaAnswers(),
            meta_device.loop_without_values(args),
            observer.installed(),
        ):
            training.pretrain(
                configurations(args)[1],
                datasets_provider,
                ModelType.encoder_or_decoder,
                ForwardStep(task),
                get_embedding_ranks=embedding_ranks,
            )
    except EnoughSteps:
        pass
    return {
        "static": observer.static,
        "steps": observer.steps,
        "args": _facts(args),
        "seconds": time.monotonic() - start,
        "peak_rss": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
    }


def _facts(args: Namespace) -> dict:
    """Return the sizes, and Megatron's own figures: FLOPs of a step and its theoretical memory."""
    from kvshift_megatron.planning.megatron_figures import megatron_figures

    return {name: getattr(args, name) for name in _SIZES} | megatron_figures(args)
