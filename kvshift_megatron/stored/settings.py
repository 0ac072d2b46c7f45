"""What a checkpoint says about its taps, and what a run asks for.

Taps of different variants may have the same names and shapes: only the settings that they were
trained with tell what the numbers mean. Megatron saves its arguments in every checkpoint. They hold
the `--kv-shift-*` flags; without these flags `at_load` adds what they would say.
"""

from argparse import Namespace
from typing import Any, get_args

from kvshift_megatron.arguments import (
    FIELDS,
    flag_of,
    given_fields,
    kv_shift_config_from_args,
    megatron_args,
    set_field,
)
from kvshift_megatron.config import Init, KVShiftConfig
from kvshift_megatron.stored.saved_arguments import folder_to_load, saved_arguments

# They matter only if no taps are stored. All others change what stored taps mean.
STARTING = ("init", "seed")
MEANING = tuple(name for name in FIELDS if name not in STARTING)
# Specs of this package that have no settings but the defaults.
_DEFAULT_SPECS = {
    "kvshift_megatron.layer_specs": ("kv_shift_layer_spec",),
    "kvshift_megatron.static_specs": (
        "te_layer_spec",
        "te_qk_layernorm_layer_spec",
        "local_layer_spec",
        "local_qk_layernorm_layer_spec",
        "hybrid_stack_spec",
    ),
}


def meaning(kv_shift: KVShiftConfig) -> dict[str, Any]:
    """Return the settings that change what stored taps mean, by name."""
    return {name: getattr(kv_shift, name) for name in MEANING}


def is_own_spec(spec: Any) -> bool:
    """Return whether Megatron's `--spec` names a spec of this package, with its default taps."""
    is_pair = isinstance(spec, list | tuple) and len(spec) == 2
    return is_pair and spec[1] in _DEFAULT_SPECS.get(spec[0], ())


def settings_from_arguments(saved: Namespace) -> KVShiftConfig | None:
    """Return the settings that a checkpoint's saved arguments state.

    Args:
        saved: Megatron's arguments, from a checkpoint.

    Returns:
        The settings; None if the arguments are of a model without taps, of one whose layers differ,
        or do not tell.

    Raises:
        ValueError: They state settings that are impossible.
    """
    if getattr(saved, "no_kv_shift", False) or getattr(saved, "kv_shift_mixed", False):
        return None
    if not hasattr(saved, "kv_shift_variant"):
        return KVShiftConfig() if is_own_spec(getattr(saved, "spec", None)) else None
    given = given_fields(saved)
    # The taps are stored, so their start does not matter: any that the other settings allow.
    for init in (given.pop("init", "uniform"), *get_args(Init)):
        try:
            return KVShiftConfig(**given, init=init)
        except ValueError as caught:
            error = caught
    raise error


def stored_settings(saved: Namespace, checkpoint: Any) -> KVShiftConfig | None:
    """Return `settings_from_arguments`, with the checkpoint's name in its message."""
    try:
        return settings_from_arguments(saved)
    except ValueError as error:
        raise ValueError(
            f"load: the checkpoint {checkpoint} states impossible settings of KV shifting "
            f"({error}): load another one"
        ) from error


def asked_for(args: Namespace) -> KVShiftConfig | None:
    """Return the settings that a run asks for; None for `--no-kv-shift`.

    With `--use-checkpoint-args` what the flags leave open comes from the checkpoint, and is set in
    `args` too; then this is collective over all ranks if process groups exist.

    Raises:
        ValueError: A flag is out of range, or contradicts the checkpoint.
    """
    stored = _of_checkpoint(args)
    if stored is not None:
        take_settings(args, stored)
    return kv_shift_config_from_args(args)


def default_settings() -> KVShiftConfig:
    """Return the settings of a spec that states none.

    With `--use-checkpoint-args` they are the checkpoint's (as for `asked_for`), otherwise the
    defaults.
    """
    args = megatron_args()
    return (None if args is None else _of_checkpoint(args)) or KVShiftConfig()


def _of_checkpoint(args: Namespace) -> KVShiftConfig | None:
    if not getattr(args, "use_checkpoint_args", False):
        return None
    saved = saved_arguments(args)
    return None if saved is None else stored_settings(saved, f"in {folder_to_load(args)}")


def take_settings(args: Namespace, stored: KVShiftConfig) -> None:
    """Set in Megatron's arguments what the flags leave open.

    Args:
        args: Changed in place.
        stored: The settings of the checkpoint that `args` names.

    Raises:
        ValueError: A flag contradicts the checkpoint.
    """
    checkpoint = f"in {folder_to_load(args)}"
    if getattr(args, "no_kv_shift", False):
        raise ValueError(
            f"no_kv_shift: the checkpoint {checkpoint} was trained with KV shifting "
            f"({stored.describe()}), and the baseline model would ignore its taps: drop "
            "--no-kv-shift, or load another one"
        )
    given = given_fields(args)
    refuse_others(stored, {name: given[name] for name in MEANING if name in given}, checkpoint)
    for name in (*MEANING, "init"):
        if name not in given:
            set_field(args, name, getattr(stored, name))


def refuse_others(
    stored: KVShiftConfig, asked: dict[str, Any], checkpoint: Any, remedy: str | None = None
) -> None:
    """Raise ValueError, with both values, if a setting differs from the checkpoint's.

    Args:
        stored: The checkpoint's settings.
        asked: Those of the run, by name.
        checkpoint: Its name, for the message.
        remedy: What to do. Default: the flags to set.
    """
    differing = [name for name in asked if asked[name] != getattr(stored, name)]
    if not differing:
        return
    theirs = ", ".join(f"{name}={getattr(stored, name)!r}" for name in differing)
    ours = ", ".join(f"{name}={asked[name]!r}" for name in differing)
    if remedy is None:
        flags = ", ".join(flag_of(name, getattr(stored, name)) for name in differing)
        remedy = (
            f"{flags}, or leave these flags out and add --use-checkpoint-args (a static --spec has "
            "the default taps only: use --spec kvshift_megatron.layer_specs kv_shift_layer_spec)"
        )
    raise ValueError(
        f"load: the taps of the checkpoint {checkpoint} were trained with {theirs}, and this run "
        f"would read them with {ours}: {remedy}"
    )
