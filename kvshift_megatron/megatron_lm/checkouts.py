"""Which release a checkout of Megatron-LM is, and whether it is as released."""

import re
import subprocess
from collections.abc import Iterable
from pathlib import Path


class CheckoutError(ValueError):
    """The checkout cannot be used."""


def release_of(checkout: Path, known: Iterable[str]) -> str:
    """The version that a checkout of Megatron-LM is of, after making sure that it can be used.

    Args:
        checkout: the folder that holds `megatron/`.
        known: the series that can be used, such as 0.19.

    Raises:
        CheckoutError: no checkout of Megatron-LM, local modifications, or an unknown release.
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
            "restore these files, or pass another checkout"
        )
    parts = dict(re.findall(r"^(MAJOR|MINOR|PATCH|PRE_RELEASE) = (.+)$", info.read_text(), re.M))
    if not {"MAJOR", "MINOR", "PATCH"} <= parts.keys():
        raise CheckoutError(f"{info} names no version: pass a released Megatron-LM")
    version = "{MAJOR}.{MINOR}.{PATCH}".format(**parts) + parts.get("PRE_RELEASE", "").strip("'\"")
    if series(version) not in known:
        raise CheckoutError(
            f"{checkout} is of release {version}: this check knows {', '.join(known)}"
        )
    return version


def series(version: str) -> str:
    """0.19.2 -> 0.19"""
    return ".".join(version.split(".")[:2])


def git(checkout: Path, *command: str) -> str:
    """Standard output of a git command; CheckoutError where it fails."""
    try:
        done = subprocess.run(
            ["git", "-C", str(checkout), *command], capture_output=True, text=True, timeout=60
        )
    except FileNotFoundError as error:
        raise CheckoutError("git is not installed: it says whether a checkout is clean") from error
    if done.returncode != 0:
        raise CheckoutError(f"{checkout} is no git checkout: {done.stderr.strip()}")
    return done.stdout
