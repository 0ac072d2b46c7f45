"""pyproject.toml, the lists of exact versions and the installed versions agree."""

import importlib.metadata
import re
from dataclasses import dataclass, field

import pytest
from packaging.markers import default_environment
from packaging.requirements import Requirement

from tests.support import pins

DEV = pins.LISTS / "dev.txt"
PLATFORMS = [
    (python, system, machine)
    for python in ("3.12", "3.13")
    for system, machine in (("Linux", "x86_64"), ("Linux", "aarch64"), ("Darwin", "arm64"))
]


def of_dev() -> list[Requirement]:
    return pins.direct(pins.pyproject(), ["dev"])


def here(requirements: list[Requirement]) -> list[Requirement]:
    return [needed for needed in requirements if pins.applies(needed, default_environment())]


@pytest.mark.parametrize("platform", PLATFORMS, ids="-".join)
def test_every_requirement_has_a_version_in_its_range(platform):
    wrong = pins.outside_their_range(of_dev(), pins.read(DEV), pins.environment(*platform))
    assert not wrong, "; ".join(wrong)


def test_transformer_engines_version_is_in_its_range():
    needed = pins.direct(pins.pyproject(), ["te"])
    lists = pins.read(DEV) | pins.read(pins.LISTS / "te-alone.txt")
    wrong = pins.outside_their_range(needed, lists, pins.environment("3.12", "Linux", "x86_64"))
    assert not wrong, "; ".join(wrong)


def test_dev_holds_every_other_extra():
    """So the list is for every extra, except Transformer Engine's."""
    everything = set(pins.pyproject()["project"]["optional-dependencies"]) - {"te"}
    assert set(map(str, of_dev())) == set(map(str, pins.direct(pins.pyproject(), everything)))


@pytest.mark.parametrize("name", ["dev.txt", "te.txt", "te-alone.txt"])
def test_a_list_has_names_and_versions_only(name):
    assert pins.read(pins.LISTS / name)


def test_installed_versions(request):
    """--versions says what the environment must have."""
    kind = request.config.getoption("versions")
    versions, wrong = pins.closure(here(of_dev()))
    if kind == "pinned":
        wrong += pins.other_than_pinned(versions, pins.read(DEV))
    elif kind == "oldest":
        wrong += pins.above_their_lowest(here(of_dev()), versions)
    assert not wrong, f"--versions {kind}: " + "; ".join(wrong)


def versions_in(text: str) -> dict[str, list[str]]:
    """Return the rows of docs/compatibility.md: name -> oldest, pinned, latest."""
    rows = re.findall(r"^\| ([a-z-]+) \| ([\d.]+) \| ([\d.]+) \| ([\d.]+) \|$", text, re.MULTILINE)
    return {name: versions for name, *versions in rows}


def outdated(text: str, pyproject: dict, listed: pins.Pins) -> list[str]:
    """Return what differs from the ends of pyproject.toml's ranges and the list's version."""
    rows, wrong = versions_in(text), []
    linux = pins.environment("3.12", "Linux", "x86_64")
    needed = {r.name: r for r in pins.direct(pyproject, ["dev"]) if pins.applies(r, linux)}
    for name, (oldest, pinned, latest) in rows.items():
        if pins.above_their_lowest([needed[name]], {name: oldest}):
            wrong.append(f"{name}: {oldest} is not the lower end of {needed[name].specifier}")
        if latest not in needed[name].specifier:
            wrong.append(f"{name}: {latest} is not in {needed[name].specifier}")
        wrong += pins.other_than_pinned({name: pinned}, listed)
    return wrong


def test_the_table_of_versions():
    text = (pins.PROJECT / "docs/compatibility.md").read_text()
    project, listed = pins.pyproject(), pins.read(DEV)
    assert {"torch", "megatron-core", "transformers", "numpy", "triton"} == set(versions_in(text))
    assert not outdated(text, project, listed)
    for planted in ("| torch | 2.12.0 | 2.14.1 |", "| torch | 2.11.0 | 2.14.0 |"):
        changed = re.sub(r"\| torch \| [\d.]+ \| [\d.]+ \|", planted, text)
        assert len(outdated(changed, project, listed)) == 1


# --- planted disagreements ---


@dataclass
class Package:
    version: str
    requires: list[str] = field(default_factory=list)


INSTALLED = {
    "kernels": Package("2.1", ["base>=1", "windows-only; sys_platform == 'win32'"]),
    "base": Package("1.4", ["left-pad", "fast; extra == 'speed'"]),
    "left-pad": Package("3.0"),
}
LIST = "base==1.4\nkernels==2.1\nleft-pad==3.0 ; python_version >= '3.12'\n"
NEEDED = ["kernels>=2,<3"]


