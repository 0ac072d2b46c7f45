"""A cache and a compiler of the test's own, and processes that load what it compiles."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from kvshift_megatron.ops.cpu import build, cache_folders, kernel
from tests.support.launch import python_path

TINY = "int answer(void) { return 42; }\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(cache_folders.VARIABLE, str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tiny.c"
    path.write_text(TINY)
    return path


@pytest.fixture
def program():
    """Return a function that writes a shell script."""

    def write(path: Path, script: str) -> None:
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(0o755)

    return write


@pytest.fixture
def calls(tmp_path, monkeypatch, program):
    """Set CC to a compiler that counts its compilations; return a function that reads the count.

    With FULL=folder it finds no space there.
    """
    log = tmp_path / "calls"
    full = (
        'case "$*" in *"-o $FULL"*) echo "fatal error: No space left on device" >&2; exit 1 ;; esac'
    )
    program(
        tmp_path / "noting-cc",
        f'case "$*" in *--version) exec {shutil.which("cc")} "$@" ;; esac\n'
        f'echo >> {log}\nsleep ${{SLOW:-0}}\n[ -z "$FULL" ] || {full}\n'
        f'exec {shutil.which("cc")} "$@"',
    )
    monkeypatch.setenv("CC", str(tmp_path / "noting-cc"))
    return lambda: len(log.read_text()) if log.exists() else 0


@pytest.fixture
def nothing_cached_in_process():
    caches = (kernel.why_not, kernel._entries)
    for cached in caches:
        cached.cache_clear()
    yield
    for cached in caches:
        cached.cache_clear()


def start_loading(source: Path, **environment: str) -> subprocess.Popen:
    """Start a process that loads `source`; it prints what went wrong."""
    # Without kvshift_megatron.ops itself, which imports torch.
    program = (
        "import pathlib, sys, types"
        "; ops = types.ModuleType('kvshift_megatron.ops'); ops.__path__ = [sys.argv[1]]"
        "; sys.modules[ops.__name__] = ops"
        "; from kvshift_megatron.ops.cpu import build"
        "\ntry: assert build.load(pathlib.Path(sys.argv[2])).answer() == 42"
        "\nexcept build.BuildError as error: print(error)"
    )
    ops = Path(build.__file__).parents[1]
    return subprocess.Popen(
        [sys.executable, "-c", program, str(ops), str(source)],
        env={**os.environ, "PYTHONPATH": python_path(), **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def load_at_once(source: Path, count: int, **environment: str) -> list[str]:
    """Load `source` in some processes at the same time; return what they print."""
    started = [start_loading(source, **environment) for _ in range(count)]
    printed = [process.communicate(timeout=120)[0].strip() for process in started]
    assert [process.returncode for process in started] == [0] * count, printed
    return printed


def compiled_in(folder: Path) -> list[Path]:
    """Return the compiled files, without the locks."""
    return sorted(path for path in folder.iterdir() if path.suffix != ".lock")
