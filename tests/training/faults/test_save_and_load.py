"""Failed saves, a full disk and losses that are NaN, in the real loop.

Two data-parallel ranks run eight steps and save after every other one.
"""

import contextlib
import ctypes
import os
import re
from pathlib import Path

import pytest
import torch.distributed.checkpoint as dcp

from kvshift_megatron.checks.checkpoint_paths import TRACKER
from kvshift_megatron.training.faults.fallback import fault_of
from tests.support.saved_tensors import differing, tensors
from tests.training.faults.runs import STEPS, Run, command, losses, planned

pytestmark = pytest.mark.slow

# Without the worker Megatron silently saves in the foreground.
_IN_BACKGROUND = {
    "async_save": True,
    "use_persistent_ckpt_worker": True,
    "async_strategy": "mcore",
}
_DISK = 2_000_000  # bytes: room for one checkpoint of 1.3 MB and half of the next
_GOES_ON = {"on_save_failure": "continue"}


@contextlib.contextmanager
def small_disk(folder: Path):
    """Mount a file system of _DISK bytes; yield None without the permission to."""
    folder.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    options = f"size={_DISK}".encode()
    mounted = libc.mount(b"tmpfs", str(folder).encode(), b"tmpfs", 0, options) == 0
    try:
        yield folder if mounted else None
    finally:
        if mounted:
            libc.umount2(str(folder).encode(), 2)  # lazily: something may still use it


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("faults")


@pytest.fixture(scope="module")
def runs(root):
    disks = {
        "stop": {},
        "continue": _GOES_ON,
        "async": _GOES_ON | _IN_BACKGROUND,
        "async-stop": _IN_BACKGROUND,
    }
    with contextlib.ExitStack() as stack:
        plan = {}

        def full(name: str, **others) -> list[str]:
            folder = stack.enter_context(small_disk(root / f"disk-{name}"))
            if folder is not None:
                # The run that ends with saves in its queue also ignores SIGTERM. Pause before the
                # second save, so that the first one finishes while there is room for it.
                plant = {"async": "pauses", "async-stop": "ignores SIGTERM"}.get(name)
                return command(plant, 0, 3, save=folder / "run", **others)
            # From the second checkpoint on, limit files to half their size.
            return command("small files", 0, 4, save=root / f"disk-{name}" / "run", **others)

        def planted(name: str, kind: str, rank: int = 1, iteration: int = 4, **others) -> None:
            given = {"save": root / name, **_GOES_ON, **others}
            plan[name] = command(kind, rank, iteration, **given)

        plan["unbroken"] = command(save=root / "unbroken", losses=root / "unbroken.losses")
        for name, others in disks.items():
            plan[f"disk-{name}"] = full(name, **others)
        planted("refused", "refused", losses=root / "refused.losses")
        planted("no-metadata", "no metadata", 0)
        planted("no-tracker", "no tracker", 0)
        planted("no-tracker-stop", "no tracker", 0, on_save_failure="stop")
        planted("nan", "nan", iteration=6)
        planted("nan-first", "nan", iteration=5, load=root / "unbroken", ckpt_step=4)
        finished = planned(root / "plan", plan)
        yield finished


def same_state(one: Path, other: Path) -> bool:
    return differing(tensors(one), tensors(other)) == []


def checkpoints(folder: Path) -> dict[int, bool]:
    """Return {iteration: whether it is complete} for every checkpoint folder."""
    return {int(path.name[5:]): fault_of(path) is None for path in folder.glob("iter_*")}


def latest(folder: Path) -> int:
    return int((folder / TRACKER).read_text())


def failures(run: Run) -> list[str]:
    return run.said("ERROR: the checkpoint of iteration")


def finished_steps(run: Run) -> int:
    return len(run.said(r" iteration +\d+/"))


def test_an_unbroken_run(runs, root):
    run = runs["unbroken"]
    assert run.codes == [0, 0], run.outputs[0][-5000:]
    assert checkpoints(root / "unbroken") == dict.fromkeys((2, 4, 6, 8), True)
    assert latest(root / "unbroken") == 8 and finished_steps(run) == STEPS
    assert sorted(losses(root / "unbroken.losses")) == list(range(1, STEPS + 1))
    assert not run.said("kvshift_megatron: (ERROR|WARNING)")


# --- a full disk ---


def full(root: Path, name: str) -> Path:
    return root / f"disk-{name}" / "run"


@pytest.mark.parametrize("name", ["stop", "async-stop"])
def test_a_full_disk_ends_the_run_and_says_so(runs, root, name):
    run, folder = runs[f"disk-{name}"], full(root, name)
    assert run.codes == [1, 1]
    (line,) = failures(run)
    assert re.search(r"iteration 4 was not saved: rank \d on \S+ could not write", line)
    assert re.search(rf"{folder}/iter_0000004/__\d_0.distcp of \d+ bytes \(\[Errno (28|27)\]", line)
    assert f"{folder}/iter_0000004 was removed" in line
    in_background = bool(run.said("scheduled an async checkpoint save"))
    assert in_background == (name == "async-stop")
    # A failure in the background is noticed later.
    assert finished_steps(run) == 4 or in_background
    assert "2 steps are lost" in line
    there = checkpoints(folder)
    if in_background:
        # Saves that were in progress when this one failed leave incomplete folders.
        there = {iteration: True for iteration, is_complete in there.items() if is_complete}
    assert there == {2: True} and latest(folder) == 2
    assert same_state(folder / "iter_0000002", root / "unbroken" / "iter_0000002")


