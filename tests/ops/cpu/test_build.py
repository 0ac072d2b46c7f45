"""Compiling the kernel for this machine: once, with any compiler, and the error without one."""

from pathlib import Path

import pytest
import torch

from kvshift_megatron.ops.cpu import build, cache_folders, kernel
from tests.ops.cpu.conftest import TINY, compiled_in, load_at_once


def test_a_file_is_compiled_once(source, cache, calls):
    for _ in range(2):
        assert build.load(source).answer() == 42
    assert calls() == 1
    assert [path.suffix for path in compiled_in(cache)] == [".so"]


def test_another_source_machine_or_compiler_is_another_file(source, cache, calls, monkeypatch):
    build.load(source)
    source.write_text(TINY.replace("42", "43"))
    assert build.load(source).answer() == 43
    monkeypatch.setattr(build, "_machine", lambda: ("another processor",))
    build.load(source)
    monkeypatch.setattr(build, "_version", lambda command: "cc 99")
    build.load(source)
    assert calls() == len(compiled_in(cache)) == 4


@pytest.mark.parametrize("damage", ["cut short", "empty", "a bit flipped", "a folder"])
def test_a_damaged_file_is_compiled_again(damage, source, cache, calls):
    # Compiled but not loaded: a loaded file must not be written to.
    cache.mkdir()
    made = build._compile([*build.find_compiler(), *build._flags()], source, cache / "a")
    content = bytearray(made.read_bytes())
    assert build._is_ours_and_whole(made)
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
    assert damage == "a folder" or build._is_ours_and_whole(cache / name)


def _name_in_cache(source: Path, cache: Path) -> str:
    """Return the name of the compiled file, without loading it into this process."""
    elsewhere = cache.parent / "elsewhere"
    load_at_once(source, 1, **{cache_folders.VARIABLE: str(elsewhere)})
    (made,) = compiled_in(elsewhere)
    return made.name


def test_why_the_kernel_cannot_serve_is_said(
    cache, tmp_path, monkeypatch, nothing_cached_in_process, program
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
    program(tmp_path / "cc", f'case "$*" in *--version) echo 1 ;; *) {failing} ;; esac')
    monkeypatch.delenv("CC")
    assert reason() == "cc failed with exit code 3: a.c: error: no"
    program(tmp_path / "cc", 'for word; do [ "$last" != -o ] || echo no > $word; last=$word; done')
    assert reason().startswith("kernel.c cannot be compiled and loaded: ")
    monkeypatch.setattr(build, "_SECONDS", 0.2)
    program(tmp_path / "cc", "exec /bin/sleep 60")
    assert reason() == "cc took more than 0.2 s"
    monkeypatch.setattr(kernel.platform, "machine", lambda: "riscv64")
    assert "not linux on riscv64" in reason()


def test_a_compilers_own_error_is_passed_on(tmp_path, cache):
    (tmp_path / "bad.c").write_text("int answer(void) { return forty_two; }\n")
    with pytest.raises(build.BuildError, match=r"failed with exit code 1: .*error: .*forty_two"):
        build.load(tmp_path / "bad.c")
