"""One build and one installation for all tests of this folder."""

from pathlib import Path

import pytest

from tests.packaging import builds


@pytest.fixture(scope="session")
def source(tmp_path_factory) -> Path:
    """Make a clean copy of the checkout."""
    return builds.copy_tracked(tmp_path_factory.mktemp("source"))


@pytest.fixture(scope="session")
def built(source, tmp_path_factory) -> tuple[Path, Path]:
    """Build (sdist, wheel), the wheel from the sdist."""
    return builds.build(source, tmp_path_factory.mktemp("dist"))


@pytest.fixture(scope="session")
def installed(built, tmp_path_factory) -> builds.Installation:
    """Install the wheel in a new environment."""
    return builds.install(built[1], tmp_path_factory.mktemp("installed") / "venv")
