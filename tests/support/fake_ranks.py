"""One rank of a layout without the other ranks and without a GPU, to build models but not run."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from unittest import mock

import torch
from megatron.core import parallel_state
from torch.testing._internal.distributed.fake_pg import FakeStore


@dataclass(frozen=True)
class Layout:
    """Degrees of parallelism; ranks count TP fastest, then CP, data and pipeline."""

    tp: int = 1
    pp: int = 1
    dp: int = 1
    vp: int | None = None
    cp: int = 1

    @property
    def world(self) -> int:
        return self.tp * self.cp * self.dp * self.pp


@contextmanager
def fake_rank(layout: Layout, rank: int) -> Iterator[None]:
    """Set up Megatron's parallel state of one rank of `layout`; collectives do nothing."""
    torch.distributed.init_process_group(
        "fake", store=FakeStore(), rank=rank, world_size=layout.world
    )
    try:
        # A gloo group cannot use a fake store.
        parallel_state.initialize_model_parallel(
            layout.tp,
            layout.pp,
            virtual_pipeline_model_parallel_size=layout.vp,
            context_parallel_size=layout.cp,
            create_gloo_process_groups=False,
        )
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()


@contextmanager
def constructing_on(device: str) -> Iterator[None]:
    """Construct modules on `device` although Megatron and Transformer Engine ask for a GPU.

    Args:
        device: "meta" allocates nothing. "cpu" also has the tags that Transformer Engine sets when
            it initializes parameters, which it postpones on the meta device.
    """
    with (
        mock.patch("torch.cuda.is_available", return_value=True),
        mock.patch("torch.cuda.current_device", return_value=device),
        torch.device(device),
    ):
        yield
