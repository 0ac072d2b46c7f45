"""Read JSON that somebody else wrote: the message of every fault names the file."""

import json
from pathlib import Path
from typing import Any

_DEEPEST = 64  # levels; a model's files have fewer than ten


def read_json(file: Path) -> dict:
    """Read a JSON object from a file.

    Raises:
        ValueError: The file is missing or does not hold a JSON object; the message names it.
    """
    try:
        content = parse_json(file.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing") from error
    except ValueError as error:
        raise ValueError(f"{file} is not valid JSON: {error}") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} must hold a JSON object")
    return content


def parse_json(text: str | bytes) -> Any:
    """Return the content of a JSON text in which no object names anything twice.

    Raises:
        ValueError: It is no such text, or nested too deeply to be a model's.
    """
    try:
        content = json.loads(text, object_pairs_hook=_unique)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [content]
    for _ in range(_DEEPEST):
        level = [item for value in level for item in _items(value)]
        if not level:
            return content
    raise ValueError("it is nested too deeply")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"it names {next(n for n in names if names.count(n) > 1)!r} twice")
    return found


def _items(value: Any) -> list:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []
