"""Find out which release a checkout of Megatron-LM is, and whether it is unmodified."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path


class CheckoutError(ValueError):
    """The checkout cannot be used."""


def release_of(checkout: Path, known: Iterable[str]) -> str:
    """Return the version of a checkout of Megatron-LM, after checking that it can be used.

    Args:
        checkout: The folder that holds `megatron/`.
        known: The series that can be used, such as 0.19.

    Raises:
        CheckoutError: It is no checkout of Megatron-LM, is modified, or its release is unknown.
    """
    info = checkout / "megatron" / "core" / "package_info.py"
    for needed in (checkout / "pretrain_gpt.py", info):
        if not needed.is_file():
            raise CheckoutError(
                f"{checkout} holds no {needed.relative_to(checkout)}: pass a checkout of "
                "Megatron-LM to --megatron-path"
            )
    modified = git(checkout, "status", "--porcelain", "--untracked-files=no").splitlines()
    if modified:
        raise CheckoutError(
            f"{checkout} is modified ({', '.join(line[3:] for line in modified)}): "
            "restore these files or pass another checkout"
        )
    parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = (.+)$", info.read_text(), re.M))
    if not {"MAJOR", "MINOR", "PATCH"} <= parts.keys():
        raise CheckoutError(f"{info} names no version: pass a checkout of a released Megatron-LM")
    version = "{MAJOR}.{MINOR}.{PATCH}".format(**parts) + parts.get("PRE_RELEASE", "").strip("'\"")
    if series(version) not in known:
        raise CheckoutError(
            f"{checkout} is of release {version}: pass a checkout of {', '.join(known)}"
        )
    return version


def series(version: str) -> str:
    """Return the release series of a version: 0.19 for 0.19.2."""
    return ".".join(version.split(".")[:2])


def git(checkout: Path, *command: str) -> str:
    """Return the standard output of a git command.

    Raises:
        CheckoutError: The command fails, or git is not installed.
    """
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *command], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError as error:
        raise CheckoutError(
            "git is not installed: install it, as it says whether a checkout is modified"
        ) from error
    if done.returncode != 0:
        raise CheckoutError(f"{checkout} is no git checkout: {done.stderr.strip()}")
    return done.stdout
