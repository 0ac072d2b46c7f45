"""Record a model's settings in what it saves, and compare them with what it loads.

Every KV-shifting layer calls `watch`, so that no way of building a model goes round it. Megatron
then compares by itself: every rank reads the saved arguments before the weights, whatever names the
checkpoint and whatever its format. What the optimizer state was trained with is compared there too.
"""

import functools
from argparse import Namespace
from collections.abc import Callable
from typing import Any

from kvshift_megatron.arguments import megatron_args, set_field
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.stored.bridge_load import compare_bridge_loads
from kvshift_megatron.stored.optimizer import refuse_other_optimizer
from kvshift_megatron.stored.other_form import refuse_other_form
from kvshift_megatron.stored.settings import MEANING, meaning, refuse_others, stored_settings
from kvshift_megatron.upstream import loading_table, substitutions

# Megatron's arguments, and the settings of the layers that were built since they were set.
_recorded: tuple[Namespace, KVShiftConfig] | None = None
_is_watching = False


def watch(kv_shift: KVShiftConfig) -> None:
    """Record a layer's settings, and have them compared with those of what Megatron loads.

    Without Megatron's arguments nothing is recorded; Bridge's loads are compared anyway. If the
    layers of a process differ, that is recorded instead, and nothing is compared.

    Args:
        kv_shift: The layer's.
    """
    global _recorded
    compare_bridge_loads()
    args = megatron_args()
    if args is None:
        return
    if _recorded is None or _recorded[0] is not args:
        _recorded = args, kv_shift
        for name in (*MEANING, "init"):
            set_field(args, name, getattr(kv_shift, name))
    elif meaning(_recorded[1]) != meaning(kv_shift):
        args.kv_shift_mixed = True
    compare_at_load()


def compare_at_load() -> None:
    """Have what Megatron loads compared with its arguments, and with the layers if they shift."""
    global _is_watching
    if not _is_watching:
        _is_watching = True
        substitutions.apply(loading_table.load(_compared))


def _compared(original: Callable) -> Callable:
    """Wrap Megatron's loading of a checkpoint to compare the arguments in it."""

    @functools.wraps(original)
    def load(*args: Any, **kwargs: Any) -> Any:
        answer = original(*args, **kwargs)
        state, checkpoint, is_release = answer[:3]
        saved = state.get("args") if state else None
        current = megatron_args()
        if saved is not None and current is not None:
            refuse_other_form(saved, current, answer[3], checkpoint)
        is_one_kind = not getattr(current, "kv_shift_mixed", False)
        if saved is not None and _recorded is not None and _recorded[0] is current and is_one_kind:
            stored = stored_settings(saved, checkpoint)
            if stored is not None:
                refuse_others(stored, meaning(_recorded[1]), checkpoint)
        if saved is not None and current is not None and not is_release:
            refuse_other_optimizer(saved, state, current, checkpoint)
        return answer

    return load
