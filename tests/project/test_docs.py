"""The documents: links lead somewhere, and tables and flags are those of the code.

`make docs` looks at the built site; this looks at what a reader of the repository sees.
"""

import ast
import dataclasses
import functools
import posixpath
import re
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from kvshift_megatron.planning.estimate import Assumptions
from tests.support.launch import PROJECT
from tools.docs import environment_variables

DOCS = PROJECT / "docs"
TOP = [PROJECT / name for name in ("README.md", "CONTRIBUTING.md", "DESIGN.md", "CHANGELOG.md")]
PAGES = [
    *(path for path in TOP if path.exists()),
    *sorted(DOCS.rglob("*.md")),
    *sorted(PROJECT.glob("examples/*/README.md")),
    PROJECT / "kvshift_megatron/recipes/README.md",
]

# Flags of other programs that resemble one of ours.
FOREIGN = {
    "Megatron": {
        "tokenizer-model",
        "verify-integrity",
        "hybrid-layer-pattern",
        "hybrid-override-pattern",
        "hybrid-context-parallel",
    },
    "torchrun": {"nproc-per-node"},
    "sbatch": {"gpus-per-node"},
}


def without_code(text: str) -> str:
    """Return a page without its code, in which brackets are no links."""
    text = re.sub(r"(?ms)^```.*?^```", "", text)
    text = re.sub(r"(?m)^(?: {4}|\t).*$", "", text)
    return re.sub(r"`[^`\n]*`", "", text)


def anchors(path: Path) -> set[str]:
    """Return the names of a page's headings that MkDocs and forges give alike."""
    headings = re.findall(r"(?m)^#+ (.+)$", path.read_text())
    plain = [re.sub(r"[^\w\s-]", "", heading).strip().lower() for heading in headings]
    return {name.replace(" ", "-") for name in plain if not re.search(r"[-\s]{2}", name)}


def broken_links(path: Path, text: str) -> list[str]:
    """Relative links and images of a page that lead nowhere."""
    found = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_code(text)):
        if re.match(r"[a-z]+:", target):
            continue
        file, _, anchor = target.partition("#")
        there = (path.parent / file) if file else path
        is_there = there.exists()
        if is_there and anchor and there.suffix == ".md":
            is_there = anchor in anchors(there)
        if not is_there:
            found.append(f"{path.relative_to(PROJECT)}: {target}")
    return found


def in_table(text: str, column: str) -> list[dict[str, str]]:
    """Rows of the first table that has the column, by the names of its columns."""
    lines = iter(text.splitlines())
    for line in lines:
        names = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and column in names:
            next(lines)
            rows = []
            for row in lines:
                if not row.startswith("|"):
                    break
                rows.append(
                    dict(zip(names, (c.strip() for c in row.strip().strip("|").split("|"))))
                )
            return rows
    raise ValueError(f"no table has the column {column}")


def variables_in(text: str) -> dict[str, list[str]]:
    """Name -> files and folders of the table of environment variables."""
    found: dict[str, list[str]] = {}
    for row in in_table(text, "Read in"):
        for name in re.findall(r"`([^`]+)`", row["Name"]):
            found.setdefault(name, []).extend(re.findall(r"`([^`]+)`", row["Read in"]))
    return found


@functools.cache
def read_by_the_code() -> dict[str, set[str]]:
    return environment_variables.variables()


def differences(text: str, read: dict[str, set[str]]) -> list[str]:
    """Where the table and the code disagree."""
    listed = variables_in(text)
    wrong = [f"{name} is read and has no row" for name in sorted(read.keys() - listed.keys())]
    wrong += [f"{name} has a row and is not read" for name in sorted(listed.keys() - read.keys())]
    for name in sorted(listed.keys() & read.keys()):
        for place in listed[name]:
            if not any(file == place or file.startswith(f"{place}/") for file in read[name]):
                wrong.append(f"{name} is not read in {place}")
    return wrong


