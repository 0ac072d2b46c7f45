"""Write a plan as tables for the terminal."""

from collections import Counter

from kvshift_megatron.planning.estimate import Assumptions, estimate
from kvshift_megatron.planning.gpus import GPU
from kvshift_megatron.planning.wire import wire_bytes

_GB = 1e9


def report(planned: dict, title: str, gpu_name: str, gpu: GPU, assumed: Assumptions) -> str:
    """Return everything that a plan says, as text."""
    layout, figures = planned["layout"], planned["figures"]
    lines = [
        f"{title}: {layout['world_size']} ranks = TP {layout['tp']} x CP {layout['cp']} x "
        f"PP {layout['pp']} x DP {layout['dp']}; a step is {layout['micro_batches']} micro-batches "
        f"of {figures['micro_batch_size']} x {figures['seq_length']} tokens per rank",
        "",
        *_memory(planned, gpu, assumed),
        "",
        *_traffic(planned),
        "",
        *_arithmetic(planned),
        "",
        *_time(planned, gpu_name, gpu, assumed),
    ]
    if planned["twin_stages"]:
        lines += ["", *_compared_with_baseline(planned, gpu, assumed)]
    if differing := {name: d for name, d in planned["other_ranks"].items() if d}:
        lines += ["", "Ranks that differ from the first of their stage (smallest step compared):"]
        lines += [f"  {name}: {_what_differs(d)}" for name, d in differing.items()]
    elif planned["other_ranks"]:
        lines += [
            "",
            f"Equal to the first rank of their stage: {', '.join(planned['other_ranks'])}.",
        ]
    return "\n".join(lines)


def _memory(planned: dict, gpu: GPU, assumed: Assumptions) -> list[str]:
    lines = [
        "Memory per rank by pipeline stage, GB (10^9 bytes):",
        "  stage    parameters  param.  gradients  optimizer  saved/micro  in flight   saved  "
        "transient   peak",
    ]
    for s in planned["stages"]:
        optimizer = s["main_parameter_bytes"] + s["moment_bytes"] + s["other_optimizer_bytes"]
        lines.append(
            f"  {s['stage']:>5} {s['parameters']:>13,}  {s['parameter_bytes'] / _GB:>6.2f}  "
            f"{s['gradient_bytes'] / _GB:>9.2f}  {optimizer / _GB:>9.2f}  "
            f"{s['saved_per_micro_batch'] / _GB:>11.2f}  {s['in_flight']:>9.2f}  "
            f"{s['saved_peak'] / _GB:>6.2f}  {s['transient_bytes'] / _GB:>9.2f}  "
            f"{s['peak_bytes'] / _GB:>5.1f}"
        )
    free = estimate(planned, gpu, assumed)["free_bytes"]
    lines.append(
        f"  {'FITS' if free >= 0 else 'DOES NOT FIT'}: {gpu.memory / _GB:.1f} GB, less "
        f"{assumed.reserve / _GB:.0f} in reserve, leaves {free / _GB:.1f} GB"
    )
    figures = planned["figures"]
    if figures["megatron_state_bytes"] is not None:
        lines.append(
            "  Megatron's theoretical memory (first stage): weights, gradients and optimizer "
            f"{figures['megatron_state_bytes'] / _GB:.2f}, activations "
            f"{figures['megatron_activation_bytes'] / _GB:.2f}"
        )
    return lines


def _traffic(planned: dict) -> list[str]:
    lines = [
        "Messages per rank and step (contributed, and on the wire with ring algorithms, GB):",
        "  stage  group      operation       during     ranks  messages  contributed   on the wire",
    ]
    for stage in _shown(planned["stages"]):
        for row in sorted(stage["traffic"], key=wire_bytes, reverse=True):
            lines.append(
                f"  {stage['stage']:>5}  {row['group']:<9}  {row['operation']:<14}  "
                f"{row['during']:<9}  {row['ranks']:>5}  {row['messages']:>8}  "
                f"{row['bytes'] / _GB:>11.6f}  {wire_bytes(row) / _GB:>12.6f}"
            )
    return lines


