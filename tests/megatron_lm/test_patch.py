"""kvshift-patch: it changes all files or none, and reverts them to the byte."""

import os
import subprocess
import sys

import pytest

from kvshift_megatron.megatron_lm import patch as tool
from tests.megatron_lm import megatron_trees as trees


@pytest.fixture
def tree(tmp_path):
    """Return (folder, patches) of the installed megatron-core."""
    return trees.installed_tree(tmp_path)


@pytest.fixture(params=trees.TAGS)
def repository(request, tmp_path):
    """Return (folder, patches) of a temporary Git repository, for each tag."""
    return trees.synthetic_repository(request.param, tmp_path)


@pytest.fixture
def two_patches(tmp_path):
    """Return (folder, patches) with a file that two patches touch."""
    return trees.synthetic_repository("core_v0.17.1", tmp_path)


def run(action, tree):
    root, patches = tree
    return tool.main([action, "--megatron-path", str(root)], patches)


def contents(root):
    """Return every file's bytes and mode, without Git's own files."""
    files = (file for file in root.rglob("*") if file.is_file() and ".git" not in file.parts)
    return {str(file.relative_to(root)): (file.read_bytes(), file.stat().st_mode) for file in files}


def chosen_set(tree):
    root, patches = tree
    return tool.find_set(tool.read_version(root), patches)


def refusal(capsys):
    """Return the only sentence on standard error."""
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("kvshift-patch: ")
    return lines[0]


def test_round_trip_on_the_installed_megatron(tree, capsys):
    root, paths = tree[0], list(chosen_set(tree).unpatched)
    (root / paths[0]).chmod(0o444)
    (root / paths[1]).chmod(0o640)
    before = contents(root)

    assert run("check", tree) == 0
    words = capsys.readouterr().out
    assert words.count("  not applied ") == len(words.splitlines()) - 1

    assert run("apply", tree) == 0
    words = capsys.readouterr().out
    assert all(f"  applied: {path}\n" in words for path in paths)
    after = contents(root)
    assert after.keys() == before.keys()
    assert {path for path in after if after[path][0] != before[path][0]} == set(paths)
    assert all(after[path][1] == before[path][1] for path in after)

    assert run("check", tree) == 0
    words = capsys.readouterr().out
    assert words.count("  applied ") == len(words.splitlines()) - 1
    assert run("apply", tree) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(root) == after

    assert run("revert", tree) == 0
    words = capsys.readouterr().out
    assert all(f"  reverted: {path}\n" in words for path in paths)
    assert contents(root) == before
    assert run("revert", tree) == 0
    assert "nothing to do" in capsys.readouterr().out
    assert contents(root) == before


def test_it_does_what_git_apply_does(repository):
    root, _ = repository
    for patch in chosen_set(repository).patches:
        trees.git(root, "apply", "--check", str(patch))
        trees.git(root, "apply", str(patch))
    by_git = contents(root)
    trees.git(root, "checkout", "--quiet", ".")
    assert run("apply", repository) == 0
    assert contents(root) == by_git
    assert run("revert", repository) == 0
    assert trees.git(root, "status", "--porcelain") == ""


def test_a_surrounding_git_repository_changes_nothing(two_patches, tmp_path, monkeypatch):
    trees.git(tmp_path, "init", "--quiet")
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tool.tempfile, "tempdir", None)
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "nowhere"))
    monkeypatch.setenv("GIT_CONFIG_COUNT", "1")
    monkeypatch.setenv("GIT_CONFIG_KEY_0", "core.autocrlf")
    monkeypatch.setenv("GIT_CONFIG_VALUE_0", "true")
    before = contents(two_patches[0])
    assert run("apply", two_patches) == 0
    assert all(b"\r" not in data for data, _ in contents(two_patches[0]).values())
    assert run("revert", two_patches) == 0
    assert contents(two_patches[0]) == before


@pytest.mark.parametrize("version", ["0.16.1", "0.19.3", "0.21.0", "0.19.0rc1"])
def test_unknown_version_is_refused(tmp_path, version, capsys):
    trees.write_version(tmp_path, version)
    for action in ("apply", "check", "revert"):
        assert run(action, (tmp_path, trees.PATCHES)) == 1
        sentence = refusal(capsys)
        assert f"megatron-core {version} has no patches" in sentence
        assert all(known in sentence for known in ("0.17.1", "0.18.2", "0.19.2"))


def test_a_folder_without_megatron_is_refused(tmp_path, capsys):
    assert run("check", (tmp_path, trees.PATCHES)) == 1
    assert "the folder that holds `megatron/`" in refusal(capsys)


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize(
    "spoil",
    [
        lambda data: data + b"# mine\n",
        lambda data: data.replace(b"\n", b"\r\n"),
        lambda data: b"",
    ],
    ids=["a line more", "CRLF", "empty"],
)
@pytest.mark.parametrize("patched", [False, True])
def test_dirty_file_is_refused_and_nothing_written(tree, capsys, action, spoil, patched):
    root, paths = tree[0], list(chosen_set(tree).unpatched)
    if patched:
        assert run("apply", tree) == 0
    (root / paths[-1]).write_bytes(spoil((root / paths[-1]).read_bytes()))
    before = contents(root)
    capsys.readouterr()
    assert run(action, tree) == 1
    sentence = refusal(capsys)
    assert paths[-1] in sentence and not any(path in sentence for path in paths[:-1])
    assert run("check", tree) == 1
    assert f"  dirty        {paths[-1]}" in capsys.readouterr().out
    assert contents(root) == before


