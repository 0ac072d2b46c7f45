"""Estimate how long a step takes, the one figure that is not counted.

The whole model:

    micro-batch  = (matmul FLOPs + half of the attention FLOPs, which the counter takes as if
                   nothing were masked) / (peak x matmul_efficiency)
                   + bytes of pointwise operations / (memory bandwidth x memory_efficiency)
                   + messages of TP, CP and PP, none of them hidden
    pipeline     = micro-batch x (micro-batches + (PP - 1) / chunks per stage), of the slowest stage
    data         = gradients and parameters over DP; with overlap_grad_reduce only what the backward
                   pass of the last micro-batch does not hide, with overlap_param_gather likewise
                   for the forward pass of the first
    optimizer    = its bytes / (memory bandwidth x memory_efficiency), and the remaining messages

A message takes latency + its bytes on the wire / (link x link_efficiency). The link is NVLink if
the group lies within a node, else the network. MFU is Megatron's num_floating_point_operations
divided by the step's time and the GPUs' peak.
"""

from dataclasses import dataclass

from kvshift_megatron.planning.gpus import GPU
from kvshift_megatron.planning.wire import wire_bytes

# Bytes that a pointwise operation moves per element: two 16-bit operands and one result.
_POINTWISE_BYTES = 6


@dataclass(frozen=True)
class Assumptions:
    """How much of its data sheet the hardware reaches; change these to what was measured.

    Attributes:
        matmul_efficiency, memory_efficiency, link_efficiency: Fractions of the peak.
        latency: Seconds per message, whatever its size.
        reserve: Bytes of a GPU that the model cannot have: CUDA's context, NCCL's buffers, the
            workspaces of libraries, the allocator's gaps.
    """

    matmul_efficiency: float = 0.6
    memory_efficiency: float = 0.8
    link_efficiency: float = 0.75
    latency: float = 15e-6
    reserve: float = 6e9


def estimate(
    planned: dict, gpu: GPU, assumed: Assumptions = Assumptions(), baseline: bool = False
) -> dict[str, float]:
    """Estimate the seconds of a step, by part.

    Args:
        planned: What plan returned.
        gpu, assumed: The hardware, and how much of its data sheet it reaches.
        baseline: Estimate the baseline model's step.

    Returns:
        In seconds: matmul, pointwise, messages and work, their sum (each of a micro-batch on the
        slowest stage), bubble, data, optimizer and step. Besides these: mfu, tokens_per_second (of
        all ranks), fits and free_bytes (of the fullest rank).
    """
    stages = planned["twin_stages"] if baseline else planned["stages"]
    layout, figures = planned["layout"], planned["figures"]
    parts = max((_stage(stage, planned, gpu, assumed) for stage in stages), key=lambda p: p["work"])
    bubble = parts["work"] * (layout["pp"] - 1) / stages[0]["chunks"]
    step = parts["work"] * layout["micro_batches"] + bubble + parts["data"] + parts["optimizer"]
    free = gpu.memory - assumed.reserve - max(stage["peak_bytes"] for stage in stages)
    tokens = figures["global_batch_size"] * figures["seq_length"]
    flops = figures["megatron_flops_per_step"]
    return {
        **parts,
        "bubble": bubble,
        "step": step,
        "mfu": flops / (step * layout["world_size"] * gpu.flops),
        "tokens_per_second": tokens / step,
        "fits": free >= 0,
        "free_bytes": free,
    }


def _stage(stage: dict, planned: dict, gpu: GPU, assumed: Assumptions) -> dict[str, float]:
    layout, figures = planned["layout"], planned["figures"]
    micro_batches = layout["micro_batches"]
    bandwidth = gpu.memory_bandwidth * assumed.memory_efficiency
    matmul, pointwise = {}, {}
    for during, work in stage["work"].items():
        flops = work.get("matmul", 0) + work.get("attention", 0) / 2
        matmul[during] = flops / (gpu.flops * assumed.matmul_efficiency) / micro_batches
        pointwise[during] = (
            work.get("elementwise", 0) * _POINTWISE_BYTES / bandwidth / micro_batches
        )
    pointwise.pop("optimizer", None)  # its bytes are counted below
    messages, scatter, gather, rest = 0.0, 0.0, 0.0, 0.0
    for row in stage["traffic"]:
        seconds = _seconds(row, layout, gpu, assumed)
        if row["group"] in ("TP", "CP", "PP") and row["during"] != "optimizer":
            messages += seconds / micro_batches
        elif row["group"] == "DP" and row["operation"] == "all-gather":
            gather += seconds
        elif row["group"] == "DP":
            scatter += seconds
        else:
            rest += seconds
    if figures["overlap_grad_reduce"]:
        scatter = max(0.0, scatter - matmul.get("backward", 0.0))
    if figures["overlap_param_gather"]:
        gather = max(0.0, gather - matmul.get("forward", 0.0))
    state = stage["main_parameter_bytes"] + stage["moment_bytes"] + stage["other_optimizer_bytes"]
    # The state is read and written once. The last term is this rank's part of the gradients.
    moved = 2 * state + stage["moment_bytes"]
    return {
        "matmul": sum(matmul.values()),
        "pointwise": sum(pointwise.values()),
        "messages": messages,
        "work": sum(matmul.values()) + sum(pointwise.values()) + messages,
        "data": scatter + gather,
        "optimizer": moved / bandwidth + rest,
    }


def _seconds(row: dict, layout: dict, gpu: GPU, assumed: Assumptions) -> float:
    """Return the seconds that all messages of a row take, one after the other."""
    # Distance between neighbouring ranks of the group.
    stride = {
        "TP": 1,
        "CP": layout["tp"],
        "DP": layout["tp"],  # with context parallelism the group spans DP and CP
        "PP": layout["tp"] * layout["cp"] * layout["dp"],
        # From the first stage to the last.
        "embedding": layout["tp"] * layout["cp"] * layout["dp"] * max(1, layout["pp"] - 1),
    }.get(row["group"], 1)
    within_node = stride * row["ranks"] <= gpu.node or layout["world_size"] <= gpu.node
    # A ring leaves a node through the adapters of all its ranks there; a send, through one.
    adapters = 1 if row["operation"] == "send" else max(1, gpu.node // stride)
    link = gpu.nvlink if within_node else min(gpu.nvlink, adapters * gpu.network)
    return row["messages"] * assumed.latency + wire_bytes(row) / (link * assumed.link_efficiency)
