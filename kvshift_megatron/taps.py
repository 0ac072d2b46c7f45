"""The taps of one layer: parameter names, initial values, and the variants' formulas.

Nothing here knows about ranks; attention.py slices by query group.
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
_KEY = re.compile(r"\.self_attention\.((?:alpha|beta)_(?:\d+|logit))$")


@functools.cache
def tap_names(kv_shift: KVShiftConfig) -> dict[str, tuple[str, ...]]:
    """Parameter names by what they shift: {"alpha": (...), "beta": (...)}, current token first.

    ``gate`` stores a logit and not a tap, so it has names of its own: a checkpoint of one variant
    cannot be read as the other.
    """
    names = {}
    for kind, shifted in (("alpha", kv_shift.shift_keys), ("beta", kv_shift.shift_values)):
        if not shifted:
            continue
        if kv_shift.variant == "gate":
            names[kind] = (f"{kind}_logit",)
        else:
            names[kind] = tuple(f"{kind}_{j}" for j in range(1, kv_shift.window + 1))
    return names


def tap_in_key(key: str) -> str | None:
    """The tap that a parameter's or checkpoint's key is of; None for anything else."""
    match = _KEY.search(key)
    return match.group(1) if match else None


def taps_among(keys: Iterable[str]) -> set[str]:
    """Names of the taps that a model's or checkpoint's keys speak of."""
    return {tap for key in keys if (tap := tap_in_key(key))}


def initial_values(
    kv_shift: KVShiftConfig, seed: int, layer_number: int, num_query_groups: int
) -> dict[str, Tensor]:
    """Initial parameters of the WHOLE layer, from (seed, layer_number) alone.

    Both draws are made whatever is switched on, so that turning values off leaves the keys' taps
    as they were.

    Args:
        kv_shift: the layer's configuration.
        seed: non-negative.
        layer_number: 1-based and global, as Megatron counts.
        num_query_groups: of the whole model, not of a rank.

    Returns:
        name -> float64 tensor [num_query_groups].
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
    """The taps that the shift applies, keys' and values'.

    Args:
        kv_shift: the layer's configuration.
        parameters: fp32 [parameters per group, ng], all of `tap_names` in their order.

    Returns:
        {"alpha": fp32 [window, ng], "beta": ...}, differentiable; kinds that do not shift left out.
    """
    names = tap_names(kv_shift)
    parts = parameters.split([len(kind) for kind in names.values()])
    return {kind: taps_from_parameters(kv_shift, part) for kind, part in zip(names, parts)}


def taps_from_parameters(kv_shift: KVShiftConfig, parameters: Tensor) -> Tensor:
    """The taps that the shift applies.

    Args:
        kv_shift: the layer's configuration.
        parameters: fp32 [window, ng] (gate: [1, ng]), in the order of `tap_names`.

    Returns:
        fp32 [window, ng], current token first.
    """
    if kv_shift.variant == "gate":
        gate = torch.sigmoid(parameters[0])
        return torch.stack((gate, 1.0 - gate))
    if kv_shift.variant == "clamp":
        # Not torch's clamp: it gives a tap exactly at 0 or 1 no gradient, and identity taps start
        # there.
        inside = (parameters >= 0.0) & (parameters <= 1.0)
        return torch.where(inside, parameters, parameters.detach().clamp(0.0, 1.0))
    return parameters


def resolve_seed(kv_shift: KVShiftConfig) -> int:
    """The seed the taps are drawn from: the configuration's, else Megatron's ``--seed``.

    torch's own seed will not do: Megatron offsets it by the pipeline stage.
    """
    if kv_shift.seed is not None:
        return kv_shift.seed
    seed = getattr(megatron_args(), "seed", None)
    return _MEGATRON_DEFAULT_SEED if seed is None else seed
