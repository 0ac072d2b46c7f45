"""Where compiled files are kept, whose they must be, and what happens if that place fails."""

import logging
import os
import re
import stat
import tempfile
from pathlib import Path

import pytest

from kvshift_megatron.ops.cpu import build, cache_folders
from tests.ops.cpu.conftest import TINY, compiled_in, load_at_once

pytestmark = pytest.mark.slow

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")
STRANGER = 12345


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """Let temporary files be in a folder of the test; return where compiled ones then are."""
    monkeypatch.setenv("TMPDIR", str(tmp_path / "tmp"))
    (tmp_path / "tmp").mkdir()
    (tmp_path / "tmp").chmod(0o1777)
    return tmp_path / "tmp" / f"kvshift_megatron-{os.geteuid()}"


@pytest.fixture
def in_the_open():
    """Return a folder that everybody can enter; those of pytest nobody else can."""
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        os.chmod(folder, 0o755)
        yield Path(folder)


def plant(source: Path, folder: Path) -> Path:
    """Leave an object in the cache that gives another answer, under the name of the right one."""
    source.write_text(TINY.replace("42", "666"))
    folder.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    planted = folder.parent / "planted"
    build._compile([*build.find_compiler(), *build._flags()], source, planted)
    source.write_text(TINY)
    load_at_once(source, 1, **{cache_folders.VARIABLE: str(folder)})
    (made,) = compiled_in(folder)
    os.replace(planted, made)
    return made


def test_a_planted_object_would_run(source, cache, elsewhere):
    """What the other tests rely on: only its owner and mode give it away."""
    plant(source, cache)
    assert build.load(source).answer() == 666


@as_root
def test_an_object_of_another_user_is_replaced(source, cache, elsewhere):
    planted = plant(source, cache)
    os.chown(planted, STRANGER, STRANGER)
    assert build.load(source).answer() == 42
    assert planted.stat().st_uid == os.geteuid()


@pytest.mark.parametrize("how", ["writable by others", "a link"])
def test_an_object_that_another_user_could_change_is_replaced(how, source, cache, elsewhere):
    planted = plant(source, cache)
    if how == "a link":
        planted.rename(cache / "target")
        planted.symlink_to(cache / "target")
    else:
        planted.chmod(0o722)
    assert build.load(source).answer() == 42
    found = planted.lstat()
    assert stat.S_ISREG(found.st_mode) and not found.st_mode & 0o022


def of_a_stranger(folder: Path) -> None:
    os.chown(folder, STRANGER, STRANGER)


def writable_by_all(folder: Path) -> None:
    folder.chmod(0o777)


def sticky(folder: Path) -> None:
    folder.chmod(0o1777)


def writable_by_the_group(folder: Path) -> None:
    folder.chmod(0o770)


def a_link(folder: Path) -> None:
    folder.rename(folder.with_name("real"))
    folder.symlink_to(folder.with_name("real"))


def below_a_folder_of_all(folder: Path) -> None:
    folder.parent.chmod(0o777)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        pytest.param(of_a_stranger, f"belongs to user {STRANGER}", marks=as_root),
        (writable_by_all, "others can write to .*0777"),
        (sticky, "others can write to .*1777"),
        (writable_by_the_group, "others can write to .*0770"),
        (a_link, "is a symbolic link"),
        (below_a_folder_of_all, "others can write to .*above .*0777"),
    ],
)
def test_a_folder_that_others_can_write_to_is_not_used(
    change, why, source, in_the_open, monkeypatch, elsewhere, caplog
):
    folder = in_the_open / "above it" / "cache"
    monkeypatch.setenv(cache_folders.VARIABLE, str(folder))
    plant(source, folder)
    folder.parent.chmod(0o755)
    change(folder)
    with caplog.at_level(logging.WARNING):
        assert build.load(source).answer() == 42
    assert compiled_in(elsewhere)
    assert f"is kept in {elsewhere}" in caplog.text
    assert re.search(why, caplog.text)


def test_below_a_folder_that_only_we_can_enter_modes_do_not_matter(source, tmp_path, monkeypatch):
    monkeypatch.setenv(cache_folders.VARIABLE, str(tmp_path / "above" / "cache"))
    tmp_path.chmod(0o700)
    (tmp_path / "above").mkdir()
    (tmp_path / "above").chmod(0o777)
    assert build.load(source).answer() == 42
    assert compiled_in(tmp_path / "above" / "cache")


def test_no_umask_lets_others_write(source, cache):
    before = os.umask(0)
    try:
        assert build.load(source).answer() == 42
    finally:
        os.umask(before)
    (made,) = compiled_in(cache)
    assert [oct(stat.S_IMODE(path.stat().st_mode)) for path in (cache, made)] == ["0o700"] * 2


def test_a_full_disk_in_the_cache_folder_costs_only_the_cache(
    source, cache, calls, elsewhere, monkeypatch, caplog
):
    monkeypatch.setenv("FULL", str(cache))
    for _ in range(2):
        assert build.load(source).answer() == 42
    assert len(compiled_in(elsewhere)) == 1 and not compiled_in(cache)
    assert f"{elsewhere}: noting-cc" not in caplog.text
    assert "No space left on device" in caplog.text
    # The second time, what is elsewhere is found.
    assert calls() <= 3


def test_a_cache_that_cannot_be_created_is_no_obstacle(source, tmp_path, monkeypatch, elsewhere):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv(cache_folders.VARIABLE, str(tmp_path / "file" / "cache"))
    assert build.load(source).answer() == 42
    assert compiled_in(elsewhere)


def test_the_cache_is_in_the_users_folder_unless_another_is_named(monkeypatch):
    monkeypatch.setenv("HOME", "/c")
    for value, expected in (("/a", "/a"), ("~/a", "/c/a")):
        monkeypatch.setenv(cache_folders.VARIABLE, value)
        assert cache_folders.cache_folder() == Path(expected)
    monkeypatch.delenv(cache_folders.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache_folders.cache_folder() == Path("/b/kvshift_megatron")
    for relative in ("", "b"):
        monkeypatch.setenv("XDG_CACHE_HOME", relative)
        assert cache_folders.cache_folder() == Path("/c/.cache/kvshift_megatron")


@pytest.mark.parametrize("named", [None, "~/cache"])
def test_without_a_home_directory_no_folder_is_named_after_the_tilde(
    named, source, tmp_path, monkeypatch, elsewhere
):
    # As Python answers for a user without HOME and without an entry among the users.
    monkeypatch.setattr(os.path, "expanduser", lambda path: path)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv(cache_folders.VARIABLE, raising=False)
    if named:
        monkeypatch.setenv(cache_folders.VARIABLE, named)
    monkeypatch.chdir(tmp_path)
    assert cache_folders.cache_folder() is None
    assert build.load(source).answer() == 42
    assert compiled_in(elsewhere) and not Path("~").exists()
