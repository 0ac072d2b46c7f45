"""Settle at start which implementation of the shift runs, alike on all ranks of a run."""

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from kvshift_megatron.ops.dispatch import Shift, choose, give_up, requested
from kvshift_megatron.utils.ranks import of_all_ranks

if TYPE_CHECKING:
    from kvshift_megatron.attention.self_attention import KVShiftSelfAttention


class _Found(NamedTuple):
    """What one rank can run; Shift -> (implementation, why not the best), or its refusal."""

    choices: dict[Shift, tuple[str, str | None]]
    refusal: str | None


def check_named(on_cpu: bool, dtype: torch.dtype, window: int) -> None:
    """Refuse an implementation that is asked for by name and cannot run, before there is a model.

    A GPU is left alone: a rank may not have chosen its own yet.

    Raises:
        ValueError: KVSHIFT_IMPLEMENTATION cannot be honoured.
    """
    wanted = requested()
    if wanted != "auto":
        device = "cpu" if on_cpu else "cuda" if wanted == "cpu" else "meta"
        choose(Shift(torch.device(device), dtype, window))


def check_forced(layer: "KVShiftSelfAttention", tap: Tensor) -> None:
    """Refuse an implementation that is asked for by name and cannot take the layer's keys.

    Do nothing if the layer will run on another device than the one on which it is constructed.

    Raises:
        ValueError: KVSHIFT_IMPLEMENTATION or KVSHIFT_ROPE cannot be honoured.
    """
    config: Any = layer.config
    may_move = config.use_cpu_initialization and torch.cuda.is_available()
    if tap.is_meta or may_move or config.enable_autocast:
        return
    if requested() != "auto":
        for shift in shifts(layer, tap):
            choose(shift)
    layer.rope.check_at_start(tap.device, tap.dtype)


def shifts(layer: "KVShiftSelfAttention", tap: Tensor) -> list[Shift]:
    """Return what the layer asks an implementation for."""
    window = layer.kv_shift.window
    found = [Shift(tap.device, tap.dtype, window)]
    if layer.rope.is_possible:
        found.append(Shift(tap.device, tap.dtype, layer.rope.window, "rope_shift"))
    return found


def agree(layers: Iterable["KVShiftSelfAttention"]) -> list[str]:
    """Choose for the layers of all ranks, and let every rank take what all of them can run.

    Compiles and tries kernels where that is still to do, so that no step has to. Collective over
    all ranks.

    Args:
        layers: This rank's, with their parameters where they will run.

    Returns:
        A sentence for each disagreement, the same on every rank.

    Raises:
        ValueError: An implementation that was asked for by name cannot run on some rank; raised on
            all of them.
    """
    own = _find(layers)
    everyone = of_all_ranks(own)
    for rank, found in enumerate(everyone):
        if found.refusal:
            raise ValueError(own.refusal or f"on rank {rank}: {found.refusal}")
    sentences = []
    for shift in {shift: None for found in everyone for shift in found.choices}:
        by_name: dict[str, tuple[int, str | None]] = {}
        for rank, found in enumerate(everyone):
            if shift in found.choices:
                name, obstacle = found.choices[shift]
                by_name.setdefault(name, (rank, obstacle))
        if len(by_name) > 1:
            rank, obstacle = by_name["eager"]
            reason = f"rank {rank} cannot run anything else: {obstacle}"
            give_up(shift, reason)
            what = "plain PyTorch shifts"
            if shift.operator == "rope_shift":
                what = "keys are rotated after the shift"
            sentences.append(f"{what} on all ranks, as {reason}")
    return sentences


def _find(layers: Iterable["KVShiftSelfAttention"]) -> _Found:
    choices: dict[Shift, tuple[str, str | None]] = {}
    for layer in layers:
        tap = layer.any_tap()
        if layer.config.enable_autocast:
            continue
        for shift in shifts(layer, tap):
            # The index is another one on every rank.
            key = shift._replace(device=torch.device(shift.device.type))
            try:
                name, obstacle = choose(shift)
                layer.rope.check_at_start(shift.device, shift.dtype)
            except ValueError as error:
                return _Found({}, str(error))
            choices[key] = name, obstacle
    return _Found(choices, None)
