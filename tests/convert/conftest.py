"""Fixture: one Megatron rank in this process, for tests that compare logits."""

import pytest


# Package scope, not session: tests of other packages create their own process groups.
@pytest.fixture(scope="package")
def megatron_rank():
    from tests.support.single_process import seed_everything, single_process

    with single_process():
        seed_everything()
        yield