def test_missing_file_is_refused(tree, capsys):
    root, paths = tree[0], list(chosen_set(tree).unpatched)
    (root / paths[0]).unlink()
    before = contents(root)
    for action in ("apply", "check", "revert"):
        assert run(action, tree) == 1
        sentence = refusal(capsys)
        assert paths[0] in sentence and "need a checkout of Megatron-LM" in sentence
    # Only the repository has files at its top level; the wheels of 0.17 and 0.18 lack them.
    assert ("wheel" in sentence) == ("/" not in paths[0])
    assert contents(root) == before


def test_a_patch_that_does_not_apply_leaves_all_files_as_they_were(tree, capsys):
    folder, path = chosen_set(tree).patches[0].parent, list(chosen_set(tree).unpatched)[-1]
    hunk = "@@ -1,2 +1,2 @@\n-no such line\n+another\n nor this\n"
    (folder / "0009-bad.patch").write_text(
        f"diff --git a/{path} b/{path}\n--- a/{path}\n+++ b/{path}\n{hunk}"
    )
    before = contents(tree[0])
    assert run("apply", tree) == 1
    assert "0009-bad.patch does not apply" in refusal(capsys)
    assert contents(tree[0]) == before


@pytest.mark.parametrize("action", ["apply", "revert"])
@pytest.mark.parametrize("failing", [1, 2, 3])
def test_a_rename_that_fails_leaves_all_files_as_they_were(
    tree, capsys, monkeypatch, action, failing
):
    if action == "revert":
        assert run("apply", tree) == 0
    before = contents(tree[0])
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == failing:
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(tool.os, "replace", replace)
    capsys.readouterr()
    assert run(action, tree) == 1
    sentence = refusal(capsys)
    assert str(calls[failing - 1]) in sentence and "nothing changed" in sentence
    assert contents(tree[0]) == before


def test_a_folder_that_cannot_be_written_to(tree, capsys, monkeypatch):
    def mkstemp(**_):
        raise OSError(30, "Read-only file system")

    before = contents(tree[0])
    monkeypatch.setattr(tool.tempfile, "mkstemp", mkstemp)
    assert run("apply", tree) == 1
    assert "Read-only file system" in refusal(capsys)
    assert contents(tree[0]) == before


def test_an_interrupt_between_two_files_restores_the_first(tree, monkeypatch):
    real, calls = os.replace, []

    def replace(source, target):
        calls.append(target)
        if len(calls) == 2:
            raise KeyboardInterrupt
        real(source, target)

    before = contents(tree[0])
    monkeypatch.setattr(tool.os, "replace", replace)
    with pytest.raises(KeyboardInterrupt):
        run("apply", tree)
    assert contents(tree[0]) == before


def test_one_patch_or_file_by_hand_is_seen_and_completed(two_patches, capsys):
    root, _ = two_patches
    before = contents(root)
    assert run("apply", two_patches) == 0
    full = contents(root)
    for patch in chosen_set(two_patches).patches:
        trees.git(root, "checkout", "--quiet", ".")
        trees.git(root, "apply", str(patch))
        capsys.readouterr()
        assert run("check", two_patches) == 1
        words = capsys.readouterr().out
        assert f"  applied      {patch.name}: gpt_builders.py" in words
        assert words.count("  not applied  ") == (1 if patch.name.startswith("0001") else 3)
        assert run("apply", two_patches) == 0
        assert contents(root) == full
    trees.git(root, "checkout", "--quiet", "gpt_builders.py")
    assert run("revert", two_patches) == 0
    assert contents(root) == before


def test_hard_links_keep_their_contents(tree, tmp_path):
    path = next(iter(chosen_set(tree).unpatched))
    os.link(tree[0] / path, tmp_path / "cached")
    before = (tmp_path / "cached").read_bytes()
    assert run("apply", tree) == 0
    assert (tmp_path / "cached").read_bytes() == before != (tree[0] / path).read_bytes()


def test_a_link_to_another_installation_is_not_followed(tree, tmp_path, capsys):
    """As uv makes them with --link-mode symlink: the file is that of every environment."""
    path = next(iter(chosen_set(tree).unpatched))
    (tree[0] / path).rename(tmp_path / "cached")
    (tree[0] / path).symlink_to(tmp_path / "cached")
    before = contents(tmp_path)
    assert run("apply", tree) == 1
    assert f"{path} is a link to {tmp_path / 'cached'}, outside of " in refusal(capsys)
    assert contents(tmp_path) == before


def test_the_command_line(tmp_path):
    def command(*words):
        script = str(trees.PROJECT / "tools" / "patch_megatron.py")
        return subprocess.run([sys.executable, script, *words], capture_output=True, text=True)

    wrong = command("apply", "--megatron-path", str(tmp_path))
    assert wrong.returncode == 1 and wrong.stderr.count("\n") == 1 and not wrong.stdout
    right = command("check", "--megatron-path", str(trees.installed_root()))
    if (trees.installed_root() / "megatron" / "training" / "models" / "gpt.py").exists():
        assert right.returncode == 0, right.stderr
    else:  # the wheels of 0.17 and 0.18
        assert right.returncode == 1 and "gpt_builders.py does not exist" in right.stderr
    assert command("apply").returncode == 2


def test_another_commit_than_the_one_patched_is_told_which(tmp_path, capsys):
    """What calls itself 0.20.0 need not be the commit that the patches were made from."""
    (tag,) = (tag for tag in trees.TAGS if tag.startswith("main-"))
    root, patches = trees.synthetic_repository(tag, tmp_path)
    changed = root / "megatron" / "training" / "training.py"
    changed.write_text(changed.read_text() + "# of a later commit\n")
    before = contents(root)
    assert run("apply", (root, patches)) == 1
    sentence = refusal(capsys)
    assert "megatron/training/training.py: differs from commit d98e8a64" in sentence
    assert contents(root) == before
