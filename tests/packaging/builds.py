"""Builds the sdist and the wheel, and installs the wheel where no checkout is in reach."""

import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from dataclasses import dataclass
from pathlib import Path

from tests.support.launch import PROJECT

_TIMEOUT = 600  # seconds for one command; the longest takes 30 alone on two cores


def tracked_files(root: Path = PROJECT) -> list[str]:
    """The repository's files, new ones that git does not ignore too; a link is one of them."""
    listed = subprocess.run(
        ["git", "-C", root, "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return [name for name in listed.split("\0") if name and os.path.lexists(root / name)]


def copy_tracked(target: Path) -> Path:
    """A copy of the working tree without what builds, tests and environments leave in it."""
    for name in tracked_files():
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(PROJECT / name, target / name, follow_symlinks=False)
    return target


def build(source: Path, target: Path) -> tuple[Path, Path]:
    """The sdist of a source tree, and the wheel that is built from this sdist."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", target, source]
    done = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
    assert done.returncode == 0, (done.stdout + done.stderr)[-3000:]
    (sdist,), (wheel,) = target.glob("*.tar.gz"), target.glob("*.whl")
    return sdist, wheel


@dataclass(frozen=True)
class Installation:
    """A virtual environment with the wheel and, of everything else, what this Python has.

    Args:
        folder: of the environment.
        home: an empty directory, where commands run.
    """

    folder: Path
    home: Path

    def run(self, *command: str | Path, status: int = 0) -> str:
        """What a command of the environment says, standard error too, after its exit status is
        what it should be.
        """
        # None of the variables that lead to a checkout, nor a cache that this machine has.
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
        """Likewise, of `python -c PROGRAM WORDS`."""
        return self.run("python", "-c", program, *words)


def install(wheel: Path, folder: Path) -> Installation:
    """A new environment with a wheel in it."""
    venv.create(folder, with_pip=True)
    installation = Installation(folder, folder.with_name("home"))
    installation.home.mkdir()
    installation.run("python", "-m", "pip", "--quiet", "--disable-pip-version-check", "install",
                     "--no-deps", "--no-index", wheel)  # fmt: skip
    # A line that names a folder does not have that folder's own .pth files read, one of which
    # would lead to this checkout.
    shared = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}
    packages = installation.python("import sysconfig; print(sysconfig.get_path('purelib'))")
    Path(packages.strip(), "shared.pth").write_text("".join(f"{path}\n" for path in sorted(shared)))
    return installation
