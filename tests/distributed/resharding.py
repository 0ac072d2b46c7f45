"""Which layouts save a checkpoint, which load it, and which errors are planted."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from unittest import mock

from kvshift_megatron.attention import self_attention
from tests.distributed.cases import BF16, GATE, GQA, GQA2, MQA, WINDOW_3, Case

# After the second step Adam's moments hold the gradients of two steps.
SAVED_AFTER = 2
STEPS = 4


@dataclass(frozen=True)
class Layout:
    """A case on a number of ranks."""

    ranks: int
    case: Case

    @property
    def name(self) -> str:
        return f"{self.ranks}-{self.case.name}"


# Number of ranks -> layouts, as fields of Case.
_PLAIN = {
    1: [{}],
    2: [{"tp": 2}, {"pp": 2}, {"cp": 2}],
    4: [{"tp": 4}, {"tp": 2, "pp": 2}, {"tp": 2, "cp": 2}],
}
# Ranks that tensor, pipeline and context parallelism do not use are data-parallel.
_SHARDED_OPTIMIZER = {1: [{}], 2: [{}, {"cp": 2}], 4: [{"tp": 4}, {"tp": 2, "sp": True}]}
_PIPELINES = {1: [{}], 2: [{"pp": 2, "vpp": 2}], 4: [{"tp": 2, "pp": 2}]}
_SHARED_GROUPS = {1: [{}], 2: [{"tp": 2}], 4: [{"tp": 4}]}


def _family(model, layouts: dict, distributed_optimizer: bool = False) -> list[Layout]:
    return [
        Layout(ranks, Case(model, distributed_optimizer=distributed_optimizer, **fields))
        for ranks, each in layouts.items()
        for fields in each
    ]


# Two layers instead of the other tests' four: enough to tell layers apart.
_GQA, _GQA2, _BF16, _MQA = (
    replace(model, transformer={"num_layers": 2}) for model in (GQA, GQA2, BF16, MQA)
)

# Layouts of one model and one kind of optimizer state; each loads what every one has saved.
FAMILIES = {
    "gqa4": _family(_GQA, _PLAIN),
    "gqa2-distopt": _family(_GQA2, _SHARDED_OPTIMIZER, True),
    "bf16-gqa2": _family(_BF16, _SHARED_GROUPS),
    "bf16-mqa-distopt": _family(replace(_MQA, name="bf16-mqa", bf16=True), _SHARED_GROUPS, True),
    "window3": _family(WINDOW_3, _PIPELINES),
    "bf16-gate-distopt": _family(replace(GATE, name="bf16-gate", bf16=True), _PIPELINES, True),
}


@dataclass(frozen=True)
class Plant:
    """An error in how taps are declared while `saver` saves, and perhaps while `loader` loads."""

    saver: Layout
    loader: Layout
    declared: Callable
    while_loading: bool

    @property
    def name(self) -> str:
        return self.declared.__name__.strip("_")


def in_force(declared: Callable | None) -> AbstractContextManager:
    """Return a context in which this function declares the taps to Megatron's checkpoints."""
    if declared is None:
        return nullcontext()
    return mock.patch.object(self_attention, "make_sharded_tensors_for_checkpoint", declared)


_right = self_attention.make_sharded_tensors_for_checkpoint


def _one_ranks_groups_for_all(tensors, prefix, tensor_parallel_layers_axis_map, **kwargs):
    """Save one rank's groups for all, as Megatron does for parameters that are not declared."""
    return _right(tensors, prefix, tensor_parallel_layers_axis_map={}, **kwargs)


def _groups_swapped(*args, **kwargs):
    """Swap the groups of the first and the last tensor-parallel rank."""
    sharded = _right(*args, **kwargs)
    for tensor in sharded.values():
        *others, offset = tensor.global_offset
        last = tensor.global_shape[-1] - tensor.local_shape[-1]
        tensor.global_offset = (*others, last - offset)
    return sharded


_TP_2, _SINGLE = Layout(2, Case(_GQA, tp=2)), Layout(1, Case(_GQA))
PLANTS = [
    Plant(_TP_2, _TP_2, _one_ranks_groups_for_all, while_loading=True),
    Plant(_TP_2, _SINGLE, _groups_swapped, while_loading=False),
]
