"""Run the models under torch's launcher, as many at a time as the configuration allows."""

import os
import queue
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from examples.induction.config import Config, Model
from examples.induction.logs import Evaluation, TrainingLog
from kvshift_megatron.utils import launchers

ROOT = Path(__file__).resolve().parents[2]
_TAIL_LINES = 30

ReportProgress = Callable[[str, Evaluation, float], None]
"""Called with the model's name, a new validation point and the seconds since the model's launch."""


class RunError(RuntimeError):
    """A training run failed; the message carries its last lines and the log's path."""


@dataclass
class Result:
    """One finished training run."""

    model: Model
    log: TrainingLog
    seconds: float


@dataclass
class _Child:
    """A running launcher and the thread that reads it."""

    model: Model
    process: subprocess.Popen
    started: float
    path: Path
    log: TrainingLog = field(default_factory=TrainingLog)
    tail: deque = field(default_factory=lambda: deque(maxlen=_TAIL_LINES))

    def failure(self, reason: str) -> RunError:
        last = "\n".join(f"    {line}" for line in self.tail)
        return RunError(f"{self.model.name}: {reason}\n{last}\n  full log: {self.path}")


def command(model: Model) -> list[str]:
    """Return the launcher's command line for one model."""
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    launcher += ["--nproc-per-node", str(model.nproc)]
    entry = ["-m", "kvshift_megatron.pretrain", "--task-module", "examples.induction.task"]
    return launcher + entry + model.argv()


def log_file(output: Path, model: Model) -> Path:
    """Return the log file of one model."""
    return output / f"{model.name}.log"


def _environment(cpu: bool) -> dict[str, str]:
    defaults = {
        "OMP_NUM_THREADS": "1",  # one busy core per rank
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",  # Megatron requires it with sequence parallelism
        "PYTHONUNBUFFERED": "1",  # progress must not wait in a buffer
    }
    return defaults | os.environ | ({"KVSHIFT_CPU": "1"} if cpu else {})


def _read(child: _Child, events: queue.Queue) -> None:
    """Copy the child's output to its log file and report events, until the pipe closes."""
    problem = None
    with open(child.path, "w", encoding="utf-8") as file:
        for line in child.process.stdout:
            file.write(line)
            file.flush()
            child.tail.append(line.rstrip())
            try:
                evaluation = child.log.feed(line)
            except ValueError as error:
                problem = problem or str(error)
                events.put((child, "problem", problem))
                continue
            if evaluation is not None:
                events.put((child, "evaluation", evaluation))
    events.put((child, "end", None))


def _start(model: Model, cpu: bool, output: Path, events: queue.Queue) -> _Child:
    process = subprocess.Popen(
        command(model),
        cwd=ROOT,  # makes `examples` and `kvshift_megatron` importable
        env=_environment(cpu),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # Ctrl-C reaches only this program, which then stops the launcher
    )
    child = _Child(model, process, time.monotonic(), log_file(output, model))
    threading.Thread(target=_read, args=(child, events), daemon=True).start()
    return child


def run_all(config: Config, output: Path, progress: ReportProgress) -> list[Result]:
    """Train every model, in the configuration's order; later ones start as processes become free.

    Args:
        config: The experiment.
        output: Existing directory for the logs, <model>.log each.
        progress: Called in this thread for each new validation point.

    Returns:
        One result per model, in the configuration's order.

    Raises:
        RunError: A run failed. All runs have been stopped, as on any other exception.
    """
    waiting, running, results = deque(config.models), [], {}
    events: queue.Queue = queue.Queue()
    try:
        while waiting or running:
            busy = sum(child.model.nproc for child in running)
            while waiting and busy + waiting[0].nproc <= config.max_processes:
                busy += waiting[0].nproc
                running.append(_start(waiting.popleft(), config.cpu, output, events))
            child, kind, value = events.get()
            seconds = time.monotonic() - child.started
            if kind == "evaluation":
                progress(child.model.name, value, seconds)
            elif kind == "problem":
                raise child.failure(value)
            else:
                code = child.process.wait()
                if code != 0:
                    raise child.failure(f"training ended with exit code {code}")
                if not child.log.evaluations:
                    raise child.failure("training ended without a validation")
                running.remove(child)
                results[child.model.name] = Result(child.model, child.log, seconds)
    finally:
        launchers.stop(child.process for child in running)
    return [results[model.name] for model in config.models]
