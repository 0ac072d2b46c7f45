"""These tests need Slurm and root: `make test-slurm` installs the one and checks for the other."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm
from tests.slurm.jobs import Jobs


def pytest_configure(config):
    # Not a skip: a run without Slurm would look green and have tested nothing.
    if lacking := slurm.missing():
        raise pytest.UsageError(
            f"tests/slurm needs {', '.join(lacking)}, which this machine does not give: run "
            "`make test-slurm` as root, which installs Slurm"
        )


@pytest.fixture(scope="session")
def folder(request):
    """An empty folder; kept where a test failed, for its logs."""
    path = Path(tempfile.mkdtemp(prefix="kvshift-slurm-"))
    yield path
    if request.session.testsfailed:
        print(f"kept: {path}")
    else:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def cluster(folder):
    """A cluster of two nodes that all tests share."""
    with slurm.Cluster(folder / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def jobs(cluster, folder):
    """Submits the shipped script to the cluster."""
    return Jobs(cluster, folder)
