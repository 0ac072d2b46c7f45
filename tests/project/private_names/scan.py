"""Where this package uses what another library does not promise: found by syntax, and in tables.

Found in the text are private names (a leading underscore) in imports, attributes, keywords, strings
that name an attribute or a module, and methods that override one; names that are set in a module or
class of another library; and imports that its `__all__` or its documentation leaves out. What the
package replaces at run time is read from the rows of `kvshift_megatron/upstream`.
"""

import ast
import importlib
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

from kvshift_megatron.upstream import cpu_table
from tests.project.private_names.syntax import aliases, is_private, is_private_part, own_names, root
from tests.support.launch import PROJECT
from tests.upstream import tables

PACKAGE = PROJECT / "kvshift_megatron"
BENCHMARKS = PROJECT / "tools" / "benchmarks"

_OWN = {"kvshift_megatron", "examples", "tools"}
# Underscores that the Python documentation explains.
_DOCUMENTED = {"os._exit", "sys._getframe", "sys._current_frames", "._replace", "._asdict"}
# Modules that no documentation mentions and that no underscore marks.
_UNDOCUMENTED = ("mlx_lm.utils", "mlx_lm.models", "tensorboard.compat", "triton.compiler",
                 "triton.runtime", "transformers.models")  # fmt: skip
# Files that set names which are not in their text, and where these come from.
_NAMED_ELSEWHERE = {
    "upstream/substitutions.py": "the tables, whose rows are uses by themselves",
    "upstream/on_import.py": "the tables, likewise",
    "specs/rewrite.py": "dataclasses.fields",
    "arguments.py": "parsed arguments",
}
_IN_STRINGS = ("torch", "megatron", "triton", "mlx_lm", "transformers")
_UNKNOWN = "?"


@dataclass(frozen=True)
class Use:
    """One place.

    Args:
        file: below the package; of the benchmarks, below the project.
        name: dotted and whole where imports tell it; else the attribute alone, as ".name".
        kind: read, set, import, override, string, or row of a table.
        start, end: (line from 1, column from 0 in UTF-8 bytes) of the syntax that names it; (0, 0)
            for a row.
    """

    file: str
    name: str
    kind: str
    start: tuple[int, int]
    end: tuple[int, int]

    def is_of(self, listed: str) -> bool:
        """Whether a name of the list is this one."""
        if self.kind == "string" and listed.startswith(f"{self.name}."):
            return True
        return self.name == listed or (self.name.startswith(".") and listed.endswith(self.name))

    def __str__(self) -> str:
        file = path_of(self.file, Path()).as_posix()
        return f"{file}:{self.start[0]} {self.kind} {self.name}"


def path_of(file: str, project: Path = PROJECT) -> Path:
    """Where a file of the list is in a copy of the project."""
    return project / file if file.startswith("tools/") else project / "kvshift_megatron" / file


def uses() -> list[Use]:
    """Return every use in the package, its tables and the benchmarks."""
    found = [*rows()]
    for path in sorted(PACKAGE.rglob("*.py")):
        found += uses_in(path.read_text(), path.relative_to(PACKAGE).as_posix())
    for path in sorted(BENCHMARKS.rglob("*.py")):
        found += uses_in(path.read_text(), path.relative_to(PROJECT).as_posix())
    return found


def rows() -> Iterator[Use]:
    """Yield what the tables replace in other libraries."""
    made = set(cpu_table.listed_factories())  # see the list's row of _device_constructors
    for file, row in tables.rows():
        if _is_foreign(row.target) and row.target not in made:
            yield Use(file, row.target, "row", (0, 0), (0, 0))


def uses_in(text: str, file: str) -> list[Use]:
    """Return every use in one file's text."""
    return list(dict.fromkeys(_File(ast.parse(text), file).uses()))


