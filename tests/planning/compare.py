"""Compare a rank's plan with its real run: one sentence for each difference."""

import copy
from collections import Counter
from collections.abc import Iterator

# Bytes of torch's random number generator state. Recompute keeps one for each module that it
# recomputes (on a GPU, in host memory).
_RNG_STATE = 5056


def static(planned: dict, real: dict) -> list[str]:
    """Compare parameters, gradients and optimizer, to the byte, with the sizes of named buffers."""
    return [
        f"{name}: planned {planned['static'][name]}, real {size}"
        for name, size in real["independent"].items()
        if name in planned["static"] and planned["static"][name] != size
    ]


def saved(planned: dict, real: dict) -> list[str]:
    """Compare saved activations, to 1%: of each forward pass, and the peak of all in flight."""
    mine, theirs = planned["steps"][2], real["steps"][2]
    pairs = [("saved_peak", mine["saved_peak"], theirs["saved_peak"])]
    pairs += [
        (f"saved in forward {number}", *pair)
        for number, pair in enumerate(zip(mine["saved_per_forward"], theirs["saved_per_forward"]))
    ]
    wrong = [f"{name}: planned {a}, real {b}" for name, a, b in pairs if abs(a - b) > 0.01 * b]
    # Temporary tensors within an operation differ on the meta device, but they are small.
    a, b = mine["live_peak"], theirs["live_peak"]
    if abs(a - b) > 0.06 * b:
        wrong.append(f"live_peak: planned {a}, real {b}")
    if len(mine["saved_per_forward"]) != len(theirs["saved_per_forward"]):
        wrong.append("the number of forward passes differs")
    return wrong


def allocated(planned: dict, real: dict, recomputed: int = 0) -> list[str]:
    """Compare with what torch's profiler says a forward pass left allocated, to 1%.

    Only for runs without messages.

    Args:
        planned, real: What the dry run and the real run of a rank left.
        recomputed: How many random states a forward pass keeps.
    """
    wrong = []
    for number, (left, _) in enumerate(real["independent"]["left_allocated"]):
        kept = planned["steps"][2]["saved_per_forward"][number]
        left -= recomputed * _RNG_STATE
        if abs(kept - left) > 0.01 * left:
            wrong.append(f"forward {number}: planned {kept}, the profiler says {left}")
    return wrong


def work(planned: dict, real: dict) -> list[str]:
    """Compare FLOPs and pointwise results of the forward and backward passes, exactly."""
    mine, theirs = (run["steps"][2]["work"] for run in (planned, real))
    return [
        f"{during}: planned {mine[during]}, real {theirs[during]}"
        for during in ("forward", "backward")
        if mine[during] != theirs[during]
    ]


def traffic(planned: dict, real: dict) -> list[str]:
    """Compare messages by pass, group and operation, exactly, and sizes with another recorder's."""
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


def forms(gpt: dict, hybrid: dict, is_sequence_parallel: bool = False) -> list[str]:
    """Compare what a rank holds, computes and sends of a model in its two forms, exactly.

    Two differences are Megatron's: it has no formula of a hybrid model's memory, and with sequence
    parallelism it copies the random state before each forward pass of a GPT model.
    """
    hybrid = copy.deepcopy(hybrid)
    for step in hybrid["steps"] if is_sequence_parallel else ():
        copied = len(step["saved_per_forward"]) * _RNG_STATE
        step["work"]["forward"]["elementwise"] += copied
    own = {"args": _OTHER_FIGURES, "": ("seconds", "peak_rss")}
    return list(_differences("", gpt, hybrid, own))


_OTHER_FIGURES = ("num_layers", "megatron_state_bytes", "megatron_activation_bytes")


def _differences(name: str, a, b, left_out: dict) -> Iterator[str]:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in a.keys() | b.keys():
            if key not in left_out.get(name, ()):
                yield from _differences(str(key), a.get(key), b.get(key), left_out)
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for pair in zip(a, b):
            yield from _differences(name, *pair, left_out)
    elif a != b:
        yield f"{name}: GPT {a}, hybrid {b}"


# The other recorder has no sizes for operations on several tensors at once, which DP uses.
_NAMES = {
    "send": "send",
    "broadcast_": "broadcast",
    "_allgather_base_": "all-gather",
    "_reduce_scatter_base_": "reduce-scatter",
}
