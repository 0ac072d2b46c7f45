"""Give a model the same weights at every layout, and gather whole tensors from any layout.

This does not use the package's checkpoint code, which it helps to check: a parameter's whole tensor
is drawn from its name, and its slice follows from Megatron's partition attributes alone.
"""

import re
import zlib

import torch
from megatron.core import parallel_state
from torch import Tensor


def canonical_name(name: str, chunk: torch.nn.Module) -> str:
    """Return a parameter's name with global numbers of its layer and expert, not the rank's own.

    Two layers of a hybrid model, attention and MLP, have the names of one GPT layer.
    """
    name = re.sub(r"(local_experts\.)(\d+)", _global_expert(chunk), name.replace("module.", ""))
    name = name.replace("decoder.final_norm.", "decoder.final_layernorm.")
    match = re.match(r"(decoder\.layers\.)(\d+)(\..*)", name)
    if match is None:
        return name
    module = _unwrapped(chunk)
    number = module.decoder.layers[int(match.group(2))].layer_number - 1
    if hasattr(module, "hybrid_layer_pattern"):
        number //= 2
    return f"{match.group(1)}{number}{match.group(3)}"


def _unwrapped(module: torch.nn.Module) -> torch.nn.Module:
    while hasattr(module, "module"):
        module = module.module
    return module


def _global_expert(chunk: torch.nn.Module):
    """Return the replacement for matches of (prefix, number among this rank's experts)."""
    experts = _unwrapped(chunk).config.num_moe_experts or 0
    local = experts // parallel_state.get_expert_model_parallel_world_size()
    first = parallel_state.get_expert_model_parallel_rank() * local
    return lambda match: f"{match.group(1)}{first + int(match.group(2))}"


def fill(chunk: torch.nn.Module) -> None:
    """Overwrite every parameter of a model chunk with its slice of the canonical tensor."""
    tp = parallel_state.get_tensor_model_parallel_world_size()
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, param in chunk.named_parameters():
            shape, dim = list(param.shape), _partition_dim(param)
            if dim is not None:
                shape[dim] *= tp
            whole = _draw(canonical_name(name, chunk), shape)
            if dim is not None:
                whole = _parts(name, whole, tp, dim)[rank]
            param.copy_(whole)


def _draw(name: str, shape: list[int]) -> Tensor:
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    noise = torch.randn(shape, generator=generator)
    if "norm" in name:
        return 1.0 + 0.1 * noise
    if re.search(r"(alpha|beta)_", name):
        return 0.4 + 0.5 * noise
    return 0.1 * noise


def _partition_dim(param) -> int | None:
    return param.partition_dim if getattr(param, "tensor_model_parallel", False) else None


def _parts(name: str, whole: Tensor, tp: int, dim: int) -> list[Tensor]:
    """Return the ranks' slices. A gated fc1 holds [gate; up], which are sharded separately."""
    if "linear_fc1" in name:
        gate, up = whole.chunk(2, dim)
        return [torch.cat(p, dim) for p in zip(gate.chunk(tp, dim), up.chunk(tp, dim))]
    return list(whole.chunk(tp, dim))


def _join(name: str, parts: list[Tensor], dim: int) -> Tensor:
    if "linear_fc1" in name:
        gates, ups = zip(*(part.chunk(2, dim) for part in parts))
        return torch.cat([*gates, *ups], dim)
    return torch.cat(parts, dim)


def gather(chunks: list[torch.nn.Module], tensor_of) -> dict[str, Tensor]:
    """Gather whole tensors by canonical name, on every rank.

    Args:
        chunks: This rank's model chunks.
        tensor_of: Returns a tensor of a parameter's shape, such as its value or gradient.

    Raises:
        AssertionError: Tensor-parallel ranks hold different values of a replicated parameter.
    """
    group = parallel_state.get_tensor_model_parallel_group()
    result, differing = {}, []
    for chunk in chunks:
        for name, param in chunk.named_parameters():
            local = tensor_of(param).detach().float().contiguous()
            parts = [torch.empty_like(local) for _ in range(group.size())]
            torch.distributed.all_gather(parts, local, group=group)
            dim = _partition_dim(param)
            if dim is None:
                if any(not torch.equal(part, parts[0]) for part in parts):
                    differing.append(name)
                whole = parts[0]
            else:
                whole = _join(name, parts, dim)
            result[canonical_name(name, chunk)] = whole
    stages = [(result, differing)]
    for group in (
        parallel_state.get_pipeline_model_parallel_group(),
        parallel_state.get_expert_model_parallel_group(),
    ):
        if group.size() == 1:
            continue  # it would pickle every tensor
        parts = [None] * group.size()
        torch.distributed.all_gather_object(parts, stages, group=group)
        stages = [stage for part in parts for stage in part]
    # Checked after the last collective, so that no rank waits in one forever.
    differing = [name for _, names in stages for name in names]
    assert not differing, f"replicated, but differs between tensor-parallel ranks: {differing}"
    return {name: tensor for stage, _ in stages for name, tensor in stage.items()}
