"""Count all pipeline stages of a layout, with KV shifting and without."""

from collections import Counter
from collections.abc import Hashable

from kvshift_megatron.planning import dry_run
from kvshift_megatron.planning.dry_run import DryRank
from kvshift_megatron.planning.layout import Layout

_STATE = (
    "parameter_bytes",
    "gradient_bytes",
    "main_parameter_bytes",
    "moment_bytes",
    "other_optimizer_bytes",
)


def plan(
    words: list[str],
    layout: Layout,
    jobs: int = 2,
    *,
    kernels: str = "gpu",
    stages_only: bool = False,
) -> dict:
    """Count a layout.

    Args:
        words: Command line of kvshift_megatron.pretrain.
        layout: The layout that these flags ask for.
        jobs: Processes at a time.
        kernels: "gpu" or "cpu"; see kernels.py.
        stages_only: Leave out the baseline model and the ranks that could differ.

    Returns:
        layout, figures (Megatron's own, and sizes), stages and twin_stages (see stage_plan; the
        latter is of the baseline model, and None if it was not counted), other_ranks: {name: what
        differs from the first rank of the stage}, seconds and peak_rss of the processes.

    Raises:
        ValueError: A setting cannot be planned, or Megatron refuses it, in its words.
    """
    ranks, baseline_ranks, probes = [], [], {}
    with_baseline = "--no-kv-shift" not in words and not stages_only
    for stage in range(layout.pp):
        steps = (layout.warm_up(), *layout.counted_steps(stage))
        rank = layout.rank(stage)
        ranks.append(DryRank(tuple(words), layout.world_size, rank, steps, kernels))
        if with_baseline:
            baseline_words = tuple(_without_shift(words))
            baseline_ranks.append(DryRank(baseline_words, layout.world_size, rank, steps, kernels))
        if stage in (0, layout.pp // 2, layout.pp - 1) and not stages_only:
            for name, rank in layout.probes(stage).items():
                probes[stage, name] = DryRank(
                    tuple(words), layout.world_size, rank, steps[:1], kernels
                )
    counted = dry_run.count([*ranks, *baseline_ranks, *probes.values()], jobs)
    shifting, rest = counted[: layout.pp], counted[layout.pp :]
    baseline, others = rest[: len(baseline_ranks)], rest[len(baseline_ranks) :]
    return {
        "layout": vars(layout) | {"world_size": layout.world_size},
        "figures": shifting[0]["args"],
        "stages": [stage_plan(layout, stage, one) for stage, one in enumerate(shifting)],
        "twin_stages": [stage_plan(layout, stage, one) for stage, one in enumerate(baseline)]
        or None,
        "other_ranks": {
            f"stage {stage}, {name}": differences(shifting[stage], other)
            for (stage, name), other in zip(probes, others)
        },
        "seconds": sum(one["seconds"] for one in counted),
        "peak_rss": max(one["peak_rss"] for one in counted),
    }


def stage_plan(layout: Layout, stage: int, counted: dict) -> dict:
    """Return what the rank of one stage holds, computes and sends in a step.

    Returns:
        stage, rank, chunks, the entries of static_bytes, state_bytes (their sum),
        saved_per_micro_batch (bytes that autograd keeps, all chunks of the stage), saved_peak (of
        all micro-batches in flight), in_flight (the ratio of the two), transient_bytes (what else
        was alive at the peak), peak_bytes, optimizer_peak_bytes (with torch's optimizer; a GPU's
        fused one allocates less), work and traffic of a step (see StepCounter and Traffic.rows).
    """
    steps = counted["steps"][1:] or counted["steps"]
    static = counted["static"]
    state = sum(static[name] for name in _STATE)
    last = steps[-1]
    chunks = len(last["saved_per_forward"]) // last["micro_batches"]
    saved = sum(last["saved_per_forward"]) // last["micro_batches"]
    return {
        "stage": stage,
        "rank": layout.rank(stage),
        "chunks": chunks,
        **static,
        "state_bytes": state,
        "saved_per_micro_batch": saved,
        "saved_peak": last["saved_peak"],
        "in_flight": last["saved_peak"] / saved if saved else 0.0,
        "transient_bytes": last["live_peak"] - last["saved_peak"],
        "peak_bytes": state + last["live_peak"],
        "optimizer_peak_bytes": state + last["live_peak_in_optimizer"],
        "work": _work(steps, layout.micro_batches),
        "traffic": _traffic(steps, layout.micro_batches),
    }


def _work(steps: list[dict], micro_batches: int) -> dict[str, dict[str, int]]:
    flat: list[Counter[tuple[str, str]]] = []
    for step in steps:
        flat.append(Counter())
        for during, part in step["work"].items():
            flat[-1].update({(during, what): number for what, number in part.items()})
    result: dict[str, dict[str, int]] = {}
    for (during, what), number in _at(flat, steps, micro_batches).items():
        result.setdefault(during, {})[what] = number
    return result


def _traffic(steps: list[dict], micro_batches: int) -> list[dict]:
    key = ("during", "group", "operation", "ranks")
    kinds = {tuple(row[name] for name in key): None for step in steps for row in step["traffic"]}
    columns = {}
    for column in ("messages", "bytes"):
        flat = [
            Counter({tuple(row[name] for name in key): row[column] for row in step["traffic"]})
            for step in steps
        ]
        columns[column] = _at(flat, steps, micro_batches)
    rows = [
        dict(zip(key, kind)) | {column: numbers[kind] for column, numbers in columns.items()}
        for kind in kinds
    ]
    return [row for row in rows if row["messages"]]


def _at(numbers: list[Counter], steps: list[dict], micro_batches: int) -> Counter:
    """Return the numbers of a step of `micro_batches`, on the line through the counted steps."""
    if len(steps) == 1:
        return numbers[0]
    (low, high), (first, second) = (step["micro_batches"] for step in steps), numbers
    further = micro_batches - high

    def at(name: Hashable) -> int:
        return second[name] + (second[name] - first[name]) * further // (high - low)

    return Counter({name: at(name) for name in first | second})


def differences(base: dict, other: dict) -> dict[str, tuple]:
    """Return how a rank differs from the first one of its stage: {name: (first, other)}.

    Args:
        base, other: What dry_run.count returned for the two. Their first steps are compared.
    """
    pairs = {name: (base["static"][name], other["static"][name]) for name in base["static"]}
    first, second = base["steps"][0], other["steps"][0]
    for name in ("saved_peak", "live_peak"):
        pairs[name] = (first[name], second[name])
    for during in ("forward", "backward"):
        for what in ("matmul", "attention", "elementwise"):
            pairs[f"{during} {what}"] = tuple(
                step["work"].get(during, {}).get(what, 0) for step in (first, second)
            )
    totals = [_traffic([step], 0) for step in (first, second)]
    for column in ("messages", "bytes"):
        by_kind = [
            {(r["group"], r["operation"], r["during"]): r[column] for r in rows} for rows in totals
        ]
        for kind in by_kind[0] | by_kind[1]:
            pairs[f"{column} of {' '.join(kind)}"] = tuple(k.get(kind, 0) for k in by_kind)
    return {name: pair for name, pair in pairs.items() if pair[0] != pair[1]}


def _without_shift(words: list[str]) -> list[str]:
    """Return the baseline model's command line."""
    kept, skip = [], False
    for word in words:
        if word.startswith("--"):
            flag = word.partition("=")[0]
            skip = flag.startswith(("--kv-shift", "--no-kv-shift"))
        if not skip:
            kept.append(word)
    return [*kept, "--no-kv-shift"]
