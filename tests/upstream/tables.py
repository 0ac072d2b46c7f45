"""The tables of kvshift_megatron/upstream, read from their rows."""

import importlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

from kvshift_megatron.cpu import devices, megatron_hooks, stand_ins
from kvshift_megatron.upstream.substitutions import Substitution
from tests.support.launch import PROJECT

FOLDER = PROJECT / "kvshift_megatron" / "upstream"
# Arguments of the tables' functions that cannot be placeholders.
_MODULES = {"devices": devices, "hooks": megatron_hooks, "stand_ins": stand_ins}


def functions(module: str) -> dict[str, Callable[..., list[Substitution]]]:
    """Return the public functions of one of the folder's modules that return rows."""
    loaded = importlib.import_module(f"kvshift_megatron.upstream.{module}")
    return {
        name: function
        for name, function in inspect.getmembers(loaded, inspect.isfunction)
        if function.__module__ == loaded.__name__
        and not name.startswith("_")
        and inspect.signature(function).return_annotation == list[Substitution]
    }


def rows() -> Iterator[tuple[str, Substitution]]:
    """Yield (file, relative to the package, row) for every table, with placeholder replacements."""
    for path in sorted(FOLDER.glob("*.py")):
        for function in functions(path.stem).values():
            for row in function(**placeholders(function)):
                yield f"upstream/{path.name}", row


def placeholders(function: Callable) -> dict[str, Any]:
    """Return arguments for one of a table's functions."""
    names = inspect.signature(function).parameters
    return {name: _MODULES.get(name, mock.MagicMock(name=name)) for name in names}
