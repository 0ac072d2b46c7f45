"""The `--kv-shift-*` command-line flags, and access to Megatron's parsed arguments."""

import argparse
import sys
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import fields
from typing import Any, get_args

from kvshift_megatron.config import Init, KVShiftConfig, Variant


def add_kv_shift_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the `--kv-shift-*` group to Megatron's parser (an `extra_args_provider`).

    KVShiftConfig checks the values, so that a flag and a field fail with the same message.
    """
    group = parser.add_argument_group("KV-shifting attention")
    group.add_argument(
        "--kv-shift-variant",
        default=None,
        metavar="|".join(get_args(Variant)),
        help="What a tap's parameter means. Default: free.",
    )
    group.add_argument(
        "--kv-shift-window",
        type=int,
        default=None,
        metavar="TOKENS",
        help="Taps per key or value: 2, 3 or 4. Default: 2.",
    )
    group.add_argument(
        "--kv-shift-init",
        default=None,
        metavar="|".join(get_args(Init)),
        help="uniform: the paper's random taps. identity: taps (1, 0), which is vanilla attention. "
        "Default: uniform.",
    )
    group.add_argument(
        "--no-kv-shift-keys", action="store_true", help="Leave the keys as they are."
    )
    group.add_argument(
        "--no-kv-shift-values", action="store_true", help="Leave the values as they are."
    )
    group.add_argument(
        "--kv-shift-seed",
        type=int,
        default=None,
        help="Seed of the initial taps. Default: --seed.",
    )
    return parser


def add_baseline_arg(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add `--no-kv-shift`, for commands that shift by default."""
    parser.add_argument(
        "--no-kv-shift",
        action="store_true",
        help="Train the baseline model: the same model without KV shifting.",
    )
    return parser


# Field of KVShiftConfig -> its flag's destination, for those whose flag turns something off.
_SWITCHES = {"shift_keys": "no_kv_shift_keys", "shift_values": "no_kv_shift_values"}
FIELDS = tuple(field.name for field in fields(KVShiftConfig))


def given_fields(args: Namespace) -> dict[str, Any]:
    """Return the fields of KVShiftConfig that the flags set, by name.

    Args:
        args: Parsed arguments. A flag that is missing counts as not given.
    """
    given: dict[str, Any] = {}
    for name in FIELDS:
        if name in _SWITCHES:
            if getattr(args, _SWITCHES[name], False):
                given[name] = False
        elif getattr(args, f"kv_shift_{name}", None) is not None:
            given[name] = getattr(args, f"kv_shift_{name}")
    return given


def set_field(args: Namespace, name: str, value: Any) -> None:
    """Set a field of KVShiftConfig in parsed arguments, as its flag would."""
    if name in _SWITCHES:
        set_arguments(args, {_SWITCHES[name]: not value})
    else:
        set_arguments(args, {f"kv_shift_{name}": value})


def set_arguments(args: Namespace, values: Mapping[str, Any]) -> None:
    """Set parsed arguments by name."""
    for name, value in values.items():
        setattr(args, name, value)


def flag_of(name: str, value: Any) -> str:
    """Return what to do on a command line for a field of KVShiftConfig to have a value."""
    if name in _SWITCHES:
        return f"{'drop' if value else 'add'} --{_SWITCHES[name].replace('_', '-')}"
    return f"set --kv-shift-{name.replace('_', '-')} {value}"


def kv_shift_config_from_args(args: Namespace) -> KVShiftConfig | None:
    """Return the configuration that the flags ask for; None for `--no-kv-shift`.

    Raises:
        ValueError: A flag is out of range, or one asks for taps together with `--no-kv-shift`.
    """
    given = given_fields(args)
    if not getattr(args, "no_kv_shift", False):
        return KVShiftConfig(**given)
    if given:
        raise ValueError(
            f"--no-kv-shift trains without taps, but KV shifting's {', '.join(given)} is set too: "
            "drop one of the two"
        )
    return None


def megatron_args() -> Namespace | None:
    """Return Megatron's parsed arguments; None outside its scripts or before they are set."""
    # Looked up, not imported: megatron.training is heavy, and the package works without it.
    global_vars = sys.modules.get("megatron.training.global_vars")
    if global_vars is None:
        return None
    try:
        return global_vars.get_args()
    except AssertionError:  # not set yet; no public function tells without raising
        return None