def installed(packages: dict[str, Package]):
    def find(name: str) -> Package:
        if name not in packages:
            raise importlib.metadata.PackageNotFoundError(name)
        return packages[name]

    return find


def disagreements(tmp_path, needed=NEEDED, lines=LIST, packages=INSTALLED) -> list[str]:
    (tmp_path / "list.txt").write_text(lines)
    listed, needed = pins.read(tmp_path / "list.txt"), list(map(Requirement, needed))
    versions, wrong = pins.closure(needed, installed(packages))
    wrong += pins.other_than_pinned(versions, listed)
    return wrong + pins.outside_their_range(needed, listed, default_environment())


def test_agreement_passes(tmp_path):
    assert disagreements(tmp_path) == []
    cpu_build = INSTALLED | {"kernels": Package("2.1+cpu", ["base"])}
    assert disagreements(tmp_path, packages=cpu_build) == []


@pytest.mark.parametrize(
    ("planted", "found"),
    [
        ({"needed": ["kernels>=2.2,<3"]}, "kernels is pinned at 2.1, and pyproject.toml asks for"),
        ({"needed": ["kernels>=2.2,<3"]}, "kernels 2.1 is installed, and pyproject.toml asks for"),
        ({"needed": [*NEEDED, "tables"]}, "tables is not in the list"),
        ({"needed": [*NEEDED, "tables"]}, "tables, which pyproject.toml asks for, is not"),
        ({"needed": [*NEEDED, "base[speed]"]}, "fast, which base asks for, is not installed"),
        ({"lines": LIST.replace("kernels==2.1\n", "")}, "kernels is not in the list"),
        ({"lines": LIST.replace(">= '3.12'", "< '3.12'")}, "left-pad is not in the list"),
        ({"lines": LIST.replace("base==1.4\n", "base==1.5\n")}, "base 1.4 is installed, 1.5 is"),
        ({"lines": LIST + "base==1.5\n"}, "base has 2 versions in the list"),
        (
            {"packages": INSTALLED | {"left-pad": Package("3.0.1")}},
            "left-pad 3.0.1 is installed, 3.0 is pinned",
        ),
        (
            {"packages": INSTALLED | {"base": Package("0.9", ["left-pad"])}},
            "base 0.9 is installed, and kernels asks for >=1",
        ),
        (
            {"packages": {k: v for k, v in INSTALLED.items() if k != "left-pad"}},
            "left-pad, which base asks for, is not installed",
        ),
    ],
)
def test_a_planted_disagreement_is_found(tmp_path, planted, found):
    assert any(sentence.startswith(found) for sentence in disagreements(tmp_path, **planted))


@pytest.mark.parametrize(
    "line",
    [
        "--extra-index-url https://example.org/simple",
        "-i https://example.org/simple",
        "base @ https://example.org/base-1.4-py3-none-any.whl",
        "-e .",
        "./base-1.4-py3-none-any.whl",
        "base>=1.4",
        "base==1.*",
        "base==1.4,<2",
        "base[speed]==1.4",
        "base",
    ],
)
def test_lines_without_an_exact_version_are_refused(tmp_path, line):
    (tmp_path / "list.txt").write_text(f"left-pad==3.0\n{line}\n")
    with pytest.raises(ValueError, match=r"list\.txt, line 2: expected NAME==VERSION"):
        pins.read(tmp_path / "list.txt")


def test_a_version_above_the_lower_end_is_found():
    needed = list(map(Requirement, ["a>=8,<10", "b>=2.11,<3", "c==0.17.*", "d", "e>=1", "e>=2.1"]))
    versions = {"a": "8.0.0", "b": "2.11.0", "c": "0.17.0", "d": "1", "e": "2.1.3"}
    assert pins.above_their_lowest(needed, versions) == ["d has no lower end in pyproject.toml"]
    higher = versions | {"a": "9.0", "b": "2.12.0", "e": "2.2"}
    assert pins.above_their_lowest(needed[:3] + needed[4:], higher) == [
        "a 9.0 is installed, the lower end is 8",
        "b 2.12.0 is installed, the lower end is 2.11",
        "e 2.2 is installed, the lower end is 2.1",
    ]


def test_extras_of_extras_are_read():
    project = {
        "name": "x",
        "dependencies": ["a>=1"],
        "optional-dependencies": {"one": ["b"], "two": ["x[one]", "c"]},
    }
    assert {r.name for r in pins.direct({"project": project}, ["two"])} == {"a", "b", "c"}
