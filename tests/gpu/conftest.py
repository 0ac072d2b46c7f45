"""These tests need a GPU and Transformer Engine: `make test-gpu`."""

import os

import pytest

# The other tests run on the CPU wherever they are.
os.environ.pop("KVSHIFT_CPU", None)
# Transformer Engine multiplies fp32 matrices in TF32; a comparison in fp32 means fp32.
os.environ["NVIDIA_TF32_OVERRIDE"] = "0"

import torch

from tests.support.single_process import SEED


def pytest_configure(config):
    # Not a skip: a run that tested nothing would look green.
    if not torch.cuda.is_available():
        raise pytest.UsageError("tests/gpu needs a GPU: torch.cuda.is_available() is False here")
    from megatron.core.extensions.transformer_engine import HAVE_TE

    if not HAVE_TE:
        raise pytest.UsageError("tests/gpu needs Transformer Engine, which does not import here")
    config.addinivalue_line("filterwarnings", "ignore:::transformer_engine")


@pytest.fixture(scope="session")
def nccl_rank():
    """One rank with Megatron's parallel state on the GPU."""
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
