"""The taps of one layer: parameter names, initial values, and the variants' formulas.

Nothing here knows about ranks: attention/self_attention.py takes each rank's query groups.
"""

import functools
import re
from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from kvshift_megatron.arguments import megatron_args
from kvshift_megatron.config import KVShiftConfig

_MEGATRON_DEFAULT_SEED = 1234
# The least derivative of a gate by its logit. Beyond +-9.2 a sigmoid's own is smaller, and from +17
# on it is 0 in fp32.
FLATTEST_GATE = 1e-4
_KEY = re.compile(r"\.self_attention\.((?:alpha|beta)_(?:\d+|logit))$")


@functools.cache
def tap_names(kv_shift: KVShiftConfig) -> dict[str, tuple[str, ...]]:
    """Return parameter names, {"alpha": keys' (...), "beta": values' (...)}, current token first.

    ``gate`` stores a logit instead of a tap, under another name: a checkpoint of one variant cannot
    be read as the other.
    """
    names: dict[str, tuple[str, ...]] = {}
    for kind, shifted in (("alpha", kv_shift.shift_keys), ("beta", kv_shift.shift_values)):
        if not shifted:
            continue
        if kv_shift.variant == "gate":
            names[kind] = (f"{kind}_logit",)
        else:
            names[kind] = tuple(f"{kind}_{j}" for j in range(1, kv_shift.window + 1))
    return names


def tap_in_key(key: str) -> str | None:
    """Return the name of the tap that a parameter's or checkpoint's key stands for, or None."""
    match = _KEY.search(key)
    return match.group(1) if match else None


def taps_among(keys: Iterable[str]) -> set[str]:
    """Return the names of the taps among a model's or checkpoint's keys."""
    return {tap for key in keys if (tap := tap_in_key(key))}


def initial_values(
    kv_shift: KVShiftConfig, seed: int, layer_number: int, num_query_groups: int
) -> dict[str, Tensor]:
    """Return the initial parameters of the WHOLE layer, from (seed, layer_number) alone.

    Draw for keys and values even if one is switched off: the other's taps do not depend on it.

    Args:
        kv_shift: The layer's configuration.
        seed: Non-negative.
        layer_number: 1-based and global, as Megatron counts.
        num_query_groups: Of the whole model, not of a rank.

    Returns:
        By name, float64 tensors [num_query_groups].
    """
    shape = (kv_shift.window, num_query_groups)
    generator = np.random.Generator(np.random.Philox(np.random.SeedSequence([seed, layer_number])))
    values = {}
    for kind in ("alpha", "beta"):
        taps = generator.random(shape)
        if kv_shift.init == "identity":
            taps = np.zeros(shape)
            taps[0] = 1.0
        else:
            taps[-1] = 1.0 - taps[:-1].sum(axis=0)
        names = tap_names(kv_shift).get(kind, ())
        if kv_shift.variant == "gate":
            taps = np.log(taps[:1]) - np.log1p(-taps[:1])
        values.update({name: torch.from_numpy(tap.copy()) for name, tap in zip(names, taps)})
    return values


def taps_by_kind(kv_shift: KVShiftConfig, parameters: Tensor) -> dict[str, Tensor]:
    """Return the taps that the shift applies to keys (alpha) and values (beta).

    Args:
        kv_shift: The layer's configuration.
        parameters: fp32 [parameters per group, ng], in the order of `tap_names`.

    Returns:
        {"alpha": fp32 [window, ng], "beta": ...}, differentiable, without what does not shift.
    """
    names = tap_names(kv_shift)
    parts = parameters.split([len(kind) for kind in names.values()])
    return {kind: taps_from_parameters(kv_shift, part) for kind, part in zip(names, parts)}


def taps_from_parameters(kv_shift: KVShiftConfig, parameters: Tensor) -> Tensor:
    """Return the taps of keys or of values.

    Args:
        kv_shift: The layer's configuration.
        parameters: fp32 [window, ng] (gate: [1, ng]), in the order of `tap_names`.

    Returns:
        fp32 [window, ng], current token first.
    """
    if kv_shift.variant == "gate":
        gate = torch.sigmoid(parameters[0])
        is_flat = (gate * (1.0 - gate)).detach() < FLATTEST_GATE
        gate = torch.where(is_flat, _with_slope(gate, parameters[0], FLATTEST_GATE), gate)
        return torch.stack((gate, 1.0 - gate))
    if kv_shift.variant == "clamp":
        return _with_slope(parameters.clamp(0.0, 1.0), parameters, 1.0)
    return parameters


def _with_slope(taps: Tensor, parameters: Tensor, slope: float) -> Tensor:
    """Return `taps` to the bit, with the constant `slope` as their derivative by `parameters`.

    A tap must learn wherever its parameter is. The derivative depends on the parameter alone, never
    on the gradient: otherwise the sum over micro-batches and ranks would depend on how the batch is
    cut (decision 36).
    """
    return taps.detach() + slope * (parameters - parameters.detach())


def resolve_seed(kv_shift: KVShiftConfig) -> int:
    """Return the seed of the taps: the configuration's, else Megatron's ``--seed``.

    torch's own seed would not do: Megatron adds an offset for each pipeline stage.
    """
    if kv_shift.seed is not None:
        return kv_shift.seed
    seed = getattr(megatron_args(), "seed", None)
    return _MEGATRON_DEFAULT_SEED if seed is None else seed
