"""These tests need Slurm and root: `make test-slurm` installs Slurm and checks for root."""

import shutil
import tempfile
from pathlib import Path

import pytest

from tests.slurm import cluster as slurm
from tests.slurm.jobs import Jobs


def pytest_configure(config):
    # An error rather than a skip: a run without Slurm would pass without testing anything.
    if lacking := slurm.missing():
        raise pytest.UsageError(
            f"tests/slurm needs {', '.join(lacking)}, which this machine lacks: run `make "
            "test-slurm` as root, which installs Slurm"
        )


@pytest.fixture(scope="session")
def folder(request):
    """Make an empty folder; if a test fails it is kept, for its logs."""
    path = Path(tempfile.mkdtemp(prefix="kvshift-slurm-"))
    yield path
    if request.session.testsfailed:
        print(f"kept: {path}")
    else:
        shutil.rmtree(path)


@pytest.fixture(scope="session")
def cluster(folder):
    """Run a cluster of two nodes, which all tests share."""
    with slurm.Cluster(folder / "cluster") as running:
        yield running


@pytest.fixture(scope="session")
def jobs(cluster, folder):
    """Return what submits the shipped script to the cluster."""
    return Jobs(cluster, folder)
