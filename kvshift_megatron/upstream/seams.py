"""A seam: a function of Megatron that this package replaces or overrides, and what it relies on.

A seam is intact if the function still has the parameters that the replacement reads or passes on,
and its source still does what the replacement counts on.
"""

import ast
import inspect
import itertools
import textwrap
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

from kvshift_megatron.upstream.substitutions import Substitution, resolve


@dataclass(frozen=True)
class Seam:
    """One function, by its dotted name.

    Args:
        target: The dotted name.
        reason: What relies on it, in one sentence.
        takes: Names of its parameters in their order, without self; `*` stands for any number of
            others. "" for any parameters.
        uses: Names that its source uses, in the order of their first use.
        lacks: Names that its source must not use.
        releases: In which it exists; see Substitution.
    """

    target: str
    reason: str
    takes: str = ""
    uses: tuple[str, ...] = ()
    lacks: tuple[str, ...] = ()
    releases: str | None = None

    def applies(self) -> bool:
        """Return whether the installed release should have it."""
        return Substitution(self.target, self.reason, value=None, releases=self.releases).applies()

    def fault(self) -> str | None:
        """Return what has changed, as a clause; None if the seam is intact."""
        module, _, name = self.target.rpartition(".")
        try:
            found = getattr(resolve(module), name)
        except (ImportError, AttributeError):
            return "is gone"
        return _other_parameters(found, self.takes) or _other_source(found, self.uses, self.lacks)


def of_rows(rows: Iterable[Substitution]) -> list[Seam]:
    """Return the seams of a table: its rows in Megatron-Core and megatron.training."""
    return [
        Seam(row.target, row.reason, row.takes, releases=row.releases)
        for row in rows
        if row.library == "megatron" and not row.target.startswith("megatron.bridge.")
    ]


def _other_parameters(found: Any, takes: str) -> str | None:
    if not takes:
        return None
    try:
        parameters = inspect.signature(found).parameters
    except (TypeError, ValueError):
        return "is no function any more"
    names = [name for name in parameters if name not in ("self", "cls")]
    if _matches(names, takes.split()):
        return None
    return f"takes ({', '.join(names)}) and not ({takes.replace(' ', ', ')})"


def _matches(names: list[str], wanted: list[str]) -> bool:
    """Return whether a list of names is as wanted, where `*` stands for any number of names."""
    if not wanted:
        return not names
    if wanted[0] == "*":
        return any(_matches(names[skipped:], wanted[1:]) for skipped in range(len(names) + 1))
    return bool(names) and names[0] == wanted[0] and _matches(names[1:], wanted[1:])


def _other_source(
    found: Callable[..., Any], uses: tuple[str, ...], lacks: tuple[str, ...]
) -> str | None:
    if not uses and not lacks:
        return None
    first = _first_uses(found)
    for name in lacks:
        if name in first:
            return f"uses {name} now"
    for name in uses:
        if name not in first:
            return f"no longer uses {name}"
    for before, after in itertools.pairwise(uses):
        if first[before] > first[after]:
            return f"uses {after} before {before}"
    return None


def _first_uses(found: Callable[..., Any]) -> dict[str, tuple[int, int]]:
    """Return where (line, column) a function's source first reads each name or attribute."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(found))))
    uses: dict[str, tuple[int, int]] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Name | ast.Attribute):
            name = node.id if isinstance(node, ast.Name) else node.attr
            # An attribute ends where its name does.
            place = node.end_lineno or 0, node.end_col_offset or 0
            uses[name] = min(uses.get(name, place), place)
    return uses
