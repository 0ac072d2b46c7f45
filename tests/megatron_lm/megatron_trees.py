"""Make folders that look like a Megatron-LM to kvshift-patch."""

import hashlib
import importlib.util
import re
import shutil
import subprocess
import tomllib
from pathlib import Path

from kvshift_megatron.megatron_lm import patch as tool

PROJECT = Path(__file__).resolve().parents[2]
PATCHES = PROJECT / "patches"
TAGS = sorted(folder.name for folder in PATCHES.iterdir() if folder.is_dir())

_PACKAGE_INFO = "megatron/core/package_info.py"


def installed_root() -> Path:
    """Return the folder that holds the installed `megatron/`."""
    return Path(importlib.util.find_spec("megatron.core").origin).parents[2]


def hunks(patch: Path, path: str) -> list[tuple[int, list[str]]]:
    """Return a patch's hunks for one file: (first line number before, lines with their marks)."""
    found, current = [], None
    for line in patch.read_text().splitlines():
        if line.startswith("diff --git "):
            current = None
        elif line.startswith("+++ b/"):
            current = line.removeprefix("+++ b/")
        elif current == path and line.startswith("@@"):
            found.append((int(re.match(r"@@ -(\d+)", line)[1]), []))
        elif current == path:
            found[-1][1].append(line)
    return found


def synthesize(file: Path, patches: list[Path], path: str) -> None:
    """Write a file that the patches apply to: their context where they expect it, and filler."""
    lines = {}
    for patch in patches:
        for start, marked in hunks(patch, path):
            before = [line[1:] for line in marked if not line.startswith("+")]
            lines |= {start + i: line for i, line in enumerate(before)}
    text = [lines.get(i, f"# filler {i}") for i in range(1, max(lines) + 10)]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(text) + "\n")


def installed_tree(folder: Path) -> tuple[Path, Path]:
    """Copy what the installed megatron-core has of the patched files, and synthesize the rest.

    Only the repository of Megatron-LM has the rest.

    Returns:
        The folder, and the patches for it with a manifest that knows the synthesized files.
    """
    root, source = folder / "site", installed_root()
    _copy(source, root, _PACKAGE_INFO)
    tag = tool.find_set(tool.read_version(root)).name
    return root, _complete(tag, folder, root, source)


def synthetic_repository(tag: str, folder: Path) -> tuple[Path, Path]:
    """Make a Git repository with synthesized files; return it and the patches for it."""
    root = folder / "repository"
    version = tomllib.loads((PATCHES / tag / "manifest.toml").read_text())["versions"][0]
    write_version(root, version)
    patches = _complete(tag, folder, root, None)
    git(root, "init", "--quiet")
    git(root, "config", "core.autocrlf", "false")
    git(root, "add", "--all")
    git(root, "-c", "user.name=t", "-c", "user.email=t@localhost", "commit", "--quiet", "-m", "t")
    return root, patches


def git(root: Path, *arguments: str) -> str:
    """Return the standard output of a git command that must succeed."""
    done = subprocess.run(["git", "-C", root, *arguments], check=True, capture_output=True)
    return done.stdout.decode()


def write_version(root: Path, version: str) -> None:
    """Write a megatron/core/package_info.py that states `version` into a folder."""
    numbers = re.match(r"(\d+)\.(\d+)\.(\d+)(.*)", version).groups()
    names = ("MAJOR = {}", "MINOR = {}", "PATCH = {}", "PRE_RELEASE = '{}'")
    file = root / _PACKAGE_INFO
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("\n".join(name.format(value) for name, value in zip(names, numbers)) + "\n")


def _complete(tag, folder, root, source):
    patches = folder / "patches"
    shutil.copytree(PATCHES, patches)
    manifest = patches / tag / "manifest.toml"
    text = manifest.read_text()
    for path, digest in tomllib.loads(text)["unpatched"].items():
        if source is not None and (source / path).exists():
            _copy(source, root, path)
            continue
        synthesize(root / path, sorted((patches / tag).glob("*.patch")), path)
        text = text.replace(digest, hashlib.sha256((root / path).read_bytes()).hexdigest())
    manifest.write_text(text)
    return patches


def _copy(source, root, path):
    (root / path).parent.mkdir(parents=True, exist_ok=True)
    # Contents only, without the modes and links of the installation.
    shutil.copyfile(source / path, root / path)
