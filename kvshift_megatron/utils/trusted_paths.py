"""Whether another user could have put a file where it lies, or could exchange it.

For files that are executed or unpickled.
"""

import os
import stat
from pathlib import Path

_WRITABLE_BY_OTHERS = stat.S_IWGRP | stat.S_IWOTH
_ENTERED_BY_OTHERS = stat.S_IXGRP | stat.S_IXOTH


def why_not_trusted(path: Path) -> str | None:
    """Return a clause that says who else can change a file or folder; None if nobody can.

    It must be no symbolic link, belong to this user or root, and be writable by its owner alone
    (access lists show up as the group's permissions). The folders above it belong to this user or
    root and are writable by them alone too, or have the sticky bit; what lies below a folder that
    only this user can enter needs no further look.

    Raises:
        OSError: There is no such file, or it cannot be looked at.
    """
    path = Path(os.path.abspath(path))
    found = path.lstat()
    if stat.S_ISLNK(found.st_mode):
        return f"{path} is a symbolic link"
    if reason := why_not_ours(path, found):
        return reason
    # By the names given, as a link on the way may be another user's, and by the real ones.
    for way in dict.fromkeys((path, path.resolve())):
        for folder in list(way.parents)[::-1]:
            info = folder.lstat()
            if info.st_uid not in _owners():
                return f"{folder} belongs to user {info.st_uid}"
            if stat.S_ISLNK(info.st_mode):
                continue
            if info.st_uid == os.geteuid() and not info.st_mode & _ENTERED_BY_OTHERS:
                break
            if info.st_mode & _WRITABLE_BY_OTHERS and not info.st_mode & stat.S_ISVTX:
                return _is_writable(folder, info)
    return None


def why_not_ours(path: Path, found: os.stat_result) -> str | None:
    """Return a clause if the file belongs to another user or others can write to it."""
    if found.st_uid not in _owners():
        return f"{path} belongs to user {found.st_uid}"
    return _is_writable(path, found) if found.st_mode & _WRITABLE_BY_OTHERS else None


def make_private_folder(folder: Path) -> None:
    """Create a folder, and those above it that are missing, for this user alone.

    Raises:
        OSError: It cannot be created, or something else has its name.
    """
    for part in (*list(folder.parents)[::-1], folder):
        # Path.mkdir would create the folders above with the permissions of the umask.
        if not part.is_dir():
            part.mkdir(mode=0o700, exist_ok=True)


def _owners() -> tuple[int, int]:
    return os.geteuid(), 0


def _is_writable(path: Path, found: os.stat_result) -> str:
    return f"others can write to {path} (mode {stat.S_IMODE(found.st_mode):04o})"
