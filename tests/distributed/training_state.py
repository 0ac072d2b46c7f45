"""A model and its optimizer: built for a case, saved, loaded, and read as whole tensors.

Saving and loading call Megatron's distributed checkpoints as megatron.training.checkpointing does.
Reading is independent of them (canonical.py, and the optimizer's own tensors), to check them.
"""

from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.serialization import (
    get_default_load_sharded_strategy,
    get_default_save_sharded_strategy,
)
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelLoadStrategyWrapper,
    FullyParallelSaveStrategyWrapper,
)
from torch import Tensor

from tests.distributed import canonical, engine
from tests.distributed.cases import Case

# What an optimizer keeps of a parameter; "main" is what it updates, for bf16 a copy in fp32.
_KINDS = ("main", "exp_avg", "exp_avg_sq")


class TrainingState(NamedTuple):
    case: Case
    chunks: list[torch.nn.Module]
    optimizer: object


def start(case: Case) -> TrainingState:
    """Build a model with canonical weights, and an optimizer, at the current layout."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    chunks, optimizer = engine.prepare(case, engine.build(case))
    return TrainingState(case, chunks, optimizer)


def train(state: TrainingState, steps: range) -> list[float]:
    """Train these steps, whose samples depend on the step's number alone; return the losses."""
    losses = []
    for step in steps:
        losses.append(engine.forward_backward(*state, step))
        assert state.optimizer.step()[0]
    return losses


def save(state: TrainingState, directory: Path) -> None:
    """Write each rank's part; with a distributed optimizer, data-parallel ranks share the work."""
    if torch.distributed.get_rank() == 0:
        directory.mkdir()
    torch.distributed.barrier()
    metadata = {"singleton_local_shards": False, "chained_optim_avoid_prefix": True}
    if state.case.distributed_optimizer:
        metadata["distrib_optim_sharding_type"] = "fully_reshardable"
        metadata["distrib_optim_fully_reshardable_mem_efficient"] = False
    strategy = get_default_save_sharded_strategy("torch_dist")
    if state.case.distributed_optimizer:
        strategy = FullyParallelSaveStrategyWrapper(strategy, _data_parallel_group())
    dist_checkpointing.save(
        _sharded(state, metadata), str(directory), strategy, content_metadata=metadata
    )


def load(state: TrainingState, directory: Path) -> None:
    """Load; with a distributed optimizer, data-parallel ranks read for each other."""
    metadata = dist_checkpointing.load_content_metadata(str(directory))
    strategy = None
    if state.case.distributed_optimizer:
        strategy = FullyParallelLoadStrategyWrapper(
            get_default_load_sharded_strategy(str(directory)),
            _data_parallel_group(),
        )
    loaded = dist_checkpointing.load(
        _sharded(state, metadata, is_loading=True), str(directory), strategy
    )
    for i, chunk in enumerate(state.chunks):
        chunk.load_state_dict(loaded[f"model{i}"])
    state.optimizer.load_state_dict(loaded["optimizer"])


def _sharded(state: TrainingState, metadata: dict, **is_loading) -> dict:
    metadata = {**metadata, "dp_cp_group": _data_parallel_group()}
    sharded = {
        f"model{i}": _unwrapped(chunk).sharded_state_dict(metadata=metadata)
        for i, chunk in enumerate(state.chunks)
    }
    optimizer = state.optimizer.sharded_state_dict(sharded, metadata=metadata, **is_loading)
    return {**sharded, "optimizer": optimizer}


def _data_parallel_group():
    return parallel_state.get_data_parallel_group(with_context_parallel=True)


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    while hasattr(module, "module"):
        module = module.module
    return module


