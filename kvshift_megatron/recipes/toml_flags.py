"""Megatron flags in TOML tables, without the dashes: how they are found, read and written out."""

import tomllib
from pathlib import Path

Flags = dict[str, object]


def find(name: str, directory: Path, setting: str) -> Path:
    """The TOML file that the user means: a name in `directory`, or a path.

    Raises:
        ValueError: there is no such file; the message begins with `setting`.
    """
    path = directory / f"{name}.toml"
    if not path.is_file():
        path = Path(name)
    if not path.is_file():
        known = ", ".join(sorted(p.stem for p in directory.glob("*.toml")))
        raise ValueError(f"{setting} {name}: neither one of {known} nor a file")
    return path


def read(path: Path) -> dict:
    """The file's tables.

    Raises:
        ValueError: naming the file, if it is not TOML.
    """
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"{path.name}: {error}") from error


def option(name: str, value: object) -> list[str]:
    """One flag's words: true is a bare flag, false leaves it out, a list is spread."""
    if value is False:
        return []
    values = value if isinstance(value, list) else [] if value is True else [value]
    return [f"--{name}", *map(str, values)]


def command_line(flags: Flags) -> list[str]:
    """All words in the table's order."""
    return [word for name, value in flags.items() for word in option(name, value)]
