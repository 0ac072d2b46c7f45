"""Tap statistics, computed from whole layers in float64, one query group at a time."""

import itertools
import math


def effective(variant: str, stored: dict[str, list[float]]) -> dict[str, list[float]]:
    """Return the taps of one layer, {"alpha_1": one number per query group, ...}."""
    if variant == "gate":
        taps = {}
        for name, logits in stored.items():
            kind = name.removesuffix("_logit")
            gates = [1 / (1 + math.exp(-logit)) for logit in logits]
            taps[f"{kind}_1"], taps[f"{kind}_2"] = gates, [1 - gate for gate in gates]
        return taps
    if variant == "clamp":
        return {name: [min(max(tap, 0.0), 1.0) for tap in taps] for name, taps in stored.items()}
    return stored


def expected(layers: dict[str, dict[str, list[float]]]) -> dict[str, float]:
    """Return every tag of layers {"layer_1": what `effective` returns, ...}."""
    tags = {}
    decoder = [taps for name, taps in layers.items() if name.startswith("layer_")]
    whole = {name: list(itertools.chain(*(taps[name] for taps in decoder))) for name in decoder[0]}
    for layer, taps in {**layers, "all_layers": whole}.items():
        for name, values in taps.items():
            tags[f"taps/{layer}/{name}_mean"] = math.fsum(values) / len(values)
            tags[f"taps/{layer}/{name}_min"] = min(values)
            tags[f"taps/{layer}/{name}_max"] = max(values)
        kinds = [kind for kind in ("alpha", "beta") if f"{kind}_1" in taps]
        for cell in itertools.product(("gt", "le"), repeat=len(kinds)):
            words = "".join(f"_{kind[0]}1_{word}_{kind[0]}2" for kind, word in zip(kinds, cell))
            tags[f"taps/{layer}/pairs{words}"] = sum(
                all(
                    (first > second) == (word == "gt") for word, (first, second) in zip(cell, pairs)
                )
                for pairs in zip(*(zip(taps[f"{kind}_1"], taps[f"{kind}_2"]) for kind in kinds))
            )
    return tags


def assert_tags(found: dict[str, float], layers: dict[str, dict[str, list[float]]]) -> None:
    """Assert that counts are equal and the rest agrees to the rounding of fp32 taps."""
    found = {tag: value for tag, value in found.items() if tag.startswith("taps/")}
    wanted = expected(layers)
    assert found.keys() == wanted.keys(), found.keys() ^ wanted.keys()
    for tag, value in wanted.items():
        if "/pairs_" in tag:
            assert found[tag] == value, tag
        else:
            # fp32 taps are below 8 in size here, and a sigmoid adds a rounding or two.
            assert abs(found[tag] - value) <= 1e-6, (tag, found[tag], value)
