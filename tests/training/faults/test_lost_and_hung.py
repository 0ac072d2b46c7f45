"""A rank that dies or hangs: how the run ends, what is lost, and how it goes on.

Each run has a launcher of its own, torchrun as a user calls it, and must leave no process behind.
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
from tests.support.launch import one_launch_at_a_time
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

# Name -> (fault, the iteration that it happens in, steps done before it, newest whole checkpoint).
FAULTS = {
    "killed": ("killed", 6, 5, 4),
    "killed-writing": ("killed while writing", 6, 6, 4),
    "sleeps": ("sleeps", 6, 5, 4),
    "stopped": ("stopped", 6, 5, 4),
    "frozen": ("holds the lock", 6, 5, 4),
}
HANGS = ("sleeps", "stopped", "frozen")
# A shard of the newest of four checkpoints is cut off.
TRUNCATED = "truncated"
_AT_ONCE = 2


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("lost")


@pytest.fixture(scope="module")
def broken(root) -> dict[str, tuple[Run, float]]:
    """Every fault's run, and one without."""

    def run(name: str) -> tuple[Run, float]:
        plant, iteration, *_ = FAULTS.get(name, (None, 0))
        words = command(
            plant,
            iteration=iteration,
            save=root / name,
            losses=root / f"{name}.losses",
            # A busy machine may stand still for some seconds.
            hang_timeout_seconds=HANG_TIMEOUT if name in FAULTS else 60,
        )
        return launched(root / f"{name}.log", words)

    # The stopped one takes longest, of which torchrun waits 30 s.
    names = ["stopped", *(name for name in FAULTS if name != "stopped"), "unbroken"]
    with one_launch_at_a_time(), ThreadPoolExecutor(_AT_ONCE) as pool:
        return dict(zip(names, pool.map(run, names)))


@pytest.fixture(scope="module")
def resumed(root, broken) -> dict[str, Run]:
    """The same commands again, as a restart gives them."""
    shutil.copytree(root / "unbroken", root / TRUNCATED)
    shard = root / TRUNCATED / "iter_0000008" / "__1_0.distcp"
    shard.write_bytes(shard.read_bytes()[:-1000])
    # What a save of another size left of the same iteration.
    (root / "killed-writing" / "iter_0000006" / "__7_0.distcp").write_bytes(b"of another run")
    plan = {
        name: command(save=root / name, load=root / name, losses=root / f"{name}.resumed")
        for name in ("killed", "killed-writing", "sleeps", TRUNCATED)
    }
    return planned(root / "plan", plan)


def newest(folder: Path) -> int:
    return int((folder / TRACKER).read_text())


@pytest.mark.parametrize("name", FAULTS)
def test_the_run_ends_by_itself_and_fails(broken, root, name):
    """`launched` has looked for processes that were left behind."""
    run, seconds = broken[name]
    _, _, done, saved = FAULTS[name]
    assert run.codes == [1], run.outputs[0][-5000:]
    assert sorted(losses(root / f"{name}.losses")) == list(range(1, done + 1))
    assert newest(root / name) == saved and fault_of(root / name / f"iter_{saved:07d}") is None
    # Without a time-out of any kind, the ranks that are left wait for a thousand seconds.
    assert seconds < 120


def test_a_save_that_was_cut_short_is_known_for_one(broken, root):
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
    assert run.said("complete steps that are lost, since iteration 4: 1$")
    evidence = "operations of process group" if name == "sleeps" else "it reports no more"
    assert evidence in line


@pytest.mark.parametrize("name", ["sleeps", "frozen"])
def test_its_stack_shows_where(broken, name):
    """From its own thread, or from one that needs no Python where it holds Python's lock."""
    (output,) = broken[name][0].outputs
    assert re.search(
        r"tests/training/faults/planted.py\", line \d+ in (train_step|_hold_the_lock)", output
    )


def test_a_run_without_a_fault_names_nobody(broken, root):
    run, _ = broken["unbroken"]
    assert run.codes == [0] and newest(root / "unbroken") == 8
    assert not run.said("kvshift_megatron: (ERROR|WARNING)")


@pytest.mark.parametrize("name", ["killed", "killed-writing", "sleeps"])
def test_a_restart_repeats_the_unbroken_run_to_the_bit(resumed, root, name):
    run, (_, _, done, saved) = resumed[name], FAULTS[name]
    assert run.codes == [0, 0], run.outputs[0][-5000:]
    unbroken = losses(root / "unbroken.losses")
    before, after = losses(root / f"{name}.losses"), losses(root / f"{name}.resumed")
    assert list(after) == list(range(saved + 1, 9))
    # Lost: done, and done again.
    assert sorted(set(before) & set(after)) == list(range(saved + 1, done + 1))
    assert before | after == unbroken == after | before
    assert len(set(unbroken.values())) == len(unbroken)
    assert newest(root / name) == 8 and fault_of(root / name / "iter_0000008") is None


def test_files_of_an_earlier_save_are_gone(resumed, root):
    names = sorted(path.name for path in (root / "killed-writing" / "iter_0000006").iterdir())
    assert names == [".metadata", "__0_0.distcp", "__1_0.distcp", "metadata.json"]


def test_a_checkpoint_cut_off_afterwards_falls_back_loudly(resumed, root):
    run = resumed[TRUNCATED]
    assert run.codes == [0, 0], run.outputs[0][-5000:]
    (warning,) = run.said("kvshift_megatron: WARNING: load: ")
    for part in [
        f"the file __1_0.distcp of the checkpoint {root}/{TRUNCATED}/iter_0000008 is ",
        f"{root}/{TRUNCATED}/iter_0000006: 2 steps are lost and done again",
    ]:
        assert part in warning
    assert run.said(f"loading distributed checkpoint from {root}/{TRUNCATED} at iteration 6")
    unbroken = losses(root / "unbroken.losses")
    assert losses(root / f"{TRUNCATED}.resumed") == {step: unbroken[step] for step in (7, 8)}
    assert fault_of(root / TRUNCATED / "iter_0000008") is None


def test_the_search_for_what_is_left_behind_finds_it():
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
