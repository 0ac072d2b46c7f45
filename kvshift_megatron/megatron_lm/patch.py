"""Applies this project's patches to a Megatron-LM, checks them, or takes them back.

    kvshift-patch apply|check|revert --megatron-path CHECKOUT

CHECKOUT is the folder that holds `megatron/`: a checkout of Megatron-LM at one of the tags that
`patches/` has a folder for, or, for 0.19, the site-packages of an installed megatron-core. Only
files that are as released, but for these patches, are touched; all are written, or none.
"""

import argparse
import hashlib
import itertools
import os
import re
import shutil
import subprocess
import sys
import tempfile
import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PATCHES = Path(__file__).with_name("patches")


class Refused(Exception):
    """What the user has to put right, in one sentence."""


@dataclass(frozen=True)
class PatchSet:
    """One folder of `patches/`.

    Args:
        name: the tag of Megatron-LM that the patches were made from.
        patches: the patch files, in the order of their numbers.
        unpatched: path -> SHA-256 of every file that they touch, as released.
    """

    name: str
    patches: tuple[Path, ...]
    unpatched: dict[str, str]

    def touching(self, path: str) -> tuple[Path, ...]:
        """The patches that change `path`."""
        line = f"+++ b/{path}\n"
        return tuple(patch for patch in self.patches if line in patch.read_text())


@dataclass(frozen=True)
class State:
    """What one file is now.

    Args:
        content: its bytes.
        released: its bytes without the patches; None if it differs from the release in other ways.
        applied: the patches that it has.
    """

    content: bytes
    released: bytes | None
    applied: tuple[Path, ...] = ()


