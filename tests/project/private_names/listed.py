"""Read the list in docs/private_names.md, and look its names up in the installed libraries."""

import ast
import importlib
import importlib.metadata
import importlib.util
import inspect
import re
import textwrap
from dataclasses import dataclass
from typing import Any

from packaging.specifiers import SpecifierSet

from tests.support import releases
from tests.support.launch import PROJECT

LIST = PROJECT / "docs" / "private_names.md"
# Libraries that not every environment of `make test` has -> the environment that has them.
ELSEWHERE = {"megatron-bridge": "that of `make test-te`", "mlx-lm": "one on Linux and x86_64"}
_COLUMNS = ("library", "names", "used in", "why no public name serves", "releases", "noticed by")


@dataclass(frozen=True)
class Row:
    """One row of the table.

    Args:
        library: Its distribution; python for the standard library.
        names: Full dotted names.
        files: Files that use them, below the package.
        why: Why there is no public name.
        releases: Releases of the library that have them; empty for every supported one.
        tests: Tests that fail when a name or its meaning changes.
    """

    library: str
    names: tuple[str, ...]
    files: tuple[str, ...]
    why: str
    releases: str
    tests: tuple[str, ...]


def rows(text: str | None = None) -> list[Row]:
    """Return the table's rows.

    Raises:
        ValueError: A line of the table has wrong or empty cells.
    """
    found = []
    text = LIST.read_text() if text is None else text
    lines = [line for line in text.splitlines() if line.startswith("|")]
    for number, line in enumerate(lines):
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if number == 0:
            if tuple(cell.lower() for cell in cells) != _COLUMNS:
                raise ValueError(f"{LIST.name}: expected the columns {', '.join(_COLUMNS)}: {line}")
        elif number > 1:
            if len(cells) != len(_COLUMNS):
                raise ValueError(f"{LIST.name}: expected {len(_COLUMNS)} cells: {line}")
            library, names, files, why, which, tests = cells
            names, files, tests = (
                tuple(re.findall(r"`([^`]+)`", c)) for c in (names, files, tests)
            )
            if not (library and names and files and why and tests):
                raise ValueError(f"{LIST.name}: only `releases` may be empty: {line}")
            found.append(Row(library, names, files, why, which.strip("`"), tests))
    return found


def is_there(row: Row) -> bool | None:
    """Return whether the installed release should have the names; None without the library."""
    version = _version(row.library)
    if version is None:
        return None
    return SpecifierSet(row.releases, prereleases=True).contains(version)


def _version(library: str) -> str | None:
    if library == "python":
        return ".".join(map(str, importlib.import_module("sys").version_info[:3]))
    if library == "megatron-core":
        return releases.imported_version()  # not in metadata if PYTHONPATH leads to it
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def resolve(dotted: str) -> None:
    """Find a name in the installed library.

    Raises:
        LookupError: There is no such module or attribute, and no class in the name or its bases
            sets it on instances.
    """
    parts = dotted.split(".")
    for count in range(len(parts), 0, -1):
        module = ".".join(parts[:count])
        try:
            owner: Any = importlib.import_module(module)
        except ModuleNotFoundError as error:
            if not module.startswith(error.name or ""):
                raise
            continue
        for part in parts[count:]:
            if not hasattr(owner, part):
                if isinstance(owner, type) and part == parts[-1] and _sets(owner, part):
                    return
                raise LookupError(f"{dotted}: {owner!r} has no {part}")
            owner = getattr(owner, part)
        return
    raise LookupError(f"{dotted}: there is no module {parts[0]}")


def _sets(cls: type, attribute: str) -> bool:
    for base in cls.__mro__:
        try:
            text = textwrap.dedent(inspect.getsource(base))
        except (OSError, TypeError):  # written in C
            continue
        for node in ast.walk(ast.parse(text)):
            if (
                isinstance(node, ast.Attribute)
                and node.attr == attribute
                and isinstance(node.ctx, ast.Store)
                and ast.unparse(node.value) == "self"
            ):
                return True
    return False


def is_test(name: str) -> bool:
    """Return whether pytest finds a test of this name, as file::function."""
    file, _, function = name.partition("::")
    path = PROJECT / file
    if not re.fullmatch(r"tests/(\w+/)+test_\w+\.py", file) or not path.is_file():
        return False
    return function.startswith("test_") and any(
        isinstance(node, ast.FunctionDef) and node.name == function
        for node in ast.parse(path.read_text()).body
    )
