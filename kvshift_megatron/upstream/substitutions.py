"""The engine: apply the rows of a table and restore the originals.

A row names an attribute of another library, its replacement and the reason. Rows are applied in the
order of their table and restored in reverse order. `on_import` extends the engine to modules that
are not imported yet.
"""

import importlib
from collections.abc import Callable, Iterable
from dataclasses import KW_ONLY, dataclass
from types import TracebackType
from typing import Any, Self

_ABSENT = object()

# Makes a replacement from the original.
Wrap = Callable[[Any], Any]


@dataclass(frozen=True, eq=False)
class Substitution:
    """One row: `value` replaces the target, or `wrap(original)` does.

    Args:
        target: Dotted name of an attribute of a module or class.
        reason: Why it is replaced, in one sentence.
        value: The replacement.
        wrap: Makes the replacement from the original. Give either `value` or `wrap`.
        owner: The instance of the target's class to change instead of the class; None changes the
            module or class that the target names.
        takes: Megatron's functions: the parameters that the replacement counts on; see Seam.
        releases: In which the row applies, such as ">=0.19": of torch for torch's names, else of
            megatron-core. None for every supported one.
    """

    target: str
    reason: str
    _: KW_ONLY
    value: Any = _ABSENT
    wrap: Wrap | None = None
    owner: Any = None
    takes: str = ""
    releases: str | None = None

    def __post_init__(self) -> None:
        if (self.value is _ABSENT) == (self.wrap is None):
            raise ValueError(f"{self.target}: a row has either a value or a wrap")

    @property
    def module(self) -> str:
        """Dotted name of the module or class that holds the target."""
        return self.target.rpartition(".")[0]

    @property
    def name(self) -> str:
        """The attribute alone."""
        return self.target.rpartition(".")[2]

    @property
    def library(self) -> str:
        """The top-level package."""
        return self.target.partition(".")[0]

    def applies(self) -> bool:
        """Return whether the installed release is one of `releases`."""
        return self.releases is None or contains(self.releases, installed(self.library))

    def replacement(self, original: Any) -> Any:
        """Return what takes the original's place."""
        return self.value if self.wrap is None else self.wrap(original)


class Applied:
    """Rows that are in force from `apply` to `undo`, or in a `with` block.

    A row is skipped if its `releases` do not include the installed one.

    Args:
        rows: Applied in this order.
    """

    def __init__(self, rows: Iterable[Substitution]) -> None:
        self.rows = list(rows)
        self._saved: list[tuple[Any, str, Any]] = []  # owner, name, what its __dict__ held

    def __len__(self) -> int:
        return len(self.rows)

    def targets(self) -> list[str]:
        """Return the dotted names of all rows."""
        return [row.target for row in self.rows]

    def apply(self) -> None:
        """Put every row in force, or none.

        Raises:
            AttributeError: The installed release lacks a target.
        """
        try:
            for row in self.rows:
                if row.applies():
                    self._replace(resolve(row.module) if row.owner is None else row.owner, row)
        except BaseException:
            self._restore()
            raise

    def undo(self) -> None:
        """Restore every original, in reverse order."""
        self._restore()

    def __enter__(self) -> Self:
        self.apply()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.undo()

    def _replace(self, owner: Any, row: Substitution) -> tuple[Any, Any]:
        """Set one attribute and return (original, replacement)."""
        original = getattr(owner, row.name, _ABSENT)
        if original is _ABSENT:
            raise AttributeError(f"{row.target} is not in the installed release: {row.reason}")
        new = row.replacement(original)
        self._saved.append((owner, row.name, vars(owner).get(row.name, _ABSENT)))
        setattr(owner, row.name, new)
        return original, new

    def _restore(self) -> None:
        while self._saved:
            owner, name, value = self._saved.pop()
            if value is _ABSENT:
                delattr(owner, name)  # it was inherited
            else:
                setattr(owner, name, value)


def apply(rows: Iterable[Substitution]) -> Applied:
    """Put rows in force until `undo` is called on the result, or until the process ends."""
    applied = Applied(rows)
    applied.apply()
    return applied


def resolve(dotted: str) -> Any:
    """Return the module or class with a dotted name, as `from a.b import c` finds it."""
    head, *rest = dotted.split(".")
    found, path = importlib.import_module(head), head
    for name in rest:
        path = f"{path}.{name}"
        if not hasattr(found, name):
            importlib.import_module(path)
        found = getattr(found, name)
    return found


def contains(releases: str, release: str) -> bool:
    """Return whether a range such as ">=0.19" has a release; a candidate counts as its release."""
    # megatron-core depends on it.
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(releases).contains(Version(release).base_version)


def installed(library: str) -> str:
    """Return the installed release of torch, or for every other name that of Megatron-Core."""
    module = "torch" if library == "torch" else "megatron.core.package_info"
    return importlib.import_module(module).__version__
