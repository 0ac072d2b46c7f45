"""Find layouts that fit, fastest first.

Quick models come first: one and two blocks of the real model on one replica (TP x CP ranks), for
each TP, CP and recompute. A block is a layer, or what a hybrid model's pattern repeats. Their
difference is a block; the remainder is the embedding and the output. A layout is the sum of these,
and estimate.py gives its time. As this leaves out how the stages of a pipeline differ, the
finalists are planned in full: every stage built at the true world size.
"""

from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from kvshift_megatron.planning import dry_run
from kvshift_megatron.planning.blocks import Blocks
from kvshift_megatron.planning.dry_run import DryRank
from kvshift_megatron.planning.estimate import Assumptions, estimate
from kvshift_megatron.planning.gpus import GPU
from kvshift_megatron.planning.layout import Layout
from kvshift_megatron.planning.plan import stage_plan
from kvshift_megatron.recipes.toml_flags import Flags

RECOMPUTE: dict[str, Flags] = {
    "none": {},
    "mlp": {"recompute-granularity": "selective", "recompute-modules": ["mlp"]},
    "full": {
        "recompute-granularity": "full",
        "recompute-method": "uniform",
        "recompute-num-layers": 1,
    },
}
_REPLACED = (
    "tensor-model-parallel-size",
    "sequence-parallel",
    "context-parallel-size",
    "pipeline-model-parallel-size",
    "pipeline-model-parallel-layout",
    "num-layers-per-virtual-pipeline-stage",
    "num-virtual-stages-per-pipeline-rank",
    "num-layers",
    "hybrid-layer-pattern",
    "micro-batch-size",
    "recompute-granularity",
    "recompute-method",
    "recompute-num-layers",
    "recompute-modules",
)
_MICRO_BATCHES = (1, 2, 4, 8)
_CHUNKS = (1, 2, 4)
_CONTEXT = (1, 2, 4, 8)
_DEEPEST = 16  # pipeline stages
_REPLICA = 32  # ranks of TP x CP


@dataclass(frozen=True)
class Candidate:
    """A layout with its micro-batch size and recompute.

    Attributes:
        chunks: Model chunks per pipeline stage.
        recompute: A key of RECOMPUTE.
    """

    layout: Layout
    chunks: int
    micro_batch_size: int
    recompute: str

    def describe(self) -> str:
        """Return it in words, without its figures."""
        return (
            f"{self.layout.describe()} x {self.chunks} chunks, micro-batch "
            f"{self.micro_batch_size} x {self.layout.micro_batches}, recompute {self.recompute}"
        )

    def flags(self, flags: Flags, blocks: Blocks, count: int | None = None) -> Flags:
        """Return a run's flags with this layout in place of its own.

        Args:
            flags: The run's.
            blocks: The model's layers.
            count: Take this many blocks instead of all.
        """
        kept = {name: value for name, value in flags.items() if name not in _REPLACED}
        layout = self.layout
        kept |= {
            "tensor-model-parallel-size": layout.tp,
            "sequence-parallel": layout.tp > 1,
            "context-parallel-size": layout.cp,
            "pipeline-model-parallel-size": layout.pp,
            "micro-batch-size": self.micro_batch_size,
        }
        kept |= blocks.flags(blocks.count if count is None else count, layout.pp, self.chunks)
        return kept | blocks.recomputed(RECOMPUTE[self.recompute])


def candidates(args: Namespace, world_size: int, node: int) -> Iterator[Candidate]:
    """Yield all layouts whose sizes divide the model, the batch and the ranks.

    Args:
        args: The model's parsed arguments, whose layout is ignored.
        world_size: Number of ranks.
        node: GPUs per node; TP stays within a node.
    """
    blocks = Blocks.of(args).count
    heads = args.num_attention_heads
    groups = args.num_query_groups if args.group_query_attention else heads
    for tp in (2**n for n in range(node.bit_length())):
        if tp > node or heads % tp or args.ffn_hidden_size % tp or (groups % tp and tp % groups):
            continue
        for cp in _CONTEXT:
            if tp * cp > _REPLICA or (cp > 1 and args.seq_length % (2 * cp * tp)):
                continue
            for pp in range(1, _DEEPEST + 1):
                if blocks % pp or world_size % (tp * cp * pp):
                    continue
                dp = world_size // (tp * cp * pp)
                for size in _MICRO_BATCHES:
                    if args.global_batch_size % (size * dp):
                        continue
                    count = args.global_batch_size // (size * dp)
                    for chunks in _CHUNKS if pp > 1 and count % pp == 0 else (1,):
                        if blocks // pp % chunks:
                            continue
                        layout = Layout(tp, cp, dp, pp, chunks > 1, count)
                        for recompute in RECOMPUTE:
                            yield Candidate(layout, chunks, size, recompute)


