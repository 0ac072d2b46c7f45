"""Apply this project's patches to a Megatron-LM, check them, or revert them.

    kvshift-patch apply|check|revert --megatron-path CHECKOUT

CHECKOUT is the folder that holds `megatron/`: a checkout of Megatron-LM at one of the tags, or the
commit of its main branch, that `patches/` has a folder for, or, for 0.19, the site-packages of an
installed megatron-core. Only files that are as released, apart from these patches, are touched; all
are written, or none.
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
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from kvshift_megatron.utils.output_paths import check_outputs

PATCHES = Path(__file__).with_name("patches")


class Refused(Exception):
    """The user has to fix something first; the message is one sentence."""


@dataclass(frozen=True)
class PatchSet:
    """One folder of `patches/`.

    Attributes:
        name: The tag of Megatron-LM that the patches were made from, or main and a commit.
        patches: The patch files, in the order of their numbers.
        unpatched: Path -> SHA-256, as released, of every file that they touch.
        commit: The commit that they were made from, if it is no release.
    """

    name: str
    patches: tuple[Path, ...]
    unpatched: dict[str, str]
    commit: str | None = None

    def touching(self, path: str) -> tuple[Path, ...]:
        """Return the patches that change `path`."""
        line = f"+++ b/{path}\n"
        return tuple(patch for patch in self.patches if line in patch.read_text())


@dataclass(frozen=True)
class State:
    """The state of one file.

    Attributes:
        content: Its bytes.
        released: Its bytes without the patches; None if it differs from the release in other ways.
        applied: The patches that it has.
    """

    content: bytes
    released: bytes | None
    applied: tuple[Path, ...] = ()


def main(argv: Sequence[str] | None = None, patches: Path = PATCHES) -> int:
    """Run the command line and return the exit code: 1 with a sentence on standard error."""
    parser = argparse.ArgumentParser(prog="kvshift-patch", description=__doc__.partition("\n")[0])
    parser.add_argument("action", choices=["apply", "check", "revert"])
    parser.add_argument(
        "--megatron-path",
        type=Path,
        required=True,
        metavar="CHECKOUT",
        help="the folder that holds `megatron/`",
    )
    options = parser.parse_args(argv)
    try:
        return run(options.action, options.megatron_path, patches)
    except Refused as refusal:
        print(f"kvshift-patch: {refusal}", file=sys.stderr)
        return 1


def run(action: str, root: Path, patches: Path = PATCHES) -> int:
    """Do one action and return the exit code.

    Raises:
        Refused: Nothing was changed; the message says why.
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
            f"{', '.join(changed)}: differs from {_origin(version, chosen)} by more than these "
            f"patches, so nothing was {_PAST[action]}: restore it, or apply the patch by hand"
        )
    target = {p: state.released for p, state in states.items() if state.released is not None}
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


def _origin(version: str, chosen: PatchSet) -> str:
    if chosen.commit is None:
        return f"megatron-core {version}"
    return f"commit {chosen.commit} of Megatron-LM, which is what these patches are made for,"


def read_version(root: Path) -> str:
    """Return the version that `megatron/core/package_info.py` states, without importing it."""
    file = root / "megatron" / "core" / "package_info.py"
    try:
        text = file.read_text(encoding="utf-8")
    except OSError as error:
        raise Refused(
            f"{root} holds no megatron/core/package_info.py: give --megatron-path the folder that "
            "holds `megatron/`"
        ) from error
    names = ("MAJOR", "MINOR", "PATCH")
    parts = [match[1] for name in names if (match := re.search(rf"^{name} = (\d+)", text, re.M))]
    if len(parts) < len(names):
        raise Refused(f"{file} states no version: pass a released Megatron-LM")
    pre = re.search(r"^PRE_RELEASE = ['\"](.*)['\"]", text, re.M)
    return ".".join(parts) + (pre[1] if pre else "")


def find_set(version: str, patches: Path = PATCHES) -> PatchSet:
    """Return the patches for `version`."""
    known = []
    for manifest in sorted(patches.glob("*/manifest.toml")):
        values = tomllib.loads(manifest.read_text(encoding="utf-8"))
        if version in values["versions"]:
            folder = manifest.parent
            found = tuple(sorted(folder.glob("*.patch")))
            return PatchSet(folder.name, found, values["unpatched"], values.get("commit"))
        known += values["versions"]
    raise Refused(
        f"megatron-core {version} has no patches; they exist for {', '.join(known) or 'no release'}"
    )


