"""Fixtures: one Megatron rank in this process, for the models whose logits are compared."""

import pytest


# Of the package and not of the session: other packages' tests make process groups of their own.
@pytest.fixture(scope="package")
def megatron_rank():
    from tests.support.single_process import seed_everything, single_process

    with single_process():
        seed_everything()
        yield