def search(
    words_of: Callable[[Flags], list[str]],
    flags: Flags,
    args: Namespace,
    world_size: int,
    gpu: GPU,
    assumed: Assumptions,
    jobs: int,
) -> list[tuple[Candidate, dict]]:
    """Return the layouts that fit by the quick models, fastest first.

    Args:
        words_of: Makes a command line of flags.
        flags, args: The run's flags, as a table and parsed.
        world_size, gpu, assumed, jobs: As for plan and estimate.

    Returns:
        [(layout, its estimate)].

    Raises:
        ValueError: Nothing fits.
    """
    possible = list(candidates(args, world_size, gpu.node))
    kinds = sorted({(c.layout.tp, c.layout.cp, c.recompute) for c in possible})
    blocks, runs = Blocks.of(args), []
    for tp, cp, recompute in kinds:
        alone = Candidate(Layout(tp, cp, 1, 1, False, 1), 1, 1, recompute)
        for count in (1, 2):
            small = alone.flags(flags, blocks, count) | {"global-batch-size": 1}
            runs.append(DryRank(tuple(words_of(small)), tp * cp, 0, (1, 1)))
    counted = iter(dry_run.count(runs, jobs))
    quick = {kind: _parts(next(counted), next(counted)) for kind in kinds}
    found = []
    for candidate in possible:
        kind = (candidate.layout.tp, candidate.layout.cp, candidate.recompute)
        planned = _added_up(candidate, *quick[kind], args)
        times = estimate(planned, gpu, assumed)
        if times["fits"]:
            found.append((candidate, times))
    if not found:
        raise ValueError(
            f"none of {len(possible)} layouts on {world_size} GPUs fits: take more GPUs, GPUs with "
            "more memory, or a batch that is divisible by more of them"
        )
    return sorted(found, key=lambda pair: pair[1]["step"])


def _parts(one: dict, two: dict) -> tuple[dict, dict, dict]:
    """Split the counts of one and of two blocks.

    Returns:
        (a block, everything else, Megatron's figures). The first two as _flat returns them.
    """
    layout = Layout(1, 1, 1, 1, False, 1)
    first, second = (_flat(stage_plan(layout, 0, run)) for run in (one, two))
    layer = {name: second.get(name, 0) - first.get(name, 0) for name in second | first}
    # Transient memory belongs to one layer at a time.
    layer["transient_bytes"] = 0
    rest = {name: first.get(name, 0) - layer[name] for name in layer}
    return layer, rest, two["args"]


def _flat(stage: dict) -> Counter:
    numbers = Counter({name: stage[name] for name in stage if name.endswith("_bytes")})
    numbers["parameters"] = stage["parameters"]
    numbers["saved"] = stage["saved_per_micro_batch"]
    for during, work in stage["work"].items():
        numbers.update({("work", during, what): number for what, number in work.items()})
    for row in stage["traffic"]:
        key = (row["during"], row["group"], row["operation"], row["ranks"])
        numbers["messages", *key] += row["messages"]
        numbers["bytes", *key] += row["bytes"]
    return numbers


def _added_up(
    candidate: Candidate, layer: dict, rest: dict, figures: dict, args: Namespace
) -> dict:
    """Return a layout's fullest and slowest stage, in the form of plan's result."""
    layout, size = candidate.layout, candidate.micro_batch_size
    layers = Blocks.of(args).count // layout.pp
    one = {name: layers * layer[name] + rest[name] for name in layer}
    count = layout.micro_batches
    in_flight: float = min(count, layout.pp)
    if candidate.chunks > 1:
        most = 2 * (layout.pp - 1) + (candidate.chunks - 1) * layout.pp + 1
        in_flight = min(count * candidate.chunks, most) / candidate.chunks
    shards = layout.dp * layout.cp if figures["use_distributed_optimizer"] else 1
    replica_shards = layout.cp if figures["use_distributed_optimizer"] else 1
    stage: dict[str, Any] = {"chunks": candidate.chunks}
    for name in ("main_parameter_bytes", "moment_bytes", "other_optimizer_bytes"):
        stage[name] = one[name] * replica_shards / shards
    saved = size * (in_flight * layers * layer["saved"] + rest["saved"])
    work: dict[str, dict[str, float]] = {}
    traffic: list[dict] = []
    stage |= {"work": work, "traffic": traffic}
    stage["peak_bytes"] = (
        one["parameter_bytes"]
        + one["gradient_bytes"]
        + sum(stage[name] for name in stage if name.endswith("_bytes"))  # the optimizer's
        + saved
        + size * one["transient_bytes"]
    )
    for key, number in one.items():
        if key[0] == "work":
            work.setdefault(key[1], {})[key[2]] = number * size * count
        elif key[0] == "messages" and key[2] in ("TP", "CP"):
            row = dict(zip(("during", "group", "operation", "ranks"), key[1:]))
            traffic.append(
                row | {"messages": number * count, "bytes": one["bytes", *key[1:]] * size * count}
            )
    hidden = size * args.seq_length // layout.cp // layout.tp * args.hidden_size * 2
    if layout.pp > 1:
        sent = 2 * count * candidate.chunks
        traffic.append(_row("PP", "send", layout.pp, sent, sent * hidden))
    ranks = layout.dp * layout.cp
    traffic.append(_row("DP", "reduce-scatter", ranks, layers, one["gradient_bytes"]))
    traffic.append(_row("DP", "all-gather", ranks, layers, one["parameter_bytes"] / ranks))
    return {
        "layout": vars(layout) | {"world_size": layout.world_size},
        "figures": figures
        | {
            "global_batch_size": args.global_batch_size,
            "megatron_flops_per_step": _model_flops(one, args, candidate),
        },
        "stages": [stage],
    }


def _row(group: str, operation: str, ranks: int, messages: int, size: float) -> dict:
    return {"during": "schedule", "group": group, "operation": operation, "ranks": ranks,
            "messages": messages, "bytes": size}  # fmt: skip


def _model_flops(one: dict, args: Namespace, candidate: Candidate) -> float:
    """Return nearly the FLOPs of a global batch: the output layer counts once per stage here."""
    forward = one["work", "forward", "matmul"] + one["work", "forward", "attention"] / 2
    layout = candidate.layout
    return 3 * forward * args.global_batch_size * layout.tp * layout.cp * layout.pp
