"""A rank's plan against its real run: one sentence for each thing that is not as planned."""

from collections import Counter

# torch's state of a random number generator: recompute keeps one for each thing it recomputes, on
# a GPU in host memory.
_RNG_STATE = 5056


def static(planned: dict, real: dict) -> list[str]:
    """Parameters, gradients and optimizer: to the byte, against what the buffers' names say."""
    return [
        f"{name}: planned {planned['static'][name]}, real {size}"
        for name, size in real["independent"].items()
        if name in planned["static"] and planned["static"][name] != size
    ]


def saved(planned: dict, real: dict) -> list[str]:
    """Saved activations to 1%: of each forward pass, and at the most of all in flight."""
    mine, theirs = planned["steps"][2], real["steps"][2]
    pairs = [("saved_peak", mine["saved_peak"], theirs["saved_peak"])]
    pairs += [
        (f"saved in forward {number}", *pair)
        for number, pair in enumerate(zip(mine["saved_per_forward"], theirs["saved_per_forward"]))
    ]
    wrong = [f"{name}: planned {a}, real {b}" for name, a, b in pairs if abs(a - b) > 0.01 * b]
    # What comes and goes within an operation is not the same on the meta device; little of it is.
    a, b = mine["live_peak"], theirs["live_peak"]
    if abs(a - b) > 0.06 * b:
        wrong.append(f"live_peak: planned {a}, real {b}")
    if len(mine["saved_per_forward"]) != len(theirs["saved_per_forward"]):
        wrong.append("another number of forward passes")
    return wrong


def allocated(planned: dict, real: dict, recomputed: int = 0) -> list[str]:
    """What torch's profiler says a forward pass left allocated, to 1%; without messages only.

    Args:
        recomputed: how many times a forward pass keeps the random state.
    """
    wrong = []
    for number, (left, _) in enumerate(real["independent"]["left_allocated"]):
        kept = planned["steps"][2]["saved_per_forward"][number]
        left -= recomputed * _RNG_STATE
        if abs(kept - left) > 0.01 * left:
            wrong.append(f"forward {number}: planned {kept}, the profiler says {left}")
    return wrong


def work(planned: dict, real: dict) -> list[str]:
    """FLOPs and pointwise results of the forward and backward passes, exactly."""
    mine, theirs = (run["steps"][2]["work"] for run in (planned, real))
    return [
        f"{during}: planned {mine[during]}, real {theirs[during]}"
        for during in ("forward", "backward")
        if mine[during] != theirs[during]
    ]


def traffic(planned: dict, real: dict) -> list[str]:
    """Messages by place, group and operation, exactly; and their sizes against another recorder."""
    mine, theirs = (
        {tuple(sorted(row.items())) for row in run["steps"][2]["traffic"]}
        for run in (planned, real)
    )
    wrong = [f"only planned: {dict(row)}" for row in mine - theirs]
    wrong += [f"only real: {dict(row)}" for row in theirs - mine]
    recorded = Counter()
    for name, size in real["independent"]["traffic"]:
        if name in _NAMES and size >= 0:
            recorded[_NAMES[name]] += size
    counted = Counter()
    for row in planned["steps"][2]["traffic"]:
        if row["group"] != "DP" or row["operation"] not in ("all-gather", "reduce-scatter"):
            counted[row["operation"]] += row["bytes"]
    for operation in ("send", "broadcast", "all-gather", "reduce-scatter"):
        if counted[operation] != recorded[operation]:
            wrong.append(
                f"{operation}: planned {counted[operation]} bytes, the recorder says "
                f"{recorded[operation]}"
            )
    return wrong


# The other recorder has no sizes for operations of several tensors at once, as those of DP are.
_NAMES = {
    "send": "send",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
