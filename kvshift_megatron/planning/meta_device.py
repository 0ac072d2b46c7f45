"""Put Megatron on the meta device: shapes without storage, ranks without processes.

The CPU device layer (`kvshift_megatron.cpu`) sends everything that Megatron puts on a GPU to one
device; here that device is meta. This module handles the rest, which needs values: numbers that are
read back, and messages.
"""

import contextlib
from argparse import Namespace
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode

from kvshift_megatron.upstream import planning_table, substitutions
from kvshift_megatron.upstream.substitutions import Applied

META = torch.device("meta")
aten = torch.ops.aten


def enter() -> None:
    """Send this process's "GPU" tensors to meta; this cannot be undone.

    The CPU device layer must be on and Megatron imported.
    """
    # Point-to-point calls look up the backend of the tensors' device.
    if "meta" not in (served := dist.Backend.backend_capability["fake"]):
        served.append("meta")
    substitutions.apply(
        planning_table.meta_device(
            META, norm=_norm, tensor_type=_type_of_a_gpu, build_model=_built_on_meta
        )
    )


def _norm(*_: Any) -> tuple[torch.Tensor, None]:
    """Return a norm, fp32 [1], without reading the gradients."""
    return torch.zeros(1, device=META), None


def _type_of_a_gpu(original: Callable) -> Callable:
    """Wrap `Tensor.type` to report a meta tensor as a GPU's."""

    def type(self: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        return answer.replace("torch.meta.", "torch.cuda.") if isinstance(answer, str) else answer

    return type


def _built_on_meta(original: Callable) -> Callable:
    """Wrap the builder: some modules are built on the default device and then moved."""

    def build_model(*args: Any, **kwargs: Any) -> Any:
        with META:
            return original(*args, **kwargs)

    return build_model


class MetaAnswers(TorchDispatchMode):
    """Supply the values that a meta tensor lacks.

    Whatever is read back is zero: no overflow, no NaN, no flag is set. Messages complete at once;
    those of host tensors go to the fake process group.
    """

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is aten._local_scalar_dense.default and args[0].is_meta:
            return torch.zeros((), dtype=args[0].dtype).item()
        if func is aten._to_copy.default and args[0].is_meta:
            target = kwargs.get("device")
            if target is not None and target.type == "cpu":
                return torch.zeros(args[0].shape, dtype=kwargs.get("dtype") or args[0].dtype)
        if func.namespace == "c10d" and any(t.is_meta for t in _tensors(args)):
            work = FakeWork().boxed()
            return work if len(func._schema.returns) == 1 else (args[0], work)
        return func(*args, **kwargs)


def _tensors(argument: Any) -> Iterator[torch.Tensor]:
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)


def samples(args: Namespace, names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """Yield micro-batches on meta without end, as Megatron's data loader does.

    Args:
        args: Megatron's, validated.
        names: Of further float32 entries.

    Yields:
        {name: [micro-batch size, sequence]}: int64 tokens, labels and position_ids, float32
        loss_mask and `names`; and a bool attention_mask [micro-batch size, 1, sequence, sequence]
        if one is asked for.
    """
    shape = (args.micro_batch_size, args.seq_length)
    while True:
        batch = {
            key: torch.zeros(shape, dtype=torch.int64, device=META)
            for key in ("tokens", "labels", "position_ids")
        }
        batch |= {key: torch.ones(shape, device=META) for key in ("loss_mask", *names)}
        if args.create_attention_mask_in_dataloader:
            mask = (shape[0], 1, shape[1], shape[1])
            batch["attention_mask"] = torch.ones(mask, dtype=torch.bool, device=META)
        yield batch


@contextlib.contextmanager
def loop_without_values(args: Namespace) -> Iterator[None]:
    """Fix what Megatron's training loop would decide by a value that it reads back.

    Args:
        args: Megatron's, validated.
    """
    args.do_train = True  # otherwise a broadcast sets it
    rows = planning_table.loop_without_values(compile_nothing=lambda **_: None, agree=_agrees)
    with Applied(rows):
        yield


def _agrees(original: Callable) -> Callable:
    """Wrap the check that all ranks have set a flag: assume that every rank is like this one."""

    def every_rank_agrees(flag: Any, group: Any) -> Any:
        original(flag, group=group)
        return flag

    return every_rank_agrees
