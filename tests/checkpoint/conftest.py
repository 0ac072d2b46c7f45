"""Fixtures: one Megatron rank in this process, for the models whose logits are compared."""

import pytest


@pytest.fixture(scope="session")
def megatron_rank():
    from tests.unit.single_process import seed_everything, single_process

    with single_process():
        seed_everything()
        yield
