"""What the CPU device layer (`kvshift_megatron.cpu`) replaces in torch and Megatron.

`torch.cuda.is_available` returns False, so that the data loader, `torch.compile` and Megatron take
their own CPU paths; it has a row only if a GPU could not be hidden. Dynamo needs no row: it traces
through the wrappers.
"""

import functools
from collections.abc import Callable, Iterator
from types import FunctionType, ModuleType
from typing import Any

from kvshift_megatron.upstream import dataset_helpers
from kvshift_megatron.upstream.substitutions import Substitution, Wrap

_LIKE = (
    "empty_like", "full_like", "ones_like", "rand_like", "randint_like", "randn_like", "zeros_like",
)  # fmt: skip
_OTHER_FACTORIES = ("normal", "from_file")
_NEW_METHODS = (
    "new", "new_empty", "new_empty_strided", "new_full", "new_ones", "new_tensor", "new_zeros",
)  # fmt: skip

_INITIALIZE = "megatron.training.initialize"
_DISTRIBUTED_OPTIMIZER = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_INFERENCE_LAYERS = "megatron.core.tensor_parallel.inference_layers"
_DISPATCHER = "megatron.core.transformer.moe.token_dispatcher"
_DELTA_NET = "megatron.core.ssm.gated_delta_net.common"
_ASYNC_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"


# fmt: off
def rows(
    devices: ModuleType, hooks: ModuleType, stand_ins: ModuleType, *, gpu_is_visible: bool
) -> list[Substitution]:
    """Return the table; the list of factory functions depends on the installed torch.

    Args:
        devices, hooks, stand_ins: modules of `kvshift_megatron.cpu` with the replacements.
        gpu_is_visible: whether CUDA had counted GPUs before the layer could hide them.
    """
    d, h, s = devices, hooks, stand_ins
    return [
        # Devices
        *(_value("CUDA had counted its GPUs before the CPU was requested.", s.no,
                 "torch.cuda.is_available") if gpu_is_visible else []),
        *_value("Megatron passes it as a device in some 200 places.", s.current_device,
                "torch.cuda.current_device"),
        *_wrap("It takes device='cuda' or pin_memory=True.", d.with_cpu_device,
               *factory_targets(), *new_method_targets()),
        *_wrap("It takes a CUDA device.", d.tensor_to, "torch.Tensor.to"),
        *_wrap("It moves to the GPU, and Module.cuda calls it.", d.tensor_cuda,
               "torch.Tensor.cuda"),
        *_value("Pinning needs a CUDA driver.", s.same_tensor, "torch.Tensor.pin_memory"),
        *_wrap("A checkpoint may name CUDA storages.", d.load_on_cpu, "torch.load"),
        *_wrap("The optimizer compares it with 'torch.cuda.FloatTensor'.", h.tensor_type,
               "torch.Tensor.type"),
        *_wrap("The parallel groups and the RNG tracker depend on it.", h.device_count,
               "torch.cuda.device_count"),
        *_value("It selects a GPU.", s.nothing, "torch.cuda.set_device"),
        *_value("It selects a GPU for a block.", s.DeviceContext, "torch.cuda.device"),
        *_value("Megatron asks for the architecture, and a CPU has none.", s.get_device_properties,
                "torch.cuda.get_device_properties"),
        *_value("Megatron asks for the architecture, and a CPU has none.", s.get_device_capability,
                "torch.cuda.get_device_capability"),
        *_value("Megatron logs it.", s.get_device_name, "torch.cuda.get_device_name"),
        # Streams and events
        *_value("It stays a class, as libraries annotate with it.", s.Stream, "torch.cuda.Stream"),
        *_value("It stays a class, as libraries annotate with it.", s.Event, "torch.cuda.Event"),
        *_value("A CPU has one queue.", s.current_stream,
                "torch.cuda.current_stream", "torch.cuda.default_stream"),
        *_value("A CPU has one queue.", s.stream_context, "torch.cuda.stream"),
        *_value("A CPU has one queue.", s.nothing, "torch.cuda.set_stream",
                "torch.Tensor.record_stream"),
        *_value("CPU work is done when the call returns.", s.nothing, "torch.cuda.synchronize"),
        *_value("Nothing is ever captured.", s.no, "torch.cuda.is_current_stream_capturing"),
        *_value("NVTX marks GPU timelines.", s.nothing, "torch.cuda.nvtx.range_push",
                "torch.cuda.nvtx.range_pop", "torch.cuda.nvtx.mark"),
        # Memory
        *_value("There is no CUDA memory to report.", s.memory_stats, "torch.cuda.memory_stats"),
        *_value("There is no CUDA memory to report.", s.mem_get_info, "torch.cuda.mem_get_info"),
        *_value("There is no CUDA memory to report.", s.zero, "torch.cuda.device_memory_used"),
        *_value("There is no CUDA memory to manage.", s.nothing, "torch.cuda.empty_cache",
                "torch.cuda.ipc_collect", "torch.cuda.reset_peak_memory_stats",
                "torch.cuda.reset_max_memory_allocated"),
        # Random numbers
        *_value("CPU dropout draws from the CPU generator.", s.get_rng_state,
                "torch.cuda.get_rng_state", "torch.cuda.random.get_rng_state"),
        *_value("CPU dropout draws from the CPU generator.", s.set_rng_state,
                "torch.cuda.set_rng_state", "torch.cuda.random.set_rng_state"),
        *_value("CPU dropout draws from the CPU generator.", s.manual_seed,
                "torch.cuda.manual_seed", "torch.cuda.random.manual_seed"),
        *_value("CPU dropout draws from the CPU generator.", s.initial_seed,
                "torch.cuda.initial_seed"),
        *_value("CPU dropout draws from the CPU generator.", s.DEFAULT_GENERATORS,
                "torch.cuda.default_generators"),
        *_wrap("It draws a seed, which must not move dropout's generator.", s.own_random_numbers,
               "torch.utils.data.DataLoader.__iter__"),
        *_value("The RNG tracker sets its state in a lazy call, and CUDA never starts.", s.call_now,
                "megatron.core.tensor_parallel.random._lazy_call"),
        # Megatron's start
        *_wrap("Megatron decorates functions that few runs call, and even that imports Inductor.",
               s.compile_at_first_call, "torch.compile"),
        *_value("Its fused functions, compiled at every start, are for GPUs.", s.not_compiled,
                "megatron.core.jit.jit_fuser"),
        *_wrap("It asserts CUDA unless told otherwise.", h.allow_no_cuda,
               f"{_INITIALIZE}.initialize_megatron"),
        *_wrap("It draws random tensors of each rank's shape before the weights are drawn.",
               s.keep_random_state, f"{_INITIALIZE}.set_jit_fusion_options"),
        *dataset_helpers.rows(),
        *_wrap("The defaults name Transformer Engine and NCCL.", h.filled_arguments,
               "megatron.training.arguments.parse_args"),
        # Experts
        *_wrap("It makes split sizes an array only if they come from a GPU, and gloo takes no "
               "tensor.", h.split_sizes, f"{_DISPATCHER}.maybe_move_tensor_to_cpu"),
        # Gated delta net
        *_value("Its layer asks for FLA's GPU kernels even if deterministic mode does without.",
                True, f"{_DELTA_NET}.HAVE_FLA", releases=">=0.19"),
        *_value("The one kernel of FLA that deterministic mode calls.", s.l2norm,
                f"{_DELTA_NET}.l2norm", releases=">=0.19"),
        # Multi-token prediction
        *_wrap("It compares with classes that are none without Transformer Engine, and fails.",
               h.no_without_transformer_engine,
               f"{_INFERENCE_LAYERS}.is_inference_column_parallel_linear", releases=">=0.20"),
        # Checkpoints
        *_wrap("It expects the state of a GPU's fused Adam.", h.distributed_optimizer,
               _DISTRIBUTED_OPTIMIZER),
        *_wrap("It assumes that training cannot change the tensors it copied from the GPU.",
               h.async_caller, _ASYNC_CALLER),
    ]
