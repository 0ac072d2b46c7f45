"""Names in a file, and what they stand for."""

import ast
import re
from collections.abc import Iterator


def words(text: str) -> set[str]:
    """Return a file's identifiers and the words of its strings, without docstrings."""
    tree = ast.parse(text)
    found: set[str] = set()
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef)
        and node.body and isinstance(node.body[0], ast.Expr)
    }  # fmt: skip
    for node in ast.walk(tree):
        for field in ("id", "attr", "name", "arg"):
            found.update(str(getattr(node, field, "")).split("."))
        if (
            isinstance(node, ast.Constant)
            and isinstance(node.value, str)
            and id(node) not in docstrings
        ):
            found.update(re.findall(r"\w+", node.value))
    return found


def is_private(dotted: str) -> bool:
    return any(is_private_part(part) for part in dotted.split("."))


def is_private_part(part: str) -> bool:
    return part.startswith("_") and not part.startswith("__") and part != "_"


def aliases(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Yield (name, what it stands for) of all imports in a file, and of assigned parts of them."""
    known: dict[str, str] = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                known[alias.asname or root(alias.name)] = (
                    alias.name if alias.asname else root(alias.name)
                )
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:
                known[alias.asname or alias.name] = f"{node.module}.{alias.name}"
    yield from known.items()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Attribute | ast.Name):
            start, target = node.value, node.targets[0]
            while isinstance(start, ast.Attribute):
                start = start.value
            if (
                isinstance(start, ast.Name)
                and isinstance(target, ast.Name)
                and start.id in known
                and target.id not in known
            ):
                yield target.id, ast.unparse(node.value).replace(start.id, known[start.id], 1)


def own_names(tree: ast.Module) -> Iterator[str]:
    """Yield the attributes that a file's classes define."""
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            for part in node.body:
                if isinstance(part, ast.FunctionDef):
                    yield part.name
                elif isinstance(part, ast.AnnAssign | ast.Assign):
                    targets = [part.target] if isinstance(part, ast.AnnAssign) else part.targets
                    yield from (target.id for target in targets if isinstance(target, ast.Name))
        elif (
            isinstance(node, ast.Attribute)
            and isinstance(node.ctx, ast.Store)
            and isinstance(node.value, ast.Name)
            and node.value.id in ("self", "cls")
        ):
            yield node.attr


def root(dotted: str) -> str:
    return dotted.partition(".")[0]