@torch.no_grad()
def poison(state: TrainingState) -> None:
    """Put NaN, and -1 for the number of steps, into everything that a checkpoint must fill."""
    for chunk in state.chunks:
        for param in chunk.parameters():
            param.fill_(torch.nan)
    for optimizer in _optimizers(state):
        inner = optimizer.optimizer
        for main in (param for group in inner.param_groups for param in group["params"]):
            main.fill_(torch.nan)
            for kind, kept in inner.state.get(main, {}).items():
                kept.fill_(-1 if kind == "step" else torch.nan)


def whole(state: TrainingState) -> dict[str, Tensor]:
    """Gather every parameter and what the optimizer keeps of it, unsharded, on every rank.

    Returns:
        fp32 tensors under "param NAME", "main NAME", "exp_avg NAME" and "exp_avg_sq NAME"; under
        "steps" the different numbers of steps that parameters have taken, ascending.
    """
    kept = _kept_by_optimizer(state)
    # All kinds together, in a last dimension: one exchange per parameter.
    gathered = canonical.gather(
        state.chunks, lambda param: torch.cat((param.float().unsqueeze(-1), kept[param]), -1)
    )
    result = {
        f"{kind} {name}": tensor
        for name, tensors in gathered.items()
        for kind, tensor in zip(("param", *_KINDS), tensors.unbind(-1), strict=True)
    }
    steps = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(steps, _steps(state))
    result["steps"] = torch.tensor(sorted(set().union(*steps)))
    return result


def _steps(state: TrainingState) -> set[float]:
    return {
        float(kept["step"])
        for optimizer in _optimizers(state)
        for kept in optimizer.optimizer.state.values()
    }


def _optimizers(state: TrainingState) -> list:
    return getattr(state.optimizer, "chained_optimizers", [state.optimizer])


def _kept_by_optimizer(state: TrainingState) -> dict[torch.nn.Parameter, Tensor]:
    """Return [*local shape, kinds] by parameter; collective with a distributed optimizer."""
    params = [param for chunk in state.chunks for param in chunk.parameters()]
    result = {}
    for optimizer in _optimizers(state):
        of = _of_shards if state.case.distributed_optimizer else _of_whole_parameters
        result |= of(optimizer, params)
    return result


def _of_whole_parameters(optimizer, params) -> dict:
    result = {}
    for param in params:
        # Without a copy in fp32 the optimizer updates the parameter itself.
        main = getattr(param, "main_param", None)
        main = param if main is None else main
        if main in optimizer.optimizer.state:
            result[param] = _kinds(optimizer, main)
    return result


def _of_shards(optimizer, params) -> dict:
    """Join the data-parallel ranks' shards."""
    result = {}
    mine = {param for buffer in optimizer.buffers for param in buffer.param_index_map}
    for param in (param for param in params if param in mine):
        whole = torch.zeros(param.numel(), len(_KINDS))
        if param in optimizer.model_param_group_index_map:
            part = optimizer._get_model_param_range_map(param)["param"]
            group, order = optimizer.model_param_group_index_map[param]
            main = optimizer.optimizer.param_groups[group]["params"][order]
            whole[part.start : part.end] = _kinds(optimizer, main)
        torch.distributed.all_reduce(whole, group=optimizer.data_parallel_group)
        result[param] = whole.view(*param.shape, len(_KINDS))
    return result


def _kinds(optimizer, main: Tensor) -> Tensor:
    kept = {**optimizer.optimizer.state[main], "main": main}
    return torch.stack([kept[kind].detach() for kind in _KINDS], -1)


def differences(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> list[str]:
    """Return a line for each tensor that is not bitwise equal."""
    if actual.keys() != expected.keys():
        return [f"only one of the two has {sorted(actual.keys() ^ expected.keys())}"]
    return [
        f"{name}: {list(actual[name].shape)} against {list(tensor.shape)}, largest difference "
        f"{_largest_difference(actual[name], tensor)}"
        for name, tensor in expected.items()
        if not torch.equal(actual[name], tensor)
    ]


def _largest_difference(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).abs().max()) if a.shape == b.shape else float("nan")
