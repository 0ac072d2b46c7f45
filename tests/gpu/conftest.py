"""These tests need a GPU and Transformer Engine: `make test-gpu`."""

import os

import pytest

# Set by tests/conftest.py: the other tests run on the CPU even if there is a GPU.
os.environ.pop("KVSHIFT_CPU", None)
# Otherwise Transformer Engine multiplies fp32 matrices in TF32, too coarse for these comparisons.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import torch

from tests.support.single_process import SEED


def pytest_configure(config):
    # Not a skip: a run that tests nothing must not pass.
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a GPU: torch.cuda.is_available() is False here")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise pytest.UsageError("tests/gpu needs Transformer Engine, which does not import here")
    config.addinivalue_line("filterwarnings", "ignore:::transformer_engine")


@pytest.fixture(scope="session")
def nccl_rank():
    """Set up one rank with Megatron's parallel state on the GPU."""
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel import model_parallel_cuda_manual_seed

    torch.cuda.set_device(0)
    torch.distributed.init_process_group(
        "nccl", store=torch.distributed.HashStore(), rank=0, world_size=1
    )
    parallel_state.initialize_model_parallel()
    torch.manual_seed(SEED)
    model_parallel_cuda_manual_seed(SEED)
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()
