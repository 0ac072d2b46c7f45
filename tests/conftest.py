"""Set-up of all tests: on the CPU, even if there is a GPU."""

import contextlib
import os
import platform
from importlib import metadata
from pathlib import Path

import pytest

from kvshift_megatron import cpu
from tests.support import releases

# Set before anything imports torch; every process that a test starts inherits it.
os.environ["KVSHIFT_CPU"] = "1"
# Likewise. The tensors are small, and other tests need the other cores: threads that wait for each
# other would cost more than they save.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Likewise inherited. Ranks share few cores and often wait for each other. With this policy a rank
# that wakes up does not interrupt one that works, and small messages take a fifth of the time.
if hasattr(os, "SCHED_BATCH"):
    with contextlib.suppress(OSError):  # a sandbox may refuse it; this only costs time
        os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))


def pytest_addoption(parser):
    group = parser.getgroup("matrix", "tests against a release of megatron-core")
    group.addoption(
        "--megatron",
        metavar="VERSION or CHECKOUT",
        help="run the release matrix (tests/support/releases.py); stop unless the imported "
        "megatron-core is this one, or comes from this checkout of Megatron-LM, which also runs "
        "some tests of the entry point",
    )
    group.addoption(
        "--max-ranks", type=int, metavar="N", help="leave out layouts on more than N ranks"
    )
    parser.addoption(
        "--versions",
        choices=["pinned", "latest", "oldest"],
        default="pinned",
        help="versions that tests/project/test_requirements.py expects: those listed in "
        "tools/requirements, any in pyproject.toml's ranges, or the ranges' lower ends",
    )


def pytest_configure(config):
    wanted = config.getoption("megatron")
    if wanted is None:
        return
    # Resolved, as `make test-next` imports a checkout through a link.
    core, training = (Path(origin).resolve().parent for origin in releases.imported_from())
    found = releases.imported_version()
    checkout = releases.checkout(wanted)
    is_it = found == wanted if checkout is None else core.parent == checkout / "megatron"
    if not is_it or core.parent != training.parent:
        raise pytest.UsageError(
            f"--megatron {wanted}: Python imports release {found} from {core}, and {training}"
        )


def pytest_report_header(config):
    versions = [f"Python {platform.python_version()}"]
    for name in ("torch", "megatron-core", "transformers", "numpy", "triton"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions.append(f"{name} {metadata.version(name)}")
    return [", ".join(versions), f"megatron-core from {releases.imported_from()[0]}"]


def pytest_collection_modifyitems(config, items):
    wanted, most = config.getoption("megatron"), config.getoption("max_ranks")
    next_one = wanted is not None and releases.checkout(wanted) is not None
    version = wanted and releases.imported_version()
    kept, left_out = [], []
    for item in items:
        ranks = item.callspec.params.get("world_size", 1) if hasattr(item, "callspec") else 1
        outside = version is not None and releases.why_not_in_matrix(item.nodeid, next_one)
        (left_out if outside or (most and ranks > most) else kept).append(item)
        if version is not None and (why := releases.why_not_in_release(item.nodeid, version)):
            item.add_marker(pytest.mark.skip(reason=why))
    # What takes longest comes first.
    items[:] = sorted(kept, key=lambda item: _group(item.nodeid) != "ranks")
    config.hook.pytest_deselected(items=left_out)


# What one worker of pytest-xdist runs; other files are one each. Two long launches at once would
# starve each other: one worker runs the folders that launch ranks, the other nearly all else.
_GROUPS = {
    "tests/distributed/": "ranks",
    "tests/planning/": "ranks",
    "tests/training/faults/": "ranks",
    "tests/training/metrics/test_loop.py": "ranks",
    "tests/integration/test_model_forms.py": "forms",  # one rank at a time
    "tests/integration/test_stored_settings.py": "settings",  # likewise
    "tests/integration/": "ranks",
    "tests/packaging/": "packaging",  # one build for all
    "tests/convert/": "convert",  # one process group for all
}


def _group(test_id: str) -> str:
    file = test_id.partition("::")[0]
    return next((group for start, group in _GROUPS.items() if file.startswith(start)), file)


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config, log):
    # Not --dist loadgroup: with pytest 9.2 pytest-xdist 3.8 does not see the groups.
    from xdist.scheduler import LoadScopeScheduling

    # Without it each worker would launch the same ranks, and nothing would fail.
    assert hasattr(LoadScopeScheduling, "_split_scope")

    class ByGroup(LoadScopeScheduling):
        def _split_scope(self, nodeid):
            return _group(nodeid)

    return ByGroup(config, log)


@pytest.fixture(scope="module", autouse=True)
def _cpu_layer_off_between_files():
    # The planner and the recipes turn the CPU layer on and leave it on; the tests of its rows would
    # then pass without the row.
    yield
    if cpu.is_enabled():
        import torch.distributed

        # tests/convert has one process group for all its files.
        if not torch.distributed.is_initialized():
            cpu.disable()


@pytest.fixture(scope="module")
def _process_group():
    # Per module, not per session, as the CPU layer is off between files.
    # Imported here, so that tests that do not need Megatron do not wait for it.
    from tests.support.single_process import single_process

    with single_process():
        yield


@pytest.fixture
def megatron_rank(_process_group):
    """Seed one rank with Megatron's parallel state, on the CPU layer."""
    from tests.support.single_process import seed_everything

    seed_everything()
