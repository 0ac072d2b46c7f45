"""Check the lists of exact versions in tools/requirements against pyproject.toml and installations.

Each check returns what disagrees, in one sentence each.
"""

import re
import sys
import tomllib
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path

from packaging.markers import default_environment
from packaging.requirements import InvalidRequirement, Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = Path(__file__).parents[2]
LISTS = PROJECT / "tools/requirements"

_SITE_FOLDERS = ("site-packages", "dist-packages")

Pins = dict[str, list[Requirement]]
Installed = Callable[[str], metadata.Distribution]


def read(path: Path) -> Pins:
    """Read a list: the lines of each name, for all platforms.

    Raises:
        ValueError: A line is not NAME==VERSION, with or without a marker, but for example an
            index, a path or a range.
    """
    pins: Pins = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        text = line.partition("#")[0].strip()
        if not text:
            continue
        try:
            pin = Requirement(text)
            exact = re.fullmatch(r"==[^*,]+", str(pin.specifier)) and not (pin.url or pin.extras)
        except InvalidRequirement:
            exact = False
        if not exact:
            raise ValueError(f"{path.name}, line {number}: expected NAME==VERSION, found {text!r}")
        pins.setdefault(canonicalize_name(pin.name), []).append(pin)
    return pins


def direct(pyproject: dict, extras: Iterable[str]) -> list[Requirement]:
    """Return the requirements of the package and of these extras, including extras of extras."""
    project = pyproject["project"]
    found, open_extras, seen = list(project["dependencies"]), list(extras), set()
    while open_extras:
        extra = open_extras.pop()
        if extra in seen:
            continue
        seen.add(extra)
        for line in project["optional-dependencies"][extra]:
            requirement = Requirement(line)
            if canonicalize_name(requirement.name) == project["name"]:
                open_extras += requirement.extras
            else:
                found.append(line)
    return [Requirement(line) for line in found]


def pyproject() -> dict:
    return tomllib.loads((PROJECT / "pyproject.toml").read_text())


def applies(requirement: Requirement, environment: dict, extras: Iterable[str] = ("",)) -> bool:
    return requirement.marker is None or any(
        requirement.marker.evaluate({**environment, "extra": extra}) for extra in extras
    )


def environment(python: str, system: str, machine: str) -> dict:
    """Return the values that markers read, for example of "3.13", "Linux" and "aarch64"."""
    return {
        **default_environment(),
        "python_version": python,
        "python_full_version": f"{python}.0",
        "platform_system": system,
        "sys_platform": system.lower(),
        "platform_machine": machine,
        "os_name": "posix",
    }


def pinned(pins: Pins, name: str, environment: dict) -> Requirement | str:
    """Return the only line for this name and environment, or what is wrong."""
    lines = [pin for pin in pins.get(canonicalize_name(name), []) if applies(pin, environment)]
    if len(lines) == 1:
        return lines[0]
    found = "is not in the list" if not lines else f"has {len(lines)} versions in the list"
    python, machine = environment["python_version"], environment["platform_machine"]
    return f"{name} {found} (Python {python}, {environment['platform_system']}, {machine})"


def outside_their_range(
    requirements: list[Requirement], pins: Pins, environment: dict
) -> list[str]:
    """Return direct requirements without a version in the list, or with one outside their range."""
    wrong = []
    for requirement in requirements:
        if not applies(requirement, environment):
            continue
        pin = pinned(pins, requirement.name, environment)
        if isinstance(pin, str):
            wrong.append(pin)
        elif not requirement.specifier.contains(_version(pin), prereleases=True):
            wrong.append(
                f"{pin.name} is pinned at {_version(pin)}, and pyproject.toml asks for "
                f"{requirement.specifier}"
            )
    return wrong


def in_this_environment(name: str) -> metadata.Distribution:
    """Return importlib.metadata's distribution, ignoring releases that PYTHONPATH puts first."""
    folders = [folder for folder in sys.path if Path(folder).name in _SITE_FOLDERS]
    for found in metadata.distributions(name=name, path=folders):
        return found
    raise metadata.PackageNotFoundError(name)


def closure(
    requirements: list[Requirement], installed: Installed = in_this_environment
) -> tuple[dict[str, str], list[str]]:
    """Follow requirements through the metadata of what is installed.

    Returns:
        (installed versions by name, a sentence for each requirement that is not met).
    """
    here = default_environment()
    versions, wrong, done = {}, [], set()
    todo = [(requirement, "pyproject.toml") for requirement in requirements]
    while todo:
        requirement, who = todo.pop()
        name = canonicalize_name(requirement.name)
        try:
            found = installed(name)
        except metadata.PackageNotFoundError:
            wrong.append(f"{name}, which {who} asks for, is not installed")
            continue
        versions[name] = found.version
        if not requirement.specifier.contains(found.version, prereleases=True):
            wrong.append(
                f"{name} {found.version} is installed, and {who} asks for {requirement.specifier}"
            )
        for extra in {"", *requirement.extras}:
            if (name, extra) in done:
                continue
            done.add((name, extra))
            further = map(Requirement, found.requires or [])
            todo += [(next_, name) for next_ in further if applies(next_, here, [extra])]
    return versions, wrong


def other_than_pinned(versions: dict[str, str], pins: Pins) -> list[str]:
    """Return what is installed at a version other than the list's, or not in the list."""
    wrong = []
    for name, version in versions.items():
        pin = pinned(pins, name, default_environment())
        if isinstance(pin, str):
            wrong.append(pin)
        # 2.14.1 also accepts the build 2.14.1+cpu.
        elif not pin.specifier.contains(version, prereleases=True):
            wrong.append(f"{name} {version} is installed, {_version(pin)} is pinned")
    return wrong


def above_their_lowest(requirements: list[Requirement], versions: dict[str, str]) -> list[str]:
    """Return direct requirements that are installed above the lower end of their range."""
    lowest: dict[str, str] = {}
    for requirement in requirements:
        name = canonicalize_name(requirement.name)
        for part in requirement.specifier:
            bound = part.version.removesuffix(".*")
            if part.operator in (">=", "==") and Version(bound) > Version(lowest.get(name, "0")):
                lowest[name] = bound
    wrong = []
    for name in {canonicalize_name(requirement.name) for requirement in requirements}:
        if name not in lowest:
            wrong.append(f"{name} has no lower end in pyproject.toml")
        elif _cut(versions[name], lowest[name]) != _cut(lowest[name], lowest[name]):
            wrong.append(f"{name} {versions[name]} is installed, the lower end is {lowest[name]}")
    return sorted(wrong)


def _cut(version: str, like: str) -> list[int]:
    """Cut a release to the places of another: [8] for 8.0.0 like 8."""
    places = len(Version(like).release)
    return [*Version(version).release, 0, 0, 0][:places]


def _version(pin: Requirement) -> str:
    return str(pin.specifier).removeprefix("==")