@pytest.mark.parametrize("name", ["continue", "async"])
def test_a_full_disk_and_training_goes_on(runs, root, name):
    run, folder = runs[f"disk-{name}"], full(root, name)
    lines = failures(run)
    assert [re.search(r"iteration (\d)", line)[1] for line in lines] == ["4", "6", "8"]
    for lost, line in zip((2, 4, 6), lines):
        assert f"Training continues; {lost} steps would be lost if it ended now" in line
    assert finished_steps(run) == STEPS
    assert bool(run.said("scheduled an async checkpoint save")) == (name == "async")
    assert checkpoints(folder) == {2: True} and latest(folder) == 2
    assert same_state(folder / "iter_0000002", root / "unbroken" / "iter_0000002")
    # The last weights were not saved, so the run has failed.
    assert run.codes == [1, 1]
    assert run.said("the last checkpoint, of iteration 8, was not saved.*iteration 2")


# --- one failing write, on one rank ---


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("refused", r"rank 1 .*iter_0000004/__1_0.distcp of \d+ bytes \(\[Errno 13\] Permission"),
        ("no-metadata", r"rank 0 .*iter_0000004/.metadata \(\[Errno 21\] Is a directory"),
        ("no-tracker", rf"rank 0 .*{TRACKER} \(\[Errno 21\]"),
    ],
)
def test_a_write_that_fails_on_one_rank_fails_the_save_on_all(runs, root, name, words):
    run, folder = runs[name], root / name
    first, *others = failures(run)
    assert "iteration 4 was not saved" in first and re.search(words, first), first
    assert "2 steps would be lost" in first
    assert finished_steps(run) == STEPS
    if name == "no-tracker":
        # The folder is still in the way.
        assert run.codes == [1, 1] and len(others) == 2
        assert latest(folder) == 2 and checkpoints(folder) == {2: True}
    else:
        assert run.codes == [0, 0] and others == []
        assert latest(folder) == 8
        assert checkpoints(folder) == {2: True, 6: True, 8: True}
        assert same_state(folder / "iter_0000008", root / "unbroken" / "iter_0000008")


def test_a_failed_save_changes_no_loss(runs, root):
    assert losses(root / "refused.losses") == losses(root / "unbroken.losses")


def test_the_tracker_file_is_never_half_written(runs, root):
    run, folder = runs["no-tracker-stop"], root / "no-tracker-stop"
    assert run.codes == [1, 1] and len(failures(run)) == 1
    assert finished_steps(run) == 4
    assert latest(folder) == 2 and checkpoints(folder) == {2: True}


# --- losses that are NaN ---


def not_finite(folder: Path) -> list[str]:
    return [key for key, value in tensors(folder).items() if not value.isfinite().all()]


def test_a_nan_ends_the_run_and_reaches_no_checkpoint(runs, root):
    """Megatron repeats the step, gets the same, saves the state before it and exits with 16."""
    run, folder = runs["nan"], root / "nan"
    assert run.codes == [16, 16]
    assert run.said("Unexpected result nan on rank 1")
    (line,) = run.said("kvshift_megatron: ERROR: rank . on")
    assert "rank 1 on" in line and "in iteration 6 (found NaN in local forward loss" in line
    # Nothing is lost: the fifth step was saved for the restart.
    assert finished_steps(run) == 5 and latest(folder) == 5
    assert checkpoints(folder) == dict.fromkeys((2, 4, 5), True)
    assert [not_finite(folder / f"iter_000000{step}") for step in (2, 4, 5)] == [[]] * 3
    assert same_state(folder / "iter_0000004", root / "unbroken" / "iter_0000004")


def test_a_nan_in_the_first_step_of_a_process_too(runs, root):
    """Megatron does not check that step, and would save its result."""
    run = runs["nan-first"]
    assert all(code not in (0, None) for code in run.codes)
    assert run.said(r"RuntimeError: the loss of rank 1 on \S+ is nan in iteration 5, the first")
    assert checkpoints(root / "nan-first") == {}
    assert latest(root / "unbroken") == 8


def test_the_search_for_nans_finds_one(runs, root):
    state = tensors(root / "unbroken" / "iter_0000002")
    state["decoder.final_layernorm.weight"][3] = float("nan")
    folder = root / "with a nan"
    dcp.save(state, storage_writer=dcp.FileSystemWriter(folder), no_dist=True)
    assert not_finite(folder) == ["decoder.final_layernorm.weight"]
    assert not same_state(folder, root / "unbroken" / "iter_0000002")


# --- the fixtures ---


def test_the_fixture_mounted_or_limited_something(runs, root):
    """With a disk that is large enough the tests above would prove nothing."""
    found = [runs[f"disk-{name}"] for name in ("stop", "continue", "async", "async-stop")]
    assert all(run.said(r"Errno 2[78]") for run in found)
    assert os.path.ismount(root / "disk-stop") == bool(found[0].said(r"Errno 28"))
