"""Forked ranks end as those of torch's launcher do, and their output arrives."""

import subprocess
import time
from pathlib import Path

import pytest

from tests.support.launch import ranks

pytestmark = pytest.mark.slow

_PROBE = "tests.distributed.probe_rank"


def alive(folder: Path) -> list[str]:
    """Return the ranks, and processes that they have started, that do not end within seconds."""
    processes = {file.name: Path(f"/proc/{file.read_text()}/stat") for file in folder.iterdir()}
    deadline = time.monotonic() + 5
    while True:
        found = [name for name, stat in processes.items() if _runs(stat)]
        if not found or time.monotonic() > deadline:
            return found
        time.sleep(0.1)


def _runs(stat: Path) -> bool:
    try:
        return ") Z " not in stat.read_text()
    except OSError:  # ended
        return False


def test_ranks_meet_and_their_store_outlives_the_first(tmp_path):
    run = ranks(3, _PROBE, ["meets", str(tmp_path)], 60)
    assert run.returncode == 0, run.stdout
    assert sorted(run.stdout.splitlines()) == [f"rank {rank} of 3" for rank in range(3)]
    assert len(list(tmp_path.iterdir())) == 3 and alive(tmp_path) == []


def test_a_rank_that_fails_ends_the_others(tmp_path):
    run = ranks(3, _PROBE, ["fails", str(tmp_path)], 60)
    assert run.returncode == 1
    assert "rank 1 has failed" in run.stdout
    assert alive(tmp_path) == []


def test_time_is_limited_and_no_process_is_left(tmp_path):
    with pytest.raises(subprocess.TimeoutExpired):
        ranks(2, _PROBE, ["sleeps", str(tmp_path)], 4)
    assert len(list(tmp_path.iterdir())) == 4 and alive(tmp_path) == []


def test_a_module_that_does_not_exist_fails():
    run = ranks(2, "tests.distributed.no_such_module", [], 60)
    assert run.returncode == 1 and "No module named tests.distributed.no_such_module" in run.stdout
