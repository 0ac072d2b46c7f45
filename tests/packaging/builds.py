"""Build the sdist and the wheel, and install the wheel out of reach of the checkout."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.support import releases
from tests.support.launch import PROJECT

_TIMEOUT = 600  # seconds for one command; the longest takes 30 alone on two cores


def tracked_files(root: Path = PROJECT) -> list[str]:
    """Return the repository's files, including links and new files that git does not ignore."""
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [name for name in listed.split("\0") if name and os.path.lexists(root / name)]


def copy_tracked(target: Path) -> Path:
    """Copy the working tree without what builds, tests and environments leave in it."""
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, target / name, follow_symlinks=False)
    return target


def build(source: Path, target: Path) -> tuple[Path, Path]:
    """Build the sdist of a source tree, and the wheel from this sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    return sdist, wheel


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the wheel, and with all other packages of this Python.

    Args:
        folder: The environment's folder.
        home: Working directory of commands, empty at first.
    """

    folder: Path
    home: Path

    def run(self, *command: str | Path, status: int = 0) -> str:
        """Run a command of the environment, check its exit status, and return its output."""
        # Without variables that lead to a checkout, and with an empty cache.
        inherited = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "KVSHIFT"))}
        given = {"KVSHIFT_CPU": "1", "KVSHIFT_CACHE_DIR": str(self.home / "cache")}
        given |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONWARNINGS": "ignore"}
        done = subprocess.run(
            [self.folder / "bin" / command[0], *command[1:]],
            cwd=self.home,
            env={**inherited, **given},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=_TIMEOUT,
        )
        assert done.returncode == status, f"{command}: {done.returncode}\n{done.stdout[-4000:]}"
        return done.stdout

    def python(self, program: str, *words: str | Path) -> str:
        """Run `python -c PROGRAM WORDS` likewise."""
        return self.run("python", "-c", program, *words)


def install(wheel: Path, folder: Path) -> Installation:
    """Create an environment and install a wheel in it."""
    venv.create(folder, with_pip=True)
    installation = Installation(folder, folder.with_name("home"))
    installation.home.mkdir()
    installation.run("python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install",
                     "--no-deps", "--no-index", wheel)  # fmt: skip
    # Added by a .pth file: Python does not read those folders' own .pth files then, one of which
    # would lead to this checkout.
    megatron = Path(releases.imported_from()[0]).parents[2]
    shared = dict.fromkeys([megatron, *map(sysconfig.get_path, ("purelib", "platlib"))])
    packages = installation.python("import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(packages.strip(), "shared.pth").write_text("".join(f"{path}\n" for path in shared))
    return installation
