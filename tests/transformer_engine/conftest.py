"""These tests need an environment with Transformer Engine: `make test-te` makes it."""

import pytest
import torch  # noqa: F401  (first: Transformer Engine's libraries need torch's)
from megatron.core.extensions.transformer_engine import HAVE_TE


def pytest_configure(config):
    # Its warnings about environment variables for runs on GPUs.
    config.addinivalue_line("filterwarnings", "ignore:::transformer_engine")
    # Not a skip: a run that tests nothing must not pass.
    if not HAVE_TE:
        raise pytest.UsageError(
            "tests/transformer_engine needs Transformer Engine, which this environment does not "
            "have: run `make test-te`, which makes one with it"
        )