@functools.cache
def own_flags() -> set[str]:
    """Return the flags that the project's parsers take, without the dashes."""
    folders = ("kvshift_megatron", "tools", "examples")
    found = {field.name.replace("_", "-") for field in dataclasses.fields(Assumptions)}
    for path in (path for folder in folders for path in (PROJECT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("add_argument"):
                given = [a.value for a in node.args if isinstance(a, ast.Constant)]
                found |= {flag[2:] for flag in given if str(flag).startswith("--")}
    patches = "".join(path.read_text() for path in PROJECT.glob("patches/*/*.patch"))
    return found | {flag[2:] for flag in re.findall(r"""['"](--kv-shift[a-z-]*)['"]""", patches)}


def flags_in(text: str) -> set[str]:
    """Return the flags that a page names, without the dashes; `--kv-shift-*` stands for many."""
    return set(re.findall(r"(?<![\w-])--([a-z][a-z0-9-]*[a-z0-9])(?![\w*-]|-\*)", text))


def unknown(flags: set[str], own: set[str]) -> set[str]:
    """Those that are none of ours and look like one: they name KV shifting, or differ little."""

    def is_like(flag: str, ours: str) -> bool:
        if min(len(flag), len(ours)) < 6:
            return False
        is_part = flag.startswith(ours) or ours.startswith(flag)
        return is_part or SequenceMatcher(None, flag, ours).ratio() > 0.85

    rest = flags - own - set().union(*FOREIGN.values())
    return {f for f in rest if "kv-shift" in f or any(is_like(f, ours) for ours in own)}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_links_lead_somewhere(path):
    assert not broken_links(path, path.read_text())


def test_a_broken_link_is_found():
    text = "[a](docs/install.md) [b](docs/instal.md) ![c](docs/x.svg) [d](docs/training.md#flag)"
    assert broken_links(PROJECT / "README.md", text) == [
        "README.md: docs/instal.md", "README.md: docs/x.svg", "README.md: docs/training.md#flag",
    ]  # fmt: skip
    assert not broken_links(PROJECT / "README.md", "`[b](no.md)`\n\n    [c](no.md)\n")


def test_the_readme_stays_short():
    assert len((PROJECT / "README.md").read_text().splitlines()) <= 140


def test_environment_variables():
    text = (DOCS / "environment.md").read_text()
    assert not differences(text, read_by_the_code())


def test_a_missing_and_a_surplus_row_are_found():
    text, read = (DOCS / "environment.md").read_text(), read_by_the_code()
    (row,) = [line for line in text.splitlines() if line.startswith("| `TE_WHEELS` |")]
    missing = text.replace(row + "\n", "")
    assert differences(missing, read) == ["TE_WHEELS is read and has no row"]
    surplus = text.replace(row, f"{row}\n{row.replace('TE_WHEELS', 'TE_WHEEL')}")
    assert differences(surplus, read) == ["TE_WHEEL has a row and is not read"]
    elsewhere = text.replace(row, row.replace("`Makefile`", "`tools/lock.sh`"))
    assert differences(elsewhere, read) == ["TE_WHEELS is not read in tools/lock.sh"]


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("os.environ.get('A', '0'); os.environ['B']; 'C' in os.environ; os.getenv('D')", "ABCD"),
        ("NAME = 'A'\nos.environ.setdefault(NAME, '1')", "A"),
        ("e = dict(os.environ)\ne['A']; e['B'] = '1'", "A"),
        ("names = ('A', 'B')\nany(n in os.environ for n in names)", "AB"),
        ("{'A': '1'} | os.environ", "A"),
        ("{n: os.environ[n] for n in os.environ}; environment = {}; environment['A']", ""),
    ],
)
def test_what_python_reads(text, names):
    assert set(environment_variables.in_python(text)) == set(names)


def test_what_a_script_and_a_makefile_read():
    script = "A=1; B=${B:-2}\necho $A ${C} $SECONDS '$D' # $E\nF=${G:?}"
    assert environment_variables.in_shell(script) == {"B", "C", "G"}
    makefile = "A := 1\nB ?= 2\nexport C\nall:\n\techo $(A) $(B) $(D) $@"
    assert environment_variables.in_makefile(makefile) == {"B", "C", "D"}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: str(path.relative_to(PROJECT)))
def test_flags_exist(path):
    assert not unknown(flags_in(path.read_text()), own_flags())


def test_a_flag_that_does_not_exist_is_found():
    text = "--kv-shift-windows 3, --no-kv-shift, --metrics-files x, --hang-timeout 3 `--kv-shift-*`"
    text += " --kv-shift-init=identity --lr 3 --save x"
    named = flags_in(text)
    assert {"kv-shift-windows", "kv-shift-init", "lr", "save"} <= named
    assert unknown(named, own_flags()) == {"kv-shift-windows", "metrics-files", "hang-timeout"}


def test_every_flag_of_the_entry_point_has_a_row():
    modules = ("arguments.py", "training/run_config.py", "training/faults/fault_flags.py")
    sources = [PROJECT / "kvshift_megatron" / name for name in modules]
    sources.append(PROJECT / "kvshift_megatron/training/metrics/__init__.py")
    flags = {
        f for path in sources for f in re.findall(r'^\s+"(--[a-z-]+)",', path.read_text(), re.M)
    }
    listed = flags_in(" ".join(row["flag"] for row in in_table(
        (DOCS / "training.md").read_text(), "flag")))  # fmt: skip
    assert len(flags) >= 12 and "--task-module" in flags and {f[2:] for f in flags} <= listed


def test_decisions_are_numbered_without_gaps():
    files = sorted(path.name for path in (DOCS / "decisions").glob("[0-9]*.md"))
    assert [int(name[:4]) for name in files] == list(range(1, len(files) + 1))
    index = (DOCS / "decisions" / "index.md").read_text()
    for number, name in enumerate(files, start=1):
        text = (DOCS / "decisions" / name).read_text()
        assert text.startswith(f"# {number}. ") and f"]({name})" in index
        assert re.search(r"(?m)^20\d\d-\d\d-\d\d$", text)
        assert all(f"\n## {heading}\n" in text for heading in ("Decision", "Why", "Price"))


def test_measurements_name_date_and_hardware():
    pages = sorted((DOCS / "measurements").glob("20*.md"))
    index = (DOCS / "measurements" / "index.md").read_text()
    assert pages
    for path in pages:
        text = path.read_text()
        assert f"| Date | {path.name[:10]} |" in text and "| Hardware |" in text
        assert f"]({path.name})" in index


def test_every_page_is_in_the_navigation():
    listed = set(re.findall(r"[\w/.-]+\.md", (PROJECT / "mkdocs.yml").read_text()))
    assert listed == {posixpath.relpath(path, DOCS) for path in DOCS.rglob("*.md")}