def state_of(root: Path, path: str, chosen: PatchSet) -> State:
    """Find out which patches a file has, and whether it is otherwise as released."""
    file = root / path
    try:
        content = file.read_bytes()
    except FileNotFoundError as error:
        why = "" if "/" in path else ", as a wheel has only part of that repository"
        raise Refused(
            f"{file} does not exist: these patches need a checkout of Megatron-LM at "
            f"{chosen.name}{why}"
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
    """Print the state of every patch and file; return 0 if all patches are applied, or none.

    Raises:
        Refused: Some patches are applied and others not, or a file differs in other ways.
    """
    seen = set()
    for path, state in states.items():
        if state.released is None:
            seen.add("dirty")
            print(f"  dirty        {path}: differs from the release by more than these patches")
            continue
        for patch in chosen.touching(path):
            word = "applied" if patch in state.applied else "not applied"
            seen.add(word)
            print(f"  {word:12} {patch.name}: {path}")
    if len(seen) > 1 or "dirty" in seen:
        raise Refused("neither as released nor fully patched: see the list above")
    return 0


def git_apply(files: dict[str, bytes], patch: Path, *options: str) -> dict[str, bytes]:
    """Return the contents of `files` after `git apply` of one patch, in a temporary folder.

    Raises:
        Refused: The patch does not apply, or there is no git.
    """
    with tempfile.TemporaryDirectory() as folder:
        copies = {path: Path(folder, path) for path in files}
        for path, copy in copies.items():
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(files[path])
        # No repository around the folder and no setting of the user's may change the result.
        environment = {name: os.environ[name] for name in os.environ if name[:4] != "GIT_"}
        environment["GIT_CEILING_DIRECTORIES"] = str(Path(folder).resolve().parent)
        environment |= {"GIT_CONFIG_GLOBAL": os.devnull, "GIT_CONFIG_NOSYSTEM": "1"}
        command = ["git", "apply", "--whitespace=nowarn", *options, str(patch.resolve())]
        try:
            done = subprocess.run(
                command, cwd=folder, env=environment, capture_output=True, text=True
            )
        except FileNotFoundError as error:
            raise Refused("git, which applies the patches, was not found: install it") from error
        if done.returncode:
            why = done.stderr.strip().splitlines()
            raise Refused(
                f"{patch.name} does not apply: {why[0] if why else 'git gives no reason'}"
            )
        return {path: copy.read_bytes() for path, copy in copies.items()}


def replace_files(root: Path, new: dict[str, bytes]) -> None:
    """Give files new contents, all or none; their modes stay.

    They are renamed into place, so that nobody reads half a file and hard links (for example to
    uv's cache) keep their contents.

    Raises:
        Refused: A file could not be written; all are as they were.
    """
    staged, saved, replaced = {}, {}, []
    _refuse_links_out(root, new)
    try:
        for path, data in new.items():
            file = (root / path).resolve()
            # Both copies exist before the first rename: after it, only a rename can fail.
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


def _refuse_links_out(root: Path, paths: Iterable[str]) -> None:
    """Raise Refused if a file is really somewhere else, where others may use it as released."""
    for path in paths:
        if not (file := (root / path).resolve()).is_relative_to(root.resolve()):
            raise Refused(
                f"{root / path} is a link to {file}, outside of {root}, so nothing was changed: "
                "replace the link by a copy, or pass the folder that it leads to"
            )
    try:
        check_outputs([root / path for path in paths], [PATCHES])
    except ValueError as error:
        raise Refused(str(error)) from error


def _stage(file: Path, data: bytes) -> Path:
    """Write a file beside `file`, with its mode and the new contents; return its path."""
    handle, name = tempfile.mkstemp(prefix=f".{file.name}.", dir=file.parent)
    with os.fdopen(handle, "wb") as stream:
        stream.write(data)
    shutil.copymode(file, name)
    return Path(name)


if __name__ == "__main__":
    sys.exit(main())
