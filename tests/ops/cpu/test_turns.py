"""Ranks that start at once: one of them builds, and none waits forever."""

import fcntl
import os
import signal
import time

import pytest

from kvshift_megatron.ops.cpu import build, cache_folders, turns
from tests.ops.cpu.conftest import compiled_in, load_at_once, start_loading

pytestmark = pytest.mark.slow


def test_one_process_compiles_while_the_others_wait(source, cache, calls):
    assert load_at_once(source, 4, SLOW="1") == [""] * 4
    assert calls() == 1
    (made,) = compiled_in(cache)
    assert build._is_ours_and_whole(made)


def test_one_processs_failure_is_that_of_all_who_waited(source, cache, calls, tmp_path):
    source.write_text("no C at all")
    # The same folder first and last: nothing else to try.
    places = {"TMPDIR": str(tmp_path / "none"), cache_folders.VARIABLE: str(cache)}
    printed = load_at_once(source, 4, SLOW="2", **places)
    assert len(set(printed)) == 1 and "error: " in printed[0]
    # In each folder once, and not once a process.
    assert calls() <= 4 + 1


def test_a_later_run_tries_again(source, cache, calls, monkeypatch):
    content = source.read_text()
    monkeypatch.setattr(cache_folders, "_TEMPORARY", ())
    monkeypatch.delenv("TMPDIR", raising=False)
    # The name in the cache depends on the source alone, so let the compiler fail.
    monkeypatch.setenv("FULL", str(cache))
    with pytest.raises(build.BuildError, match="No space left"):
        build.load(source)
    monkeypatch.setenv("FULL", "")
    assert source.read_text() == content
    assert build.load(source).answer() == 42


def test_a_builder_that_is_killed_holds_nobody_up(source, cache, calls):
    killed = start_loading(source, SLOW="60")
    while not calls():
        time.sleep(0.02)
    (lock,) = cache.glob(".*.lock")
    with lock.open() as file, pytest.raises(BlockingIOError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.kill(killed.pid, signal.SIGKILL)
    killed.wait()
    start = time.monotonic()
    assert load_at_once(source, 1) == [""]
    assert time.monotonic() - start < 30


def test_a_lock_that_is_never_released_is_waited_for_briefly(tmp_path, monkeypatch):
    monkeypatch.setattr(turns, "_GRACE", 0)
    with (tmp_path / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        start = time.monotonic()
        with turns.turn(tmp_path / "lock", 0.3):
            waited = time.monotonic() - start
    assert 0.3 <= waited < 5


def test_a_file_system_without_locks_is_no_obstacle(tmp_path, monkeypatch):
    def unsupported(*_):
        raise OSError("no locks available")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    ran = []
    with turns.turn(tmp_path / "lock", 60):
        ran.append(1)
    assert ran


def test_a_time_out_is_passed_on_as_one(tmp_path):
    with pytest.raises(turns.TooSlowError), turns.turn(tmp_path / "lock", 60):
        raise turns.TooSlowError("cc took more than 1 s")
    assert type(turns._failure((tmp_path / "lock").read_text())) is turns.TooSlowError
