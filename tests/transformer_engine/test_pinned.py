"""This environment has the versions that tools/requirements lists for it."""

from packaging.requirements import Requirement

from tests.support import pins


def test_installed_versions():
    lists = pins.read(pins.LISTS / "te.txt") | pins.read(pins.LISTS / "te-alone.txt")
    versions = {name: pins.in_this_environment(name).version for name in lists}
    wrong = pins.other_than_pinned(versions, lists)
    needed = [Requirement(line) for line in _lines(pins.LISTS / "te.in")]
    found, missing = pins.closure(needed)
    wrong += missing + pins.other_than_pinned(found, pins.read(pins.LISTS / "dev.txt") | lists)
    assert not wrong, "; ".join(wrong)


def _lines(path) -> list[str]:
    return [line for line in path.read_text().splitlines() if line and not line.startswith("#")]
