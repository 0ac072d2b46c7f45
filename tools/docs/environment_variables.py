"""Lists the environment variables that the code reads, and the files that read each.

    python -m tools.docs.environment_variables

Found by syntax in Python (os.environ and copies of it), and by text in shell scripts and the
Makefile. tests/project/test_docs.py compares the list with docs/environment.md.
"""

import argparse
import ast
import re
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("kvshift_megatron", "tools", "examples", "tests", "docs")

# What bash itself sets, or a script gets as something else than a setting.
_OF_BASH = {"BASH", "IFS", "OPTARG", "PWD", "RANDOM", "REPLY", "SECONDS", "UID"}
_NAME = "[A-Z][A-Z0-9_]*"
_VARIABLE = re.compile(_NAME)
_METHODS = {"get", "pop", "setdefault"}
# A module's names and what each stands for, one or more expressions.
_Constants = dict[str, list[ast.AST]]


def variables(root: Path = ROOT) -> dict[str, set[str]]:
    """Name -> files, relative to `root`."""
    found: dict[str, set[str]] = {}
    named: dict[str, set[str]] = {}
    for path in sorted(path for folder in FOLDERS for path in (root / folder).rglob("*")):
        file = path.relative_to(root).as_posix()
        if path.suffix == ".py":
            names = set(in_python(path.read_text(), root))
            for name in re.findall(rf'"(KVSHIFT_{_NAME})"', path.read_text()):
                named.setdefault(name, set()).add(file)
        elif path.suffix in (".sh", ".sbatch"):
            names = in_shell(path.read_text())
        else:
            continue
        for name in names:
            found.setdefault(name, set()).add(file)
    for name in in_makefile((root / "Makefile").read_text()):
        found.setdefault(name, set()).add("Makefile")
    # This project's own variables count however they are read, such as from /proc.
    return named | found


def in_python(text: str, root: Path = ROOT) -> Iterator[str]:
    """Return the variables that one module reads.

    A key is a string, or a name that stands for strings: a constant of the module or of a module
    of the project that it imports, or the variable of a loop over such a constant. Keys that only
    a caller knows are left to the caller.
    """
    if "environ" not in text and "getenv" not in text:
        return
    tree = ast.parse(text)
    constants = _constants(tree, root)
    copies = _copies(tree)

    def is_environment(node: ast.AST) -> bool:
        return ast.unparse(node) in {"os.environ", *copies}

    for node in ast.walk(tree):
        keys: list[ast.AST] = []
        match node:
            case ast.Call(func=ast.Attribute(value=value, attr=method), args=[key, *_]):
                is_lookup = method in _METHODS and is_environment(value)
                keys = [key] if is_lookup or ast.unparse(node.func) == "os.getenv" else []
            case ast.Subscript(value=value, slice=key, ctx=ast.Load()) if is_environment(value):
                keys = [key]
            case ast.Compare(left=key, ops=[ast.In() | ast.NotIn()], comparators=[value]):
                keys = [key] if is_environment(value) else []
            case ast.BinOp(left=left, op=ast.BitOr(), right=value) if is_environment(value):
                # Defaults | os.environ: the environment wins.
                named = constants.get(left.id, []) if isinstance(left, ast.Name) else [left]
                dicts = [part for part in named if isinstance(part, ast.Dict)]
                keys = [key for part in dicts for key in part.keys if key]
        for key in keys:
            yield from filter(_VARIABLE.fullmatch, _strings(key, constants))


def _constants(tree: ast.Module, root: Path) -> _Constants:
    """Return what names stand for: assigned, looped over, or imported from the project."""
    found: _Constants = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            found.setdefault(node.targets[0].id, []).append(node.value)
        elif isinstance(node, ast.For | ast.comprehension) and isinstance(node.target, ast.Name):
            found.setdefault(node.target.id, []).append(node.iter)
        elif isinstance(node, ast.ImportFrom) and node.module:
            path = root / f"{node.module.replace('.', '/')}.py"
            upper = [alias for alias in node.names if alias.name.isupper()]
            if upper and path.exists():
                theirs = _constants(ast.parse(path.read_text()), root)
                found |= {a.asname or a.name: theirs[a.name] for a in upper if a.name in theirs}
    return found


def _copies(tree: ast.Module) -> set[str]:
    """Names of variables that hold the environment, or a copy of it."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            value = node.value
            parts = [value.body, value.orelse] if isinstance(value, ast.IfExp) else [value]
            if any(ast.unparse(part) in ("os.environ", "dict(os.environ)") for part in parts):
                names.add(node.targets[0].id)
    return names


def _strings(node: ast.AST, constants: _Constants, depth: int = 0) -> Iterator[str]:
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    elif isinstance(node, ast.Tuple | ast.List | ast.Set):
        for element in node.elts:
            yield from _strings(element, constants, depth)
    elif isinstance(node, ast.Name) and depth < 3:
        values = constants.get(node.id, [])
        # A loop over the environment itself asks for no variable in particular.
        if not any(ast.unparse(value).startswith("os.environ") for value in values):
            for value in values:
                yield from _strings(value, constants, depth + 1)


def in_shell(text: str) -> set[str]:
    """Return the variables that a script reads with a default, or has not set itself."""
    text = re.sub(r"(?m)(^|\s)#.*$", "", text)
    text = re.sub(r"'[^']*'", "", text)
    with_default = set(re.findall(rf"\$\{{({_NAME}):?[-+?]", text))
    read = set(re.findall(rf"\$\{{?({_NAME})", text)) | with_default
    assigned = set(re.findall(rf"(?:^|[\s;(])({_NAME})=", text))
    return ((read - assigned) | with_default) - _OF_BASH


def in_makefile(text: str) -> set[str]:
    """Return the variables that make takes from its environment: ?=, or a bare export."""
    maybe = set(re.findall(rf"(?m)^({_NAME}) *\?=", text))
    exported = set(re.findall(rf"(?m)^export ({_NAME}) *$", text))
    set_here = set(re.findall(rf"(?m)^({_NAME}) *:?=", text))
    read = set(re.findall(rf"\$\(({_NAME})\)", text))
    return maybe | (exported - set_here) | (read - set_here - {"MAKE", "MAKEFLAGS"})


def main(argv: list[str] | None = None) -> int:
    """Print the list; 0."""
    argparse.ArgumentParser(
        prog="python -m tools.docs.environment_variables", description=__doc__.partition("\n")[0]
    ).parse_args(argv)
    for name, files in sorted(variables().items()):
        print(f"{name}: {', '.join(sorted(files))}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
