"""Wrappers for Megatron's own functions, and for torch's as Megatron calls them, on a CPU."""

import functools
import sys
from collections.abc import Callable
from typing import Any

import torch

from kvshift_megatron.cpu import flags

_ASYNC_MODULE = "megatron.core.dist_checkpointing.strategies.async_utils"


def _caller_is(prefix: str) -> bool:
    """Return whether our caller was called from the module `prefix` or one below it."""
    name = sys._getframe(2).f_globals.get("__name__", "")
    return name == prefix or name.startswith(prefix + ".")


def tensor_type(original: Callable) -> Callable:
    """Wrap `Tensor.type` to answer `torch.cuda.FloatTensor` to Megatron's optimizer.

    The optimizer sorts and checks parameters by these strings. Other callers get torch's answer.
    """

    @functools.wraps(original)
    def type(self: Any, *args: Any, **kwargs: Any) -> Any:
        answer = original(self, *args, **kwargs)
        if not args and not kwargs and _caller_is("megatron.core.optimizer"):
            return answer.replace("torch.", "torch.cuda.", 1)
        return answer

    return type


def device_count(original: Callable) -> Callable:
    """Wrap `torch.cuda.device_count` to return 1 to two callers.

    `megatron.training.initialize` sets up the parallel groups and the RNG tracker only if it is not
    0, and the process that writes checkpoints in the background divides by it.
    """

    @functools.wraps(original)
    def count() -> int:
        needs_one = _caller_is("megatron.training.initialize") or _caller_is(_ASYNC_MODULE)
        return 1 if needs_one else original()

    return count


def allow_no_cuda(original: Callable) -> Callable:
    """Wrap `initialize_megatron` to pass Megatron's own `allow_no_cuda=True`."""

    @functools.wraps(original)
    def initialize_megatron(*args: Any, **kwargs: Any) -> Any:
        kwargs["allow_no_cuda"] = True
        return original(*args, **kwargs)

    return initialize_megatron


def filled_arguments(original: Callable) -> Callable:
    """Wrap `parse_args` to add the flags that a CPU needs to `sys.argv` first."""

    @functools.wraps(original)
    def parse_args(*args: Any, **kwargs: Any) -> Any:
        sys.argv[1:] = flags.fill_flags(sys.argv[1:])
        return original(*args, **kwargs)

    return parse_args


def split_sizes(original: Callable) -> Callable:
    """Wrap `maybe_move_tensor_to_cpu` to return an array if asked for one, as for a GPU's tensor.

    The counts of the all-to-all dispatcher come this way; no tensor is taken for them.
    """

    @functools.wraps(original)
    def maybe_move_tensor_to_cpu(tensor: Any, as_numpy: bool = False, *args: Any, **kw: Any) -> Any:
        moved = original(tensor, as_numpy, *args, **kw)
        return moved.numpy() if as_numpy and torch.is_tensor(moved) else moved

    return maybe_move_tensor_to_cpu


def no_without_transformer_engine(original: Callable) -> Callable:
    """Wrap a question about a module to answer no if Transformer Engine is not installed."""

    @functools.wraps(original)
    def is_one(module: Any) -> bool:
        from megatron.core.extensions.transformer_engine import HAVE_TE

        return HAVE_TE and original(module)

    return is_one


def async_caller(original: type) -> type:
    """Derive a class that runs `--async-save`'s background process for tensors on the CPU."""

    @functools.wraps(original, updated=())
    class PersistentAsyncCaller(original):
        @classmethod
        def _get_process(cls, rank: int, mp_mode: str = "fork", *args: Any, **kwargs: Any) -> Any:
            # A spawned process would not have this layer.
            return super()._get_process(rank, "fork", *args, **kwargs)

        def schedule_async_call(self, async_req: Any) -> None:
            # On a GPU, training cannot change the copy on the CPU. Here there is no copy, so the
            # background process would write tensors that the next step has already changed.
            if async_req.preload_fn is not None:
                rank, _, *rest = async_req.async_fn_args
                buckets = [_copied(bucket) for bucket in async_req.preload_fn()]
                async_req = async_req._replace(
                    async_fn_args=(rank, buckets, *rest), preload_fn=None
                )
            super().schedule_async_call(async_req)

    return PersistentAsyncCaller


def _copied(bucket: tuple) -> tuple:
    """Return one of Megatron's write buckets with copies of its tensors."""
    file, key, (objects, tensors) = bucket
    return file, key, (objects, [(item, tensor.clone()) for item, tensor in tensors])


def distributed_optimizer(original: type) -> type:
    """Derive a distributed optimizer that can be loaded with torch's Adam inside it.

    Megatron's own fails there: it reads every parameter's step before there is one, looks for the
    step among the tensors of a checkpoint that stores it elsewhere, lets all parameters share one
    step tensor, and writes in place to fp32 parameters that require gradients.
    """

    @functools.wraps(original, updated=())
    class DistributedOptimizer(original):
        def state_dict(self) -> dict:
            _allocate_state(self.optimizer)
            return super().state_dict()

        def load_state_dict(self, state_dict: dict) -> None:
            super().load_state_dict(state_dict)
            for state in self.optimizer.state.values():
                if isinstance(state.get("step"), torch.Tensor):
                    state["step"] = state["step"].clone()

        @torch.no_grad()
        def _set_main_param_and_optimizer_states(self, model_param: Any, tensors: dict) -> None:
            # The step came with the parameter groups; one format also passes this rank's own here.
            super()._set_main_param_and_optimizer_states(model_param, {**tensors, "step": None})

    return DistributedOptimizer


def _allocate_state(optimizer: Any) -> None:
    """Give torch's Adam the state that it would create in its first step."""
    if isinstance(optimizer, torch.optim.Adam | torch.optim.AdamW) and not optimizer.state:
        for param in (param for group in optimizer.param_groups for param in group["params"]):
            moments = {key: torch.zeros_like(param) for key in ("exp_avg", "exp_avg_sq")}
            optimizer.state[param] = {"step": torch.tensor(0.0), **moments}


def cpu_rng_may_change(record: Any) -> bool:
    """Drop Megatron's warning that the CPU's generator changed: here it is also the GPU's."""
    return "CPU RNG state changed within GPU RNG context" not in record.getMessage()