# fmt: on


def factory_targets() -> Iterator[str]:
    """Yield the dotted names of the functions that make tensors, the `*_like` family included."""
    yield from listed_factories()
    for name in (*_LIKE, *_OTHER_FACTORIES):
        yield f"torch.{name}"


def listed_factories() -> Iterator[str]:
    """Yield the dotted names of the functions that torch lists for `with torch.device(...)`."""
    # Call this before anything is wrapped: torch caches the list of function objects.
    from torch.utils._device import _device_constructors

    # `fft_fftfreq` and the like are names of C functions, which live in `torch.fft`.
    for name in sorted(function.__name__ for function in _device_constructors()):
        if name.startswith("fft_"):
            yield f"torch.fft.{name.removeprefix('fft_')}"
        elif name == "nested_tensor":
            yield "torch.nested.nested_tensor"
        else:
            yield f"torch.{name}"


def new_method_targets() -> Iterator[str]:
    """Yield the dotted names of the `Tensor.new_*` methods."""
    for name in _NEW_METHODS:
        yield f"torch.Tensor.{name}"


def _value(
    reason: str, value: Any, *targets: str, releases: str | None = None
) -> list[Substitution]:
    if isinstance(value, FunctionType):
        return _wrap(reason, functools.partial(_stand_in, value), *targets, releases=releases)
    return [Substitution(target, reason, value=value, releases=releases) for target in targets]


def _stand_in(function: Callable, original: Any) -> Callable:
    """Give each row its own function, so that `undo` can tell the originals apart by identity."""

    @functools.wraps(original)
    def stand_in(*args: Any, **kwargs: Any) -> Any:
        return function(*args, **kwargs)

    return stand_in


def _wrap(
    reason: str, wrap: Wrap, *targets: str, releases: str | None = None
) -> list[Substitution]:
    return [Substitution(target, reason, wrap=wrap, releases=releases) for target in targets]
