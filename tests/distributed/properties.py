"""Properties of a parallel model, other than comparisons of two runs."""

from collections.abc import Callable

import torch
from megatron.core import parallel_state, tensor_parallel

from kvshift_megatron.checks.model import ModelCheck, describe, gather_layers
from kvshift_megatron.taps import initial_values
from tests.distributed import canonical, packed, traffic
from tests.distributed.cases import GQA, GQA2, MQA, VANILLA, WINDOW_3, Case
from tests.distributed.engine import build
from tests.distributed.plants import planted

# World size -> models whose initial taps, checkpoint entries and report are checked.
LAYOUTS = {
    1: [Case(GQA2)],
    2: [Case(GQA2, tp=2), Case(MQA, tp=2), Case(GQA, pp=2), Case(GQA, pp=2, vpp=2)],
    4: [Case(GQA, tp=4), Case(GQA2, tp=4), Case(MQA, tp=2, pp=2), Case(WINDOW_3, tp=4)],
}

# World size -> models run on packed documents; world size 1 runs each document alone.
_PACKED_MODELS = (GQA2, MQA, WINDOW_3)
PACKED = {
    1: [Case(model) for model in _PACKED_MODELS],
    2: [
        *(Case(model, cp=2) for model in _PACKED_MODELS),
        Case(GQA2, cp=2, planted_error="chunks_of_the_whole_sequence"),
        Case(GQA2, cp=2, planted_error="no_backward_exchange"),
    ],
    4: [
        *(Case(model, cp=4) for model in _PACKED_MODELS),
        Case(MQA, tp=2, cp=2),
        Case(GQA2, cp=4, planted_error="second_chunk_from_wrong_rank"),
    ],
}
TRAFFIC = {1: [], 2: [Case(GQA2, cp=2)], 4: [Case(GQA2, cp=4), Case(WINDOW_3, cp=4)]}


def properties(world_size: int) -> list[tuple[str, Case, Callable]]:
    """Return (name, layout, job that takes the layout's model chunks) for one world size."""
    found = []
    for case in LAYOUTS[world_size]:
        found.append((f"initial-taps-{case.name}", case, _initial_taps))
        found.append((f"sharded-state-dict-{case.name}", case, _sharded))
        found.append((f"report-{case.name}", case, _report))
    if world_size == 2:
        vanilla = Case(VANILLA, pp=2)
        found.append(("report-vanilla", vanilla, _report))
        found.append(("report-refuses-vanilla", vanilla, _refusal))
    for case in PACKED[world_size]:
        job = packed.alone if world_size == 1 else packed.packed
        found.append((f"packed-{case.name}", case, lambda case, _, job=job: job(case)))
    for case in TRAFFIC[world_size]:
        found.append((f"traffic-{case.name}", case, lambda case, _: traffic.of_one_layer(case)))
    return found


def run(case: Case, job: Callable):
    """Build the case's model in its layout and run `job` on it."""
    tensor_parallel.model_parallel_cuda_manual_seed(1234)
    # Megatron's seeds differ between pipeline stages and replicas; taps must not depend on them.
    torch.manual_seed(torch.distributed.get_rank())
    with planted(case.planted_error):
        return job(case, build(case))


def _initial_taps(case: Case, chunks) -> dict[str, torch.Tensor]:
    """Return the whole initial taps, by canonical name."""
    params = canonical.gather(chunks, lambda param: param)
    return {name: value for name, value in params.items() if ".alpha_" in name or ".beta_" in name}


def expected_initial_taps(case: Case, seed: int = 1234) -> dict[str, torch.Tensor]:
    """Compute the same from the definition; 1234 is Megatron's default seed."""
    groups = case.model.num_query_groups
    return {
        f"decoder.layers.{layer - 1}.self_attention.{name}": value.float()
        for layer in range(1, 5)
        for name, value in initial_values(case.model.kv_shift, seed, layer, groups).items()
    }


def _sharded(case: Case, chunks) -> list[dict]:
    """Gather all ranks' ShardedTensors of taps."""
    entries = []
    for chunk in chunks:
        metadata = {
            "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True)
        }
        for tensor in chunk.sharded_state_dict(metadata=metadata).values():
            if ".alpha_" in tensor.key or ".beta_" in tensor.key:
                entries.append(
                    {
                        "key": tensor.key,
                        "global_shape": tuple(tensor.global_shape),
                        "global_offset": tuple(tensor.global_offset),
                        "local_shape": tuple(tensor.local_shape),
                        "replica_id": tensor.replica_id,
                    }
                )
    gathered = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(gathered, entries)
    return [entry for part in gathered for entry in part]


def _report(case: Case, chunks) -> str:
    return describe(gather_layers(chunks))


def _refusal(case: Case, chunks) -> str:
    try:
        ModelCheck(GQA.kv_shift)(chunks)
    except ValueError as error:
        return str(error)
    return "not refused"