class _File:
    def __init__(self, tree: ast.Module, file: str):
        self.tree, self.file = tree, file
        self.aliases = dict(aliases(tree))
        self.own = set(own_names(tree))
        self.inner = {
            id(node.value)
            for node in ast.walk(tree)
            if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Attribute)
        }

    def uses(self) -> Iterator[Use]:
        for node in ast.walk(self.tree):
            for name, kind in self._names(node):
                if name not in _DOCUMENTED and not self._is_excused(name):
                    yield Use(
                        self.file,
                        name,
                        kind,
                        (node.lineno, node.col_offset),
                        (node.end_lineno, node.end_col_offset),
                    )

    def _is_excused(self, name: str) -> bool:
        return name.endswith(_UNKNOWN) and self.file in _NAMED_ELSEWHERE

    def _names(self, node: ast.AST) -> Iterator[tuple[str, str]]:
        if isinstance(node, ast.Import | ast.ImportFrom):
            yield from ((name, "import") for name in _imports(node))
        elif isinstance(node, ast.Attribute):
            yield from self._attribute(node)
        elif isinstance(node, ast.Assign | ast.AnnAssign | ast.AugAssign | ast.Delete):
            is_one = isinstance(node, ast.AnnAssign | ast.AugAssign)
            targets = [node.target] if is_one else node.targets
            for target in targets:
                for part in target.elts if isinstance(target, ast.Tuple) else [target]:
                    yield from self._set(part)
        elif isinstance(node, ast.Call):
            yield from self._call(node)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield from _string(node.value)
        elif isinstance(node, ast.FunctionDef) and self._overrides(node):
            yield f".{node.name}", "override"

    def _dotted(self, node: ast.AST) -> str | None:
        """Return the whole name of an attribute chain that starts at an import, or None."""
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if not isinstance(node, ast.Name) or node.id not in self.aliases:
            return None
        return ".".join([self.aliases[node.id], *reversed(parts)])

    def _attribute(self, node: ast.Attribute) -> Iterator[tuple[str, str]]:
        dotted = self._dotted(node)
        if dotted is not None:
            # Of a chain the longest part that ends in a private name; inner parts are in it.
            if id(node) in self.inner or not is_private(dotted) or root(dotted) in _OWN:
                return
            parts = dotted.split(".")
            last = max(i for i, part in enumerate(parts) if is_private_part(part))
            if last >= self.aliases_length(node):
                yield ".".join(parts[: last + 1]), _kind(node)
            return
        if not is_private_part(node.attr):
            return
        if isinstance(node.value, ast.Name) and node.attr in self.own:
            return
        yield f".{node.attr}", _kind(node)

    def aliases_length(self, node: ast.AST) -> int:
        """How many parts of a chain's name come from its import, which is a use by itself."""
        while isinstance(node, ast.Attribute):
            node = node.value
        return len(self.aliases[node.id].split("."))

    def _set(self, target: ast.AST) -> Iterator[tuple[str, str]]:
        if isinstance(target, ast.Attribute) and not is_private_part(target.attr):
            dotted = self._dotted(target)
            if dotted is not None and _is_foreign(dotted):
                yield dotted, "set"

    def _call(self, node: ast.Call) -> Iterator[tuple[str, str]]:
        called = ast.unparse(node.func)
        for keyword in node.keywords:
            if keyword.arg is not None and is_private_part(keyword.arg):
                yield f".{keyword.arg}", "read"
        if called in ("setattr", "delattr", "mock.patch.object"):
            yield from self._named(node, "set", called == "mock.patch.object")
        elif called in ("getattr", "hasattr"):
            yield from (
                (name, "read")
                for name, _ in self._named(node, "read", True)
                if is_private(name.removeprefix(".")) and not name.endswith(_UNKNOWN)
            )
        elif called.startswith("mock.patch") and node.args:
            name = node.args[0]
            yield (name.value if isinstance(name, ast.Constant) else f".{_UNKNOWN}"), "set"

    def _named(self, node: ast.Call, kind: str, is_always: bool) -> Iterator[tuple[str, str]]:
        """Return the attribute that a call names in its second argument."""
        if len(node.args) < 2:
            return
        owner, name = self._dotted(node.args[0]), node.args[1]
        is_literal = isinstance(name, ast.Constant)
        # Of itself: an attribute of its own, or those of a loop.
        if ast.unparse(node.args[0]) == "self" and (not is_literal or name.value in self.own):
            return
        if owner is not None and not _is_foreign(owner):
            return
        if is_literal:
            if owner is not None or is_always or is_private_part(name.value):
                yield f"{owner or ''}.{name.value}", kind
        else:
            yield f"{owner or ''}.{_UNKNOWN}", kind

    def _overrides(self, node: ast.FunctionDef) -> bool:
        """Whether a private method is there for another library's class to call."""
        if not is_private_part(node.name):
            return False
        for cls in ast.walk(self.tree):
            if isinstance(cls, ast.ClassDef) and node in cls.body:
                bases = [self._dotted(base) for base in cls.bases]
                foreign = [base for base in bases if base is not None and _is_foreign(base)]
                return any(_has(base, node.name) for base in foreign) or (
                    bool(foreign) and not self._is_called(node.name)
                )
        return False

    def _is_called(self, name: str) -> bool:
        return any(
            isinstance(node, ast.Attribute)
            and node.attr == name
            and not isinstance(node.value, ast.Call)
            for node in ast.walk(self.tree)
        )


def _imports(node: ast.Import | ast.ImportFrom) -> Iterator[str]:
    if isinstance(node, ast.Import):
        names = [(alias.name, None, alias.name) for alias in node.names]
    elif node.module and not node.level:
        names = [(f"{node.module}.{a.name}", node.module, a.name) for a in node.names]
    else:
        return
    for full, module, name in names:
        if _is_foreign(full) and (
            is_private(full)
            or full.startswith(_UNDOCUMENTED)
            or (module is not None and root(module) == "torch" and not _exports(module, name))
        ):
            yield full


def _exports(module: str, name: str) -> bool:
    """Whether a module promises a name: PyTorch's rule, which goes by `__all__`."""
    found = getattr(importlib.import_module(module), name, None)
    promised = getattr(importlib.import_module(module), "__all__", [name])
    return name in promised or isinstance(found, ModuleType)


def _string(text: str) -> Iterator[tuple[str, str]]:
    """Return a string that is the dotted name of something private."""
    is_dotted = re.fullmatch(r"[a-z]\w*(\.\w+)+", text)
    if is_dotted and root(text) in _IN_STRINGS and is_private(text):
        yield text, "string"


def _has(base: str, method: str) -> bool:
    module, _, name = base.rpartition(".")
    try:
        return hasattr(getattr(importlib.import_module(module), name), method)
    except ImportError:
        return False


def _kind(node: ast.Attribute) -> str:
    return "read" if isinstance(node.ctx, ast.Load) else "set"


def _is_foreign(dotted: str) -> bool:
    return root(dotted) not in _OWN and root(dotted) not in sys.stdlib_module_names
