"""Every import of the project's own names finds them, even in tests for other machines."""

import ast
from pathlib import Path

import pytest

from tests.support.launch import PROJECT

_OWN = ("kvshift_megatron", "tests", "tools", "examples")


def defined(path: Path) -> set[str]:
    """Return the names that a module has after its import, as far as its text tells."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            names.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names.update(alias.asname or alias.name.partition(".")[0] for alias in node.names)
    return names


def missing(module: str, names: list[str], root: Path = PROJECT) -> list[str]:
    """Return what `from module import names` would not find."""
    folder = root / module.replace(".", "/")
    file = folder / "__init__.py" if folder.is_dir() else folder.with_suffix(".py")
    if not file.exists() and not folder.is_dir():
        return [module]
    there = defined(file) if file.exists() else set()
    there |= {path.stem for path in folder.iterdir()} if folder.is_dir() else set()
    return [f"{module}.{name}" for name in names if name not in there]


def imports(text: str) -> list[tuple[str, list[str]]]:
    """Return (module, names from it) for every import in a module's text."""
    found = []
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.ImportFrom) and node.level == 0:
            found.append((node.module, [alias.name for alias in node.names]))
        elif isinstance(node, ast.Import):
            found += [(alias.name, []) for alias in node.names]
    return found


@pytest.mark.parametrize("folder", _OWN)
def test_every_import_finds_its_name(folder):
    found = []
    for path in sorted((PROJECT / folder).rglob("*.py")):
        for module, names in imports(path.read_text()):
            if module.partition(".")[0] in _OWN:
                found += [f"{path.relative_to(PROJECT)}: {x}" for x in missing(module, names)]
    assert not found


def only_of_the_checkout(text: str) -> list[str]:
    """Return the imported modules of a text that only the checkout has."""
    return [m for m, _ in imports(text) if m.partition(".")[0] in ("tests", "tools", "examples")]


def test_the_package_imports_nothing_that_only_the_checkout_has():
    found = {
        path.relative_to(PROJECT): modules
        for path in sorted((PROJECT / "kvshift_megatron").rglob("*.py"))
        if (modules := only_of_the_checkout(path.read_text()))
    }
    assert not found
    planted = "def f():\n    from examples.configs import check\n    import tools.launchers"
    assert only_of_the_checkout(planted) == ["examples.configs", "tools.launchers"]


def test_a_missing_name_is_caught():
    assert missing("tests.distributed.gone", ["x"]) == ["tests.distributed.gone"]
    assert missing("tests.support.compare", ["relative_error", "gone"]) == [
        "tests.support.compare.gone"
    ]
    assert missing("tests", ["support", "gone"]) == ["tests.gone"]
