"""Find and read TOML tables of Megatron flags (without dashes), and write them as command lines."""

import tomllib
from pathlib import Path
from typing import Any

Flags = dict[str, Any]


def find(name: str, directory: Path, setting: str) -> Path:
    """Return the TOML file that the user means by a name in `directory`, or by a path.

    Raises:
        ValueError: There is no such file; the message begins with `setting`.
    """
    path = directory / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in directory.glob("*.toml")))
        raise ValueError(f"{setting} {name}: neither one of {known} nor a file")
    return path


def read(path: Path) -> dict:
    """Return the file's tables.

    Raises:
        ValueError: The file is not TOML; the message names it.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error


def option(name: str, value: object) -> list[str]:
    """Return one flag's words: true gives a bare flag, false no flag, a list several values."""
    if value is False:
        return []
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{name}", *map(str, values)]


def command_line(flags: Flags) -> list[str]:
    """Return the words of all flags, in the table's order."""
    return [word for name, value in flags.items() for word in option(name, value)]