def main(argv: Sequence[str] | None = None, patches: Path = PATCHES) -> int:
    """Runs the command line and answers the exit code: 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(prog="kvshift-patch", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["apply", "check", "revert"])
    parser.add_argument(
        "--megatron-path",
        type=Path,
        required=True,
        metavar="CHECKOUT",
        help="The folder that holds `megatron/`.",
    )
    options = parser.parse_args(argv)
    try:
        return run(options.action, options.megatron_path, patches)
    except Refused as refusal:
        print(f"kvshift-patch: {refusal}", file=sys.stderr)
        return 1


def run(action: str, root: Path, patches: Path = PATCHES) -> int:
    """Does one action and answers the exit code.

    Raises:
        Refused: nothing was changed; the message says why.
    """
    version = read_version(root)
    chosen = find_set(version, patches)
    print(f"megatron-core {version} in {root}: patches/{chosen.name}")
    states = {path: state_of(root, path, chosen) for path in chosen.unpatched}
    if action == "check":
        return report(states, chosen)
    changed = [path for path, state in states.items() if state.released is None]
    if changed:
        raise Refused(
            f"{', '.join(changed)}: not as megatron-core {version} has it, even without these "
            f"patches, so that nothing was {_PAST[action]}: restore it, or put the patch in by hand"
        )
    target = {path: state.released for path, state in states.items()}
    if action == "apply":
        for patch in chosen.patches:
            target = git_apply(target, patch)
    new = {path: data for path, data in target.items() if data != states[path].content}
    replace_files(root, new)
    for path in new:
        print(f"  {_PAST[action]}: {path}")
    if not new:
        print("  nothing to do: " + _ALREADY[action])
    return 0


_PAST = {"apply": "applied", "revert": "reverted"}
_ALREADY = {"apply": "every patch is applied already", "revert": "no patch is applied"}


def read_version(root: Path) -> str:
    """The version that `megatron/core/package_info.py` states, without importing it."""
    file = root / "megatron" / "core" / "package_info.py"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(
            f"{root} holds no megatron/core/package_info.py: give --megatron-path the folder that "
            "holds `megatron/`"
        ) from error
    parts = [re.search(rf"^{name} = (\d+)", text, re.M) for name in ("MAJOR", "MINOR", "PATCH")]
    if None in parts:
        raise Refused(f"{file} states no version")
    pre = re.search(r"^PRE_RELEASE = ['\"](.*)['\"]", text, re.M)
    return ".".join(part[1] for part in parts) + (pre[1] if pre else "")


def find_set(version: str, patches: Path = PATCHES) -> PatchSet:
    """The patches for `version`."""
    known = []
    for manifest in sorted(patches.glob("*/manifest.toml")):
        values = tomllib.loads(manifest.read_text(encoding="utf-8"))
        if version in values["versions"]:
            folder = manifest.parent
            return PatchSet(folder.name, tuple(sorted(folder.glob("*.patch"))), values["unpatched"])
        known += values["versions"]
    raise Refused(
        f"megatron-core {version} has no patches; they are made for {', '.join(known) or 'nothing'}"
    )


def state_of(root: Path, path: str, chosen: PatchSet) -> State:
    """Whether a file is as released, but for which patches."""
    file = root / path
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        where = "" if "/" in path else ", and a wheel has only part of that repository"
        raise Refused(
            f"{file} does not exist: these patches need a checkout of Megatron-LM at "
            f"{chosen.name}{where}"
        ) from error
    except OSError as error:
        raise Refused(f"{file} cannot be read: {error.strerror}") from error
    touching = chosen.touching(path)
    for count in range(len(touching) + 1):
        for applied in itertools.combinations(touching, count):
            released = _without(content, path, applied)
            digest = hashlib.sha256(released or b"").hexdigest()
            if digest == chosen.unpatched[path]:
                return State(content, released, applied)
    return State(content, None)


def _without(content: bytes, path: str, applied: Sequence[Path]) -> bytes | None:
    for patch in reversed(applied):
        try:
            content = git_apply({path: content}, patch, "--reverse", f"--include={path}")[path]
        except Refused:
            return None
    return content


def report(states: dict[str, State], chosen: PatchSet) -> int:
    """Prints what every patch and file is; 0 if all are applied, or none is."""
    seen = set()
    for path, state in states.items():
        if state.released is None:
            seen.add("dirty")
            print(f"  dirty        {path}: not as released, even without these patches")
            continue
        for patch in chosen.touching(path):
            word = "applied" if patch in state.applied else "not applied"
            seen.add(word)
            print(f"  {word:12} {patch.name}: {path}")
    if len(seen) > 1 or "dirty" in seen:
        raise Refused("neither as released nor fully patched; see the list")
    return 0


def git_apply(files: dict[str, bytes], patch: Path, *options: str) -> dict[str, bytes]:
    """The contents of `files` after `git apply` of one patch, in a folder of their own.

    Raises:
        Refused: the patch does not apply, or there is no git.
    """
    with tempfile.TemporaryDirectory() as folder:
        copies = {path: Path(folder, path) for path in files}
        for path, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(files[path])
        # No repository or setting of the user's may have a say in how the patch is applied.
        environment = {name: os.environ[name] for name in os.environ if name[:4] != "GIT_"}
        environment["GIT_CEILING_DIRECTORIES"] = str(Path(folder).resolve().parent)
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", "apply", "--whitespace=nowarn", *options, str(patch.resolve())]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise Refused("git is needed to apply patches, and was not found") from error
        if done.returncode:
            why = done.stderr.strip().splitlines()
            raise Refused(f"{patch.name} does not apply: {why[0] if why else 'git says no more'}")
        return {path: copy.read_bytes() for path, copy in copies.items()}


def replace_files(root: Path, new: dict[str, bytes]) -> None:
    """Gives files new contents, all or none; their modes stay.

    By rename, so that nobody reads half a file, and hard links (of uv's cache, say) stay as
    they are.

    Raises:
        Refused: a file could not be written, and all are what they were.
    """
    staged, saved, replaced = {}, {}, []
    try:
        for path, data in new.items():
            file = (root / path).resolve()
            # Both before the first rename: from there on nothing but renaming can fail.
            saved[file] = _stage(file, file.read_bytes())
            staged[file] = _stage(file, data)
        for file, copy in staged.items():
            os.replace(copy, file)
            replaced.append(file)
    except BaseException as error:
        for done in replaced:
            os.replace(saved[done], done)
        if not isinstance(error, OSError):
            raise
        raise Refused(f"{file} cannot be written ({error.strerror}): nothing changed") from error
    finally:
        for copy in (*staged.values(), *saved.values()):
            copy.unlink(missing_ok=True)


def _stage(file: Path, data: bytes) -> Path:
    """A file beside `file`, with its mode and the new contents."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    shutil.copymode(file, name)
    return Path(name)


if __name__ == "__main__":
    sys.exit(main())
