"""The `--kv-shift-*` command-line flags, and access to Megatron's parsed arguments."""

import argparse
import sys
from argparse import Namespace
from typing import get_args

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


def kv_shift_config_from_args(args: Namespace) -> KVShiftConfig | None:
    """Return the configuration that the flags ask for; None for `--no-kv-shift`.

    Raises:
        ValueError: A flag is out of range, or one asks for taps together with `--no-kv-shift`.
    """
    given = {
        "variant": args.kv_shift_variant,
        "window": args.kv_shift_window,
        "init": args.kv_shift_init,
        "seed": args.kv_shift_seed,
        "shift_keys": False if args.no_kv_shift_keys else None,
        "shift_values": False if args.no_kv_shift_values else None,
    }
    given = {name: value for name, value in given.items() if value is not None}
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
