"""Puts Megatron on the meta device: shapes without storage, ranks without processes.

The CPU device layer (`kvshift_megatron.cpu`) sends everything that Megatron asks of a GPU to one
device; here that device is meta. What remains is what has no value without storage: a number read
back, and a message.
"""

import contextlib
from argparse import Namespace
from collections.abc import Iterator
from unittest import mock

import torch
import torch.distributed as dist
import torch.testing._internal.distributed.fake_pg  # registers the backend
from torch._C._distributed_c10d import FakeWork
from torch.utils._python_dispatch import TorchDispatchMode

from kvshift_megatron.cpu import devices, stand_ins

META = torch.device("meta")
aten = torch.ops.aten


def enter() -> None:
    """Sends this process's "GPU" tensors to meta, for good: for a process that does nothing else.

    The CPU device layer must be on and Megatron imported.
    """
    from megatron.core.optimizer import clip_grads

    from kvshift_megatron.training import gpt_builder

    # Point-to-point calls look for the backend of the tensors' device.
    if "meta" not in (served := dist.Backend.backend_capability["fake"]):
        served.append("meta")
    devices.CPU = stand_ins.CPU = META
    type_of, build_model = torch.Tensor.type, gpt_builder.KVShiftGPTModelBuilder.build_model

    def type(self, *args, **kwargs):
        # The optimizer sorts parameters by the names of a GPU's tensors.
        answer = type_of(self, *args, **kwargs)
        return answer.replace("torch.meta.", "torch.cuda.") if isinstance(answer, str) else answer

    def build(*args, **kwargs):
        # Some modules are built on the default device and moved to the GPU afterwards, which on
        # meta would make new parameters without Megatron's attributes.
        with META:
            return build_model(*args, **kwargs)

    # Reads every gradient's norm back, where a GPU's kernel does not.
    clip_grads.l2_norm_impl = lambda *_: (torch.zeros(1, device=META), None)
    torch.Tensor.type = type
    gpt_builder.KVShiftGPTModelBuilder.build_model = build


class MetaAnswers(TorchDispatchMode):
    """Answers where a value would be needed.

    Whatever is read back is zero: no overflow, no NaN, no flag is set. Messages are done at once;
    those of host tensors go to the fake process group.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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


def _tensors(argument):
    if isinstance(argument, torch.Tensor):
        yield argument
    elif isinstance(argument, list | tuple):
        for part in argument:
            yield from _tensors(part)


def samples(args: Namespace, names: tuple[str, ...]) -> Iterator[dict[str, torch.Tensor]]:
    """An endless stream of micro-batches on meta, as Megatron's data loader yields them.

    Args:
        args: Megatron's, validated.
        names: of further float32 entries.
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
    """Megatron's training loop where it decides by a value that it reads back.

    Args:
        args: validated.
    """
    from megatron.training import training

    args.do_train = True  # else it is what a broadcast says
    agree = training.logical_and_across_model_parallel_group

    def every_rank_agrees(flag, group):
        agree(flag, group=group)
        return flag

    with (
        # It warms up compiled functions, and nothing is compiled here.
        mock.patch.object(training, "set_jit_fusion_options", lambda **_: None),
        mock.patch.object(training, "logical_and_across_model_parallel_group", every_rank_agrees),
    ):
        yield
