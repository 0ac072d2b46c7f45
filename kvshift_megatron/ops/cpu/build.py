"""Compile a C file for this machine once, and keep the result where only this user can write.

Machines may share the home directory that holds the cache, and many ranks may start at once. So a
file's name depends on all that it was built from and for, it is renamed into place when complete,
and one process compiles while the others wait. They wait for a lock that the system releases when
its holder dies, and not for longer than a compilation may take.
"""

import ctypes
import functools
import hashlib
import logging
import os
import platform
import shlex
import shutil
import stat
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from kvshift_megatron.ops.cpu import cache_folders
from kvshift_megatron.ops.cpu.turns import BuildError, TooSlowError, turn
from kvshift_megatron.utils.trusted_paths import (
    make_private_folder,
    why_not_ours,
    why_not_trusted,
)

logger = logging.getLogger(__name__)

_SECONDS = 120
_NATIVE = {"x86_64": "-march=native", "aarch64": "-mcpu=native"}


def load(source: Path) -> ctypes.CDLL:
    """Compile and load `source`, or load it from a cache if an undamaged file of ours is there.

    Raises:
        BuildError: no compiler is found, it fails, or its output cannot be kept and loaded in any
            folder of `cache_folders.candidates`.
    """
    compiler = find_compiler()
    command = [*compiler, *_flags()]
    try:
        made_from = [source.read_text(), *command, _version(compiler), *_machine()]
    except OSError as error:
        raise BuildError(f"{source.name} cannot be read: {error}") from error
    key = hashlib.sha256("\0".join(made_from).encode()).hexdigest()[:24]
    first: Exception | None = None
    for folder in cache_folders.candidates():
        try:
            library = _load_from(folder, f"{source.stem}-{key}.so", command, source)
        except TooSlowError:
            # Another folder would not make the compiler faster.
            raise
        except (OSError, BuildError) as error:
            # Full, not writable, without execution, or not ours.
            first = first or error
            continue
        if first:
            logger.warning("kvshift_megatron: %s is kept in %s: %s", source.name, folder, first)
        return library
    if isinstance(first, BuildError):
        raise first
    raise BuildError(
        f"{source.name} cannot be compiled and loaded: {first or 'there is no folder for it'}"
    ) from first


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


def _load_from(folder: Path, name: str, command: Sequence[str], source: Path) -> ctypes.CDLL:
    make_private_folder(folder)
    if reason := why_not_trusted(folder):
        raise PermissionError(f"{reason}, and what lies there would be run")
    path = folder / name
    if not _is_ours_and_whole(path):
        with turn(folder / f".{name}.lock", _SECONDS):
            if not _is_ours_and_whole(path):
                with tempfile.TemporaryDirectory(prefix=".building-", dir=folder) as building:
                    os.replace(_compile(command, source, Path(building) / name), path)
    # The full path: the loader would search its own folders for a bare name.
    return ctypes.CDLL(str(path.resolve()))


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


def _run(command: Sequence[str], **environment: str) -> subprocess.CompletedProcess[str]:
    # Messages in English, for the search for "error: " below.
    environment = {**os.environ, "LC_ALL": "C", **environment}
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
        raise TooSlowError(f"{shlex.join(command[:1])} took more than {_SECONDS} s") from None
    except OSError as error:
        raise BuildError(f"{shlex.join(command[:1])} cannot be run: {error}") from error
    if result.returncode:
        lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
        # The linker says why in a line of its own, above GCC's error.
        errors = (x for x in lines if "error: " in x and not x.startswith("collect2: "))
        said = next(errors, (lines or [""])[0])
        raise BuildError(
            f"{shlex.join(command[:1])} failed with exit code {result.returncode}: {said[:300]}"
        )
    return result


def _compile(command: Sequence[str], source: Path, target: Path) -> Path:
    # The compiler's own temporary files too: another folder may be full, or others may read it.
    _run([*command, "-o", str(target), str(source)], TMPDIR=str(target.parent))
    made = target.read_bytes()
    with target.open("ab") as file:
        # The loader does not read what follows the last section.
        file.write(hashlib.sha256(made).digest())
        file.flush()
        os.fsync(file.fileno())
    target.chmod(0o700)  # whatever the umask is
    return target


def _is_ours_and_whole(path: Path) -> bool:
    """Whether it is no link, nobody else could write to it, and it ends in its own checksum.

    A truncated file would crash the loader.
    """
    try:
        with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
            found = os.fstat(file.fileno())
            if not stat.S_ISREG(found.st_mode) or why_not_ours(path, found):
                return False
            content = file.read()
    except OSError:
        return False
    return hashlib.sha256(content[:-32]).digest() == content[-32:]
