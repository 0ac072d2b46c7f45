"""Compile a C file for this machine once, and keep the result in the user's cache.

Machines may share the home directory that holds the cache, and many ranks may start at once. So a
file's name depends on all that it was built from and for, it is renamed into place when complete,
and no process waits for another: at worst, several ranks compile the same file.
"""

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

# The folder of compiled files; if not set, kvshift_megatron in the user's cache.
VARIABLE = "KVSHIFT_CACHE_DIR"
_SECONDS = 120
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}


class BuildError(RuntimeError):
    """Compiling or loading failed; the message is a clause that says why."""


def load(source: Path) -> ctypes.CDLL:
    """Compile and load `source`, or load it from the cache if an undamaged file is there.

    Raises:
        BuildError: no compiler is found, it fails, or its output cannot be loaded.
    """
    compiler = find_compiler()
    command = [*compiler, *_flags()]
    try:
        made_from = [source.read_text(), *command, _version(compiler), *_machine()]
        key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:24]
        folder, name = cache_folder(), f"{source.stem}-{key}.so"
        try:
            if not _is_whole(folder / name):
                folder.mkdir(mode=0o700, parents=True, exist_ok=True)
                with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as building:
                    os.replace(_compile(command, source, Path(building) / name), folder / name)
            return _open(folder / name)
        except OSError:
            # The cache is not writable or forbids execution: compile for this process alone.
            with tempfile.TemporaryDirectory(prefix="kvshift-") as building:
                return _open(_compile(command, source, Path(building) / name))
    except OSError as error:
        raise BuildError(f"{source.name} cannot be compiled and loaded: {error}") from error


def find_compiler() -> list[str]:
    """Return the C compiler's command: CC of the environment, else cc, gcc or clang on PATH."""
    asked = shlex.split(os.environ.get("CC", ""))
    if asked and shutil.which(asked[0]) is None:
        raise BuildError(f"CC={os.environ['CC']!r} is not a program on this machine")
    names = [asked] if asked else [[name] for name in ("cc", "gcc", "clang")]
    for command in names:
        if shutil.which(command[0]):
            return command
    raise BuildError("no C compiler is on PATH (cc, gcc or clang; or name one in CC)")


def cache_folder() -> Path:
    """Return KVSHIFT_CACHE_DIR, or kvshift_megatron in XDG_CACHE_HOME or ~/.cache."""
    if asked := os.environ.get(VARIABLE):
        return Path(asked)
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(base) / "kvshift_megatron"


def _flags() -> list[str]:
    # No contraction: products and sums round as in plain torch. -O2: the vectors are explicit.
    native = _NATIVE[platform.machine()]
    return ["-std=gnu11", "-O2", native, "-ffp-contract=off", "-fPIC", "-shared"]


def _version(compiler: Sequence[str]) -> str:
    return _run([*compiler, "--version"]).stdout.partition("\n")[0]


@functools.cache
def _machine() -> tuple[str, ...]:
    """Return what the compiled file also depends on: the processor and the C library."""
    try:
        lines = Path("/proc/cpuinfo").read_text().partition("\n\n")[0].splitlines()
    except OSError:
        lines = []
    names = ("model name", "flags", "Features", "CPU implementer", "CPU part")
    kept = [line for line in lines if line.partition(":")[0].strip() in names]
    return (platform.machine(), *platform.libc_ver(), *kept)


def _run(command: Sequence[str]) -> subprocess.CompletedProcess[str]:
    # Messages in English, for the search for "error: " below.
    environment = {**os.environ, "LC_ALL": "C"}
    try:
        result = subprocess.run(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        raise BuildError(f"{shlex.join(command[:1])} took more than {_SECONDS} s") from None
    except OSError as error:
        raise BuildError(f"{shlex.join(command[:1])} cannot be run: {error}") from error
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        said = next((line for line in lines if "error: " in line), (lines or [""])[0])
        raise BuildError(
            f"{shlex.join(command[:1])} failed with exit code {result.returncode}: {said[:300]}"
        )
    return result


def _compile(command: Sequence[str], source: Path, target: Path) -> Path:
    _run([*command, "-o", str(target), str(source)])
    made = target.read_bytes()
    with target.open("ab") as file:
        # The loader does not read what follows the last section.
        file.write(hashlib.sha256(made).digest())
        file.flush()
        os.fsync(file.fileno())
    return target


def _is_whole(path: Path) -> bool:
    """Whether the file ends in its own checksum: a truncated one would crash the loader."""
    try:
        content = path.read_bytes()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]


def _open(path: Path) -> ctypes.CDLL:
    # The full path: the loader would search its own folders for a bare name.
    return ctypes.CDLL(str(path.resolve()))
