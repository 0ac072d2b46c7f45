"""Fixtures of the unit tests."""

import pytest


@pytest.fixture(scope="module")
def _process_group():
    # Not for the session: the tests of the CPU layer expect to find it off.
    # Imported here: tests that need no Megatron should not wait for it.
    from tests.unit.single_process import single_process

    with single_process():
        yield


@pytest.fixture
def megatron_rank(_process_group):
    """One freshly seeded rank with Megatron's parallel state, on the CPU layer."""
    from tests.unit.single_process import seed_everything

    seed_everything()