def _shown(stages: list[dict]) -> list[dict]:
    """Return the first, middle and last stage: the others send what the middle one sends."""
    numbers = sorted({0, len(stages) // 2, len(stages) - 1})
    return [stages[number] for number in numbers]


def _arithmetic(planned: dict) -> list[str]:
    layout, figures = planned["layout"], planned["figures"]
    tokens = figures["global_batch_size"] * figures["seq_length"]
    replicas = layout["tp"] * layout["cp"] * layout["dp"]
    total: Counter[tuple[str, str]] = Counter()
    for stage in planned["stages"]:
        for during, work in stage["work"].items():
            total.update({(during, what): number for what, number in work.items()})

    def per_token(*passes: str, attention: float) -> float:
        flops = sum(total[p, "matmul"] + attention * total[p, "attention"] for p in passes)
        return flops * replicas / tokens

    model = 3 * per_token("forward", attention=0.5)
    return [
        "FLOPs per token (matrix products only, without pointwise work):",
        f"  forward {per_token('forward', attention=1.0):.4g}, forward and backward "
        f"{per_token('forward', 'backward', attention=1.0):.4g} with attention as if nothing were "
        "masked",
        f"  forward {per_token('forward', attention=0.5):.4g}, forward and backward "
        f"{per_token('forward', 'backward', attention=0.5):.4g} with half of the attention, as it "
        "is causal (used for the time)",
        f"  3 x forward {model:.6g}; Megatron's num_floating_point_operations "
        f"{figures['megatron_flops_per_step'] / tokens:.6g}",
    ]


def _time(planned: dict, gpu_name: str, gpu: GPU, assumed: Assumptions) -> list[str]:
    times = estimate(planned, gpu, assumed)
    micro_batches = planned["layout"]["micro_batches"]
    return [
        f"Estimated step on {gpu_name} ({gpu.flops / 1e12:.0f} TFLOP/s, "
        f"{gpu.memory_bandwidth / 1e12:.2f} TB/s, NVLink {gpu.nvlink / _GB:.0f} and network "
        f"{gpu.network / _GB:.0f} GB/s per GPU and direction):",
        f"  {times['step']:.4g} s = {micro_batches} x {times['work']:.3g} (matmul "
        f"{times['matmul']:.3g}, pointwise {times['pointwise']:.3g}, messages "
        f"{times['messages']:.3g}) + bubble {times['bubble']:.3g} + data parallelism "
        f"{times['data']:.3g} + optimizer {times['optimizer']:.3g}",
        f"  MFU {times['mfu']:.1%}, {times['tokens_per_second']:,.0f} tokens/s",
        f"  assumed: matmul {assumed.matmul_efficiency:.0%} of peak, memory "
        f"{assumed.memory_efficiency:.0%}, links {assumed.link_efficiency:.0%}, "
        f"{assumed.latency * 1e6:.0f} us per message; TP, CP and PP messages not hidden, those of "
        "DP as the overlap flags say",
        f"  source of the GPU's figures: {gpu.source}",
    ]


def added_by_kv_shift(planned: dict) -> list[dict]:
    """Return what KV shifting adds to the baseline model, per stage."""
    rows = []
    for own, baseline in zip(planned["stages"], planned["twin_stages"]):
        work: Counter[str] = Counter()
        for sign, stage in ((1, own), (-1, baseline)):
            for part in stage["work"].values():
                for what, number in part.items():
                    work["matmul" if what != "elementwise" else "pointwise"] += sign * number
        messages: Counter[str] = Counter()
        sizes: Counter[str] = Counter()
        for sign, stage in ((1, own), (-1, baseline)):
            for row in stage["traffic"]:
                kind = f"{row['group']} {row['operation']} ({row['during']})"
                messages[kind] += sign * row["messages"]
                sizes[kind] += sign * row["bytes"]
        rows.append(
            {
                "stage": own["stage"],
                **{
                    name: own[name] - baseline[name]
                    for name in (
                        "parameters", "state_bytes", "saved_per_micro_batch", "saved_peak",
                        "peak_bytes",
                    )
                },
                "matmul_flops": work["matmul"],
                "pointwise_elements": work["pointwise"],
                "traffic": {
                    kind: [messages[kind], sizes[kind]]
                    for kind in messages
                    if messages[kind] or sizes[kind]
                },
            }
        )  # fmt: skip
    return rows


def _compared_with_baseline(planned: dict, gpu: GPU, assumed: Assumptions) -> list[str]:
    own, baseline = (estimate(planned, gpu, assumed, baseline=b) for b in (False, True))
    lines = ["What KV shifting adds to the baseline model, per rank and step:"]
    for row in _shown(added_by_kv_shift(planned)):
        lines.append(
            f"  stage {row['stage']}: {row['parameters']:,} parameters, {row['state_bytes']:,} "
            f"bytes of state, {row['saved_per_micro_batch'] / _GB:.3f} GB saved per micro-batch, "
            f"{row['peak_bytes'] / _GB:.3f} GB at the peak;"
        )
        traffic = ", ".join(
            f"{kind} {messages:+,} ({size:+,} bytes)"
            for kind, (messages, size) in row["traffic"].items()
        )
        lines.append(
            f"    {row['matmul_flops']:,} FLOPs in matrix products, "
            f"{row['pointwise_elements']:.3g} pointwise results; messages: {traffic or 'none'}"
        )
    lines.append(
        f"  estimated step {own['step']:.4g} s against {baseline['step']:.4g} s "
        f"({own['step'] / baseline['step'] - 1:+.2%})"
    )
    return lines


def _what_differs(differences: dict[str, tuple]) -> str:
    return ", ".join(f"{name} {other - first:+,}" for name, (first, other) in differences.items())
