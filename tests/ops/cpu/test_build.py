"""Compiling the kernel for this machine: once, with any compiler, and the error without one."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from kvshift_megatron.ops.cpu import build, kernel

TINY = "int answer(void) { return 42; }\n"


@pytest.fixture
def cache(tmp_path, monkeypatch):
    folder = tmp_path / "cache"
    monkeypatch.setenv(build.VARIABLE, str(folder))
    return folder


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "tiny.c"
    path.write_text(TINY)
    return path


@pytest.fixture
def calls(tmp_path, monkeypatch):
    """Set CC to a compiler that counts its compilations; return a function that reads the count."""
    log = tmp_path / "calls"
    _program(
        tmp_path / "noting-cc",
        f'case "$*" in *--version) ;; *) echo >> {log}; sleep ${{SLOW:-0}} ;; esac\n'
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


def _program(path: Path, script: str) -> None:
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def test_a_file_is_compiled_once(source, cache, calls):
    for _ in range(2):
        assert build.load(source).answer() == 42
    assert calls() == 1
    assert [path.suffix for path in cache.iterdir()] == [".so"]


def test_another_source_machine_or_compiler_is_another_file(source, cache, calls, monkeypatch):
    build.load(source)
    source.write_text(TINY.replace("42", "43"))
    assert build.load(source).answer() == 43
    monkeypatch.setattr(build, "_machine", lambda: ("another processor",))
    build.load(source)
    monkeypatch.setattr(build, "_version", lambda command: "cc 99")
    build.load(source)
    assert calls() == len(list(cache.iterdir())) == 4


@pytest.mark.parametrize("damage", ["cut short", "empty", "a bit flipped", "a folder"])
def test_a_damaged_file_is_compiled_again(damage, source, cache, calls):
    # Compiled but not loaded: a loaded file must not be written to.
    build.cache_folder().mkdir()
    made = build._compile([*build.find_compiler(), *build._flags()], source, cache / "a")
    content = bytearray(made.read_bytes())
    assert build._is_whole(made)
    content[len(content) // 2] ^= 1
    damaged = {"cut short": content[:5000], "empty": b"", "a bit flipped": content}
    made.unlink()
    name = _name_in_cache(source, cache)
    if damage == "a folder":
        (cache / name).mkdir()
    else:
        (cache / name).write_bytes(damaged[damage])
    before = calls()
    assert build.load(source).answer() == 42
    assert calls() > before
    assert damage == "a folder" or build._is_whole(cache / name)


def _name_in_cache(source: Path, cache: Path) -> str:
    """Return the name of the compiled file, without loading it into this process."""
    _loading_processes(source, cache.parent / "elsewhere", 1)
    (made,) = (cache.parent / "elsewhere").iterdir()
    return made.name


def _loading_processes(source: Path, cache: Path, count: int) -> None:
    # By its path: importing the package would import torch.
    program = (
        "import importlib.util as u, pathlib, sys"
        "; spec = u.spec_from_file_location('c', sys.argv[1])"
        "; c = u.module_from_spec(spec); spec.loader.exec_module(c)"
        "; assert c.load(pathlib.Path(sys.argv[2])).answer() == 42"
    )
    command = [sys.executable, "-c", program, build.__file__, str(source)]
    environment = {**os.environ, build.VARIABLE: str(cache)}
    started = [subprocess.Popen(command, env=environment) for _ in range(count)]
    assert [process.wait(timeout=60) for process in started] == [0] * count


def test_several_ranks_may_compile_at_once(source, cache, calls, monkeypatch):
    monkeypatch.setenv("SLOW", "1")
    _loading_processes(source, cache, 3)
    # The slow compiler makes them overlap; one complete file is left, and no partial one.
    assert calls() > 1
    (made,) = cache.iterdir()
    assert build._is_whole(made)


def test_without_a_cache_that_can_be_written_it_is_compiled_all_the_same(
    source, tmp_path, monkeypatch
):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(build.VARIABLE, str(tmp_path / "file" / "cache"))
    assert build.load(source).answer() == 42


def test_the_cache_is_in_the_users_folder_unless_another_is_named(monkeypatch):
    monkeypatch.setenv(build.VARIABLE, "/a")
    assert build.cache_folder() == Path("/a")
    monkeypatch.delenv(build.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert build.cache_folder() == Path("/b/kvshift_megatron")
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", "/c")
    assert build.cache_folder() == Path("/c/.cache/kvshift_megatron")


def test_why_the_kernel_cannot_serve_is_said(
    cache, tmp_path, monkeypatch, nothing_cached_in_process
):
    def reason():
        kernel.why_not.cache_clear()
        return kernel.why_not()

    monkeypatch.delenv("CC", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert reason() == "no C compiler is on PATH (cc, gcc or clang; or name one in CC)"
    x, taps = torch.randn(3, 1, 2, 8), torch.randn(2, 2)
    with pytest.raises(RuntimeError, match="cannot run: no C compiler is on PATH"):
        kernel.forward([x], [taps], None)
    monkeypatch.setenv("CC", "nowhere-cc -m64")
    assert reason() == "CC='nowhere-cc -m64' is not a program on this machine"
    failing = 'echo note >&2; echo "a.c: error: no" >&2; exit 3'
    _program(tmp_path / "cc", f'case "$*" in *--version) echo 1 ;; *) {failing} ;; esac')
    monkeypatch.delenv("CC")
    assert reason() == "cc failed with exit code 3: a.c: error: no"
    _program(tmp_path / "cc", 'for word; do [ "$last" != -o ] || echo no > $word; last=$word; done')
    assert reason().startswith("kernel.c cannot be compiled and loaded: ")
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    _program(tmp_path / "cc", "exec /bin/sleep 60")
    assert reason() == "cc took more than 0.2 s"
    monkeypatch.setattr(kernel.platform, "machine", lambda: "riscv64")
    assert "not linux on riscv64" in reason()


def test_a_compilers_own_error_is_passed_on(tmp_path, cache):
    (tmp_path / "bad.c").write_text("int answer(void) { return forty_two; }\n")
    with pytest.raises(build.BuildError, match=r"failed with exit code 1: .*error: .*forty_two"):
        build.load(tmp_path / "bad.c")
