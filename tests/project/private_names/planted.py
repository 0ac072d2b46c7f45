"""Plant an error at each use of a listed name: the test that the list names must fail.

    python -m tests.project.private_names.planted [WORDS]

Each error is planted in a copy of the project: rows of tables are removed, so that their targets
stay unchanged; imported names get another class; all other uses raise. Exit code 1 if the test
still passes, or also fails without the error.
"""

import ast
import functools
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from tests.project.private_names import listed, scan
from tests.support.launch import PROJECT
from tests.upstream import tables

# For every function of a table.
_WITHOUT = """

def _without(whole):
    return lambda *args, **kwargs: [x for x in whole(*args, **kwargs) if x.target != {target!r}]


{names} = map(_without, ({names}))
"""


def errors(row: listed.Row, name: str) -> dict[str, tuple[str, str]]:
    """Return what to plant for one name: by place, (file below the package, its new text)."""
    found = {}
    for file in row.files:
        text = scan.path_of(file).read_text()
        if any((use.file, use.name) == (file, name) for use in scan.rows()):
            names = "".join(f"{function}, " for function in tables.functions(Path(file).stem))
            without = text + _WITHOUT.format(target=name, names=names.strip())
            found[f"{file} without its row"] = file, without
        for use in scan.uses_in(text, file):
            if use.is_of(name):
                found[str(use)] = file, with_error(text, use)
    return found


def with_error(text: str, use: scan.Use) -> str:
    """Return a file's text with an error at one use."""
    tree = ast.parse(text)
    path = _path(tree, use)
    node = path[-1]
    if use.kind == "override":
        return _exchange(
            text, node, ast.get_source_segment(text, node).replace("def _", "def x_", 1)
        )
    if use.kind == "import":
        if isinstance(node, ast.Import):
            return _exchange(text, node, "pass")
        name = use.name.rpartition(".")[2]
        bound = next(alias.asname or alias.name for alias in node.names if alias.name == name)
        other = f"\n{' ' * node.col_offset}{bound} = type('planted', (), {{}})"
        return _exchange(text, node, ast.get_source_segment(text, node) + other)
    if use.kind == "string":
        return _exchange(text, node, "'planted'")
    if use.kind == "set":
        if isinstance(node, ast.Call):
            return _exchange(text, node, "__import__('contextlib').nullcontext()")
        statement = next(part for part in reversed(path) if isinstance(part, ast.stmt))
        return _exchange(text, statement, "pass")
    return _exchange(text, node, "(1 / 0)")


def _path(tree: ast.Module, use: scan.Use) -> list[ast.AST]:
    """Return the nodes from the module to a use."""

    def look(node: ast.AST, path: list[ast.AST]) -> list[ast.AST] | None:
        path = [*path, node]
        place = getattr(node, "lineno", None), getattr(node, "col_offset", None)
        end = getattr(node, "end_lineno", None), getattr(node, "end_col_offset", None)
        if (place, end) == (use.start, use.end) and not isinstance(node, ast.Expr):
            return path
        for child in ast.iter_child_nodes(node):
            if (deeper := look(child, path)) is not None:
                return deeper
        return None

    found = look(tree, [])
    assert found is not None, use
    return found


def _exchange(text: str, node: ast.AST, new: str) -> str:
    lines = text.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    whole = text.encode()
    return (whole[:start] + new.encode() + whole[end:]).decode()


def passes(test: str, file: str | None = None, text: str = "") -> bool:
    """Return whether a test passes if a file of the package has this text."""
    with tempfile.TemporaryDirectory(prefix="kvshift_planted_") as folder:
        copy = Path(folder) / "project"
        shutil.copytree(PROJECT, copy, ignore=shutil.ignore_patterns(".*", "__pycache__", "output"))
        if file is not None:
            scan.path_of(file, copy).write_text(text)
        run = subprocess.run(
            [sys.executable, "-m", "pytest", "-x", "-q", "-p", "no:cacheprovider", test],
            cwd=copy,
            capture_output=True,
            text=True,
        )
    if "no tests ran" in run.stdout:
        raise RuntimeError(f"{test} was not run:\n{run.stdout[-2000:]}{run.stderr[-2000:]}")
    return run.returncode == 0


passes_as_it_is = functools.cache(passes)


def main(words: list[str]) -> int:
    unnoticed = 0
    for row in listed.rows():
        for name in row.names:
            if words and not any(word in name for word in words):
                continue
            planted = errors(row, name) if listed.is_there(row) else {}
            for where, (file, text) in planted.items():
                answer = "MISSED"
                for test in row.tests:
                    if not passes_as_it_is(test):
                        answer = f"FAILS ANYWAY {test}"
                    elif not passes(test, file, text):
                        answer = f"noticed by {test}"
                        break
                unnoticed += not answer.startswith("noticed")
                print(f"{name}: {where}: {answer}", flush=True)
            if not planted:
                print(f"{name}: nothing to plant", flush=True)
    return 1 if unnoticed else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
