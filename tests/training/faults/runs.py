"""Run the real loop on two ranks: many runs in one launch, or one that may break its launch."""

import os
import subprocess
import sys
import time
import uuid
from pathlib import Path

from kvshift_megatron.utils import launchers
from tests.integration.tiny_gpt import flags
from tests.support.forked_launch import Run, forked
from tests.support.launch import PROJECT, python_path

RANKS, STEPS, SAVE_INTERVAL = 2, 8, 2
HANG_TIMEOUT = 6
_MARK = "KVSHIFT_TEST_LAUNCH"  # in the environment of every process of a launch
_LONGEST = 150.0  # seconds a launch may take on a busy machine; most take 15


def command(plant: str | None = None, rank: int = 1, iteration: int = 0, **overrides) -> list[str]:
    """Return the flags of a run on two data-parallel ranks: eight steps, four saves."""
    values = {"train_iters": STEPS, "save_interval": SAVE_INTERVAL, **overrides}
    words = ["--task-module", "tests.training.faults.planted", *flags(**values)]
    if plant is not None:
        words += ["--plant", plant, "--plant-rank", str(rank), "--plant-iteration", str(iteration)]
    return words


def losses(file: Path) -> dict[int, float]:
    """Return {iteration: loss} as `--losses` wrote them."""
    words = [line.split() for line in file.read_text().splitlines()]
    found = {int(step): float.fromhex(loss) for step, loss in words}
    assert len(found) == len(words), f"{file} holds a step twice"
    return found


def planned(directory: Path, plan: dict[str, list[str]]) -> dict[str, Run]:
    """Run every entry of a plan in turn, on the ranks of one launch."""
    directory.mkdir()
    entries = {name: {"command": words, "before": None} for name, words in plan.items()}
    return forked(directory, entries, RANKS, timeout=300)


def launched(log: Path, words: list[str]) -> tuple[Run, float]:
    """Run with its own launcher, as a user does; return the run and the seconds that it took.

    Fail if it does not end by itself or leaves a process behind.
    """
    mark = uuid.uuid4().hex
    begin = time.monotonic()
    with log.open("w") as output:
        process = subprocess.Popen(
            [
                *(sys.executable, "-m", "torch.distributed.run", "--standalone"),
                *("--nproc-per-node", str(RANKS), "-m", "kvshift_megatron.pretrain", *words),
            ],
            cwd=PROJECT,
            env={
                **os.environ,
                **{"OMP_NUM_THREADS": "1", "TORCHDYNAMO_DISABLE": "1", _MARK: mark},
                "PYTHONPATH": python_path(),
            },
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(_LONGEST)
            seconds = time.monotonic() - begin
            left = survivors(mark, patience=20)
        finally:
            launchers.stop([process])
            for pid in survivors(mark):
                os.kill(pid, 9)
    assert not left, f"left behind: {left}"
    return Run([process.returncode], [log.read_text(errors="replace")]), seconds


def survivors(mark: str, patience: float = 0.0) -> dict[int, str]:
    """Return the remaining processes of a launch: {pid: command line}.

    Args:
        mark: Of the launch.
        patience: Seconds to wait for the last one to end; data loaders check every five.
    """
    deadline = time.monotonic() + patience
    while True:
        found = {}
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                if f"{_MARK}={mark}" in (folder / "environ").read_text(errors="replace"):
                    text = (folder / "cmdline").read_text(errors="replace")
                    found[int(folder.name)] = text.replace("\0", " ")
            except OSError:  # ended meanwhile, or another user's
                continue
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.5)
