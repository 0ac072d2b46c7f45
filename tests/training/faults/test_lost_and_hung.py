"""A rank that dies or hangs: how the run ends, what is lost, and how it continues.

Each run has its own launcher, torchrun as a user calls it, and must leave no process behind.
"""

import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from kvshift_megatron.checks.checkpoint_paths import TRACKER
from kvshift_megatron.training.faults.fallback import fault_of
from tests.training.faults.runs import (
    HANG_TIMEOUT,
    Run,
    command,
    launched,
    losses,
    planned,
    survivors,
)

pytestmark = pytest.mark.slow

# Name -> (fault, iteration in which it happens, steps done before it, last complete checkpoint).
FAULTS = {
    "killed": ("killed", 6, 5, 4),
    "killed-writing": ("killed while writing", 6, 6, 4),
    "sleeps": ("sleeps", 6, 5, 4),
    "stopped": ("stopped", 6, 5, 4),
    "frozen": ("holds the lock", 6, 5, 4),
}
HANGS = ("sleeps", "stopped", "frozen")
# A shard of the latest of four checkpoints is truncated.
TRUNCATED = "truncated"
_AT_ONCE = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def broken(root) -> dict[str, tuple[Run, float]]:
    """Run with every fault, and once without."""

    def run(name: str) -> tuple[Run, float]:
        plant, iteration, *_ = FAULTS.get(name, (None, 0))
        words = command(
            plant,
            iteration=iteration,
            save=root / name,
            losses=root / f"{name}.losses",
            # A busy machine may make no progress for some seconds.
            hang_timeout_seconds=HANG_TIMEOUT if name in FAULTS else 60,
        )
        return launched(root / f"{name}.log", words)

    # The stopped one takes longest: torchrun waits 30 s for it.
    names = ["stopped", *(name for name in FAULTS if name != "stopped"), "unbroken"]
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(run, names)))


@pytest.fixture(scope="module")
def resumed(root, broken) -> dict[str, Run]:
    """Run the same commands again, as a restart does."""
    shutil.copytree(root / "unbroken", root / TRUNCATED)
    shard = root / TRUNCATED / "iter_0000008" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1000])
    # A file left by a save of the same iteration with another number of ranks.
    (root / "killed-writing" / "iter_0000006" / "__7_0.distcp").write_bytes(b"of another run")
    plan = {
        name: command(save=root / name, load=root / name, losses=root / f"{name}.resumed")
        for name in ("killed", "killed-writing", "sleeps", TRUNCATED)
    }
    return planned(root / "plan", plan)


def latest(folder: Path) -> int:
    return int((folder / TRACKER).read_text())


@pytest.mark.parametrize("name", FAULTS)
def test_the_run_ends_by_itself_and_fails(broken, root, name):
    """`launched` has checked that no process was left behind."""
    run, seconds = broken[name]
    _, _, done, saved = FAULTS[name]
    assert run.codes == [1], run.outputs[0][-5000:]
    assert sorted(losses(root / f"{name}.losses")) == list(range(1, done + 1))
    assert latest(root / name) == saved and fault_of(root / name / f"iter_{saved:07d}") is None
    # Without any time-out the remaining ranks would wait for a thousand seconds.
    assert seconds < 120


def test_an_interrupted_save_is_recognised(broken, root):
    assert "has no .metadata" in fault_of(root / "killed-writing" / "iter_0000006")
    assert (root / "killed-writing" / "iter_0000006" / "__1_0.distcp").stat().st_size > 300_000


@pytest.mark.parametrize("name", HANGS)
def test_the_rank_that_hangs_is_named(broken, name):
    run, _ = broken[name]
    error = run.said(r"kvshift_megatron: ERROR: no progress for \d+ s on rank \d")
    assert len(error) == 1 and f"--hang-timeout-seconds {HANG_TIMEOUT}" in error[0]
    (line,) = run.said(r"^rank \d \(process \d+ on \S+\) hangs")
    assert line.startswith("rank 1 (process ")
    assert "last seen in iteration 6, training: " in line
    assert run.said("complete steps lost since iteration 4: 1$")
    evidence = "operations of process group" if name == "sleeps" else "it has stopped reporting"
    assert evidence in line


@pytest.mark.parametrize("name", ["sleeps", "frozen"])
def test_its_stack_shows_where(broken, name):
    """From the watching thread, or from one in C if the rank holds the GIL."""
    (output,) = broken[name][0].outputs
    assert re.search(
        r"tests/training/faults/planted.py\", line \d+ in (train_step|_hold_the_lock)", output
    )


def test_a_run_without_a_fault_names_no_rank(broken, root):
    run, _ = broken["unbroken"]
    assert run.codes == [0] and latest(root / "unbroken") == 8
    assert not run.said("kvshift_megatron: (ERROR|WARNING)")


@pytest.mark.parametrize("name", ["killed", "killed-writing", "sleeps"])
def test_a_restart_repeats_the_unbroken_run_to_the_bit(resumed, root, name):
    run, (_, _, done, saved) = resumed[name], FAULTS[name]
    assert run.codes == [0, 0], run.outputs[0][-5000:]
    unbroken = losses(root / "unbroken.losses")
    before, after = losses(root / f"{name}.losses"), losses(root / f"{name}.resumed")
    assert list(after) == list(range(saved + 1, 9))
    # The lost steps are those that ran twice.
    assert sorted(set(before) & set(after)) == list(range(saved + 1, done + 1))
    assert before | after == unbroken == after | before
    assert len(set(unbroken.values())) == len(unbroken)
    assert latest(root / name) == 8 and fault_of(root / name / "iter_0000008") is None


def test_files_of_an_earlier_save_are_gone(resumed, root):
    names = sorted(path.name for path in (root / "killed-writing" / "iter_0000006").iterdir())
    files = ["__0_0.distcp", "__1_0.distcp", "integrity.json", "metadata.json"]
    assert names == [".metadata", *files]


def test_a_truncated_checkpoint_falls_back_with_a_warning(resumed, root):
    run = resumed[TRUNCATED]
    assert run.codes == [0, 0], run.outputs[0][-5000:]
    (warning,) = run.said("kvshift_megatron: WARNING: load: ")
    for part in [
        f"the file __1_0.distcp of the checkpoint {root}/{TRUNCATED}/iter_0000008 is ",
        f"{root}/{TRUNCATED}/iter_0000006: 2 steps are lost and repeated",
    ]:
        assert part in warning
    assert run.said(f"loading distributed checkpoint from {root}/{TRUNCATED} at iteration 6")
    unbroken = losses(root / "unbroken.losses")
    assert losses(root / f"{TRUNCATED}.resumed") == {step: unbroken[step] for step in (7, 8)}
    assert fault_of(root / TRUNCATED / "iter_0000008") is None


def test_the_search_for_remaining_processes_finds_one():
    process = subprocess.Popen(
        [sys.executable, "-c", "import time; time.sleep(60)"],
        env={"KVSHIFT_TEST_LAUNCH": "planted"},
    )
    try:
        assert process.pid in survivors("planted")
    finally:
        process.kill()
        process.wait()
    assert survivors("planted") == {}
