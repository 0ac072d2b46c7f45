"""The package's layout: who imports whom, as documented, and nothing private of another module."""

import ast
import re
from collections import defaultdict

from tests.support.launch import PROJECT

PACKAGE = PROJECT / "kvshift_megatron"
PAGE = PROJECT / "docs" / "design" / "layout.md"
Arrows = dict[str, set[str]]


def part_of(module: str) -> str:
    """Return the folder ("ops/") or root module ("taps") of a dotted name below the package."""
    first = module.split(".")[0]
    return f"{first}/" if (PACKAGE / first).is_dir() else first


def imported(tree: ast.Module) -> set[str]:
    """Return the modules of the package that a module imports, without the package's own name."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module == PACKAGE.name:
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module]
        else:
            continue
        found |= {name.partition(".")[2] for name in names if name.startswith(f"{PACKAGE.name}.")}
    # What the package itself defines, such as KVShiftConfig, is in none of its parts.
    return {name for name in found if is_module(name)}


def is_module(name: str) -> bool:
    path = PACKAGE / name.replace(".", "/")
    return path.is_dir() or path.with_suffix(".py").is_file()


def arrows_of_the_code() -> Arrows:
    found: Arrows = defaultdict(set)
    for path in sorted(PACKAGE.rglob("*.py")):
        own = part_of(path.relative_to(PACKAGE).with_suffix("").as_posix().replace("/", "."))
        if own != "__init__":
            found[own] |= {part_of(name) for name in imported(ast.parse(path.read_text()))} - {own}
    return {part: targets for part, targets in found.items() if targets}


def arrows_of_the_page(text: str) -> Arrows:
    """Return the rows of the table of imports."""
    table = text.partition("| part | imports from |")[2].partition("\n\n")[0]
    rows = [re.findall(r"`([\w/]+)`", line) for line in table.splitlines()]
    return {row[0]: set(row[1:]) for row in rows if row}


def circles(arrows: Arrows) -> list[str]:
    """Return the parts that import themselves by way of others."""

    def reached(part: str, seen: set[str]) -> set[str]:
        for target in arrows.get(part, ()):
            if target not in seen:
                seen.add(target)
                reached(target, seen)
        return seen

    return [part for part in arrows if part in reached(part, set())]


def test_the_page_draws_the_imports():
    assert arrows_of_the_page(PAGE.read_text()) == arrows_of_the_code()


def test_no_part_imports_itself_by_way_of_others():
    arrows = arrows_of_the_code()
    assert not circles(arrows)
    assert set(circles({**arrows, "ops/": {"attention/"}})) >= {"ops/", "attention/"}


def test_a_missing_arrow_is_noticed():
    text = PAGE.read_text()
    assert arrows_of_the_page(text.replace("`ops/`, ", "", 1)) != arrows_of_the_code()


# Underscores that the Python documentation explains.
_PUBLIC = {"_replace", "_asdict", "_fields"}
# A class shares private names with those that derive from it.
_ITSELF = {"self", "cls", "super()"}


def private_names(tree: ast.Module) -> tuple[set[str], set[str]]:
    """Return the private names that a module defines, and those that it uses of other objects."""
    defined, used = set(), set()
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            defined.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            defined.add(node.id)
        elif isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            defined.add(node.target.id)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            defined.add(node.attr)
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) not in _ITSELF:
            used.add(node.attr)
        elif isinstance(node, ast.ImportFrom):
            used |= {alias.name for alias in node.names}
    used -= _PUBLIC
    return tuple({n for n in names if re.match(r"_[^_]", n)} for names in (defined, used))


def reached_into(texts: dict[str, str]) -> list[str]:
    """Return the private names of one module that another one uses."""
    found = {file: private_names(ast.parse(text)) for file, text in texts.items()}
    return [
        f"{user} uses {name} of {owner}"
        for user, (own, used) in found.items()
        for name in sorted(used - own)
        for owner, (defined, _) in found.items()
        if name in defined
    ]


def test_no_module_uses_what_another_keeps_private():
    folders = (PACKAGE, PROJECT / "examples", PROJECT / "tools")
    paths = [path for folder in folders for path in sorted(folder.rglob("*.py"))]
    assert not reached_into({str(path.relative_to(PROJECT)): path.read_text() for path in paths})
    planted = {"a.py": "def _f(): ...", "b.py": "import a\na._f()", "c.py": "from a import _f"}
    assert reached_into(planted) == ["b.py uses _f of a.py", "c.py uses _f of a.py"]


def test_paths_of_the_page_exist():
    names = re.findall(r"^      ([\w/ ]+?)  ", PAGE.read_text(), re.M)
    parts = [part for name in names for part in name.split()]
    assert len(parts) > 15
    for part in parts:
        assert (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").is_file(), part
