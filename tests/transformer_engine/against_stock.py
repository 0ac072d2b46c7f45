"""How a built KV-shifting model differs from stock Megatron's."""

import re
from typing import Any

import torch
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedTensorFactory, is_main_replica
from megatron.core.tensor_parallel import (
    set_defaults_if_not_set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.attention import SelfAttention

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention

_TAP = re.compile(r"(alpha|beta)_(logit_)?\d+$")


def is_tap(name: str) -> bool:
    """Return whether a parameter or state-dict key is a tap."""
    return _TAP.search(name.rpartition(".")[2]) is not None


def tags(parameter: torch.nn.Parameter) -> dict[str, Any]:
    """Return the attributes by which Megatron and Transformer Engine treat a parameter."""
    return {
        name: value
        for name, value in vars(parameter).items()
        if value is None or isinstance(value, bool | int | float | str)
    }


def differences(ours: torch.nn.Module, stock: torch.nn.Module) -> list[str]:
    """Return how a KV-shifting model differs from the stock model, in sentences.

    There are none if the models have the same modules, except for the attention's class, and the
    same parameters (shape, dtype, tags), state-dict keys and sharded_state_dict entries, except for
    the taps.
    """
    found = []
    for what, describe in {
        "module": _modules,
        "parameter": _parameters,
        "state-dict key": _state_dict,
        "sharded_state_dict entry": sharded_entries,
    }.items():
        found += _compare(what, describe(ours), describe(stock))
    stock_attentions = sum(type(module) is SelfAttention for module in stock.modules())
    shifting = sum(isinstance(module, KVShiftSelfAttention) for module in ours.modules())
    if shifting != stock_attentions:
        found.append(f"{shifting} of {stock_attentions} attentions shift")
    return found


def tap_problems(model: torch.nn.Module, tp: int) -> list[str]:
    """Return missing taps, and those whose shape, dtype or tags are not as in DESIGN.md."""
    found = []
    for path, module in model.named_modules():
        if not isinstance(module, KVShiftSelfAttention):
            continue
        groups, config = module.config.num_query_groups, module.config
        is_sharded = groups >= tp
        expected = (
            (groups // tp if is_sharded else groups,),
            config.params_dtype,
            _with_defaults(
                {"tensor_model_parallel": True, "partition_dim": 0, "partition_stride": 1}
                if is_sharded
                else {}
            ),
        )
        own = dict(module.named_parameters(recurse=False))
        if sorted(own) != ["alpha_1", "alpha_2", "beta_1", "beta_2"]:
            found.append(f"{path} has {sorted(own)}")
        for name, tap in own.items():
            actual = (tuple(tap.shape), tap.dtype, _with_defaults(tags(tap)))
            if actual != expected:
                found.append(f"{path}.{name} is {actual} and not {expected}")
    return found


def sharded_entries(model: torch.nn.Module) -> dict[str, list[tuple]]:
    """Return what is saved for each state-dict key: checkpoint key, shapes, offset, replica."""
    entries = {}
    for name, entry in model.sharded_state_dict().items():
        # A factory splits the tensor when the checkpoint is written (SwiGLU's gate and up).
        parts = entry.build() if isinstance(entry, ShardedTensorFactory) else [entry]
        entries[name] = [
            (
                type(part).__name__,
                part.key,
                tuple(part.global_shape),
                tuple(part.global_offset),
                getattr(part, "local_shape", None),
                part.replica_id,
            )
            for part in nested_values(parts)
        ]
    return entries


def saved_taps(model: torch.nn.Module) -> list[tuple[str, tuple, tuple, tuple]]:
    """Return (checkpoint key, global shape, offset, local shape) of the taps that this rank saves.

    Both shapes have the layer axis.
    """
    return [
        (
            entry.key,
            tuple(entry.global_shape),
            tuple(entry.global_offset),
            (1,) * entry.prepend_axis_num + tuple(entry.local_shape),
        )
        for name, entry in model.sharded_state_dict().items()
        if is_tap(name) and is_main_replica(entry.replica_id)
    ]


def _with_defaults(given: dict[str, Any]) -> dict[str, Any]:
    """Complete tags as Megatron does after building a model."""
    parameter = torch.nn.Parameter(torch.empty(0))
    for name, value in given.items():
        setattr(parameter, name, value)
    set_defaults_if_not_set_tensor_model_parallel_attributes(parameter)
    return tags(parameter)


def _compare(what: str, ours: dict[str, Any], stock: dict[str, Any]) -> list[str]:
    ours = {name: value for name, value in ours.items() if not is_tap(name)}
    found = [f"{what} {name} is stock Megatron's only" for name in stock if name not in ours]
    found += [f"{what} {name} is ours only" for name in ours if name not in stock]
    found += [
        f"{what} {name}: {ours[name]} and not {stock[name]}"
        for name in stock
        if name in ours and ours[name] != stock[name]
    ]
    return found


def _modules(model: torch.nn.Module) -> dict[str, type]:
    return {
        name: SelfAttention if type(module) is KVShiftSelfAttention else type(module)
        for name, module in model.named_modules()
    }


def _parameters(model: torch.nn.Module) -> dict[str, tuple]:
    return {
        name: (tuple(parameter.shape), parameter.dtype, str(parameter.device), tags(parameter))
        for name, parameter in model.named_parameters()
    }


def _state_dict(model: torch.nn.Module) -> dict[str, None]:
    return dict.fromkeys(model.state_dict())
