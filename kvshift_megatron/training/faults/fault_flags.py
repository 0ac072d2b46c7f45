"""The flags for faults, and the settings that cannot be honoured."""

import argparse
from argparse import Namespace

DIAGNOSIS = 5  # beats that a diagnosis takes at most
ON_SAVE_FAILURE = ("stop", "continue")


def add_faults_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags for faults to Megatron's parser."""
    group = parser.add_argument_group("faults")
    group.add_argument(
        "--on-save-failure",
        choices=ON_SAVE_FAILURE,
        default="stop",
        help="What the run does if a checkpoint cannot be written. Default: stop.",
    )
    group.add_argument(
        "--hang-timeout-seconds",
        type=float,
        default=None,
        metavar="SECONDS",
        help="End a run that makes no progress for this long, and name the rank that hangs; 0: "
        "never. Default: half of Megatron's time-out of a collective operation, which would end "
        "the run without naming a rank.",
    )
    group.add_argument(
        "--no-verify-integrity",
        dest="verify_integrity",
        action="store_false",
        help="Do not write and compare hashes of a checkpoint's files. Default: with --ckpt-format "
        "torch_dist, Megatron's --verify-integrity is on.",
    )
    return parser


def beat(timeout: float) -> float:
    """Return the seconds between two reports of a rank: a sixth of `timeout`, at most ten."""
    return min(timeout / 6, 10.0)


def hang_timeout(args: Namespace) -> float:
    """Return the seconds without progress that count as a hang; 0 if hangs are not watched for.

    Args:
        args: Megatron's.

    Raises:
        ValueError: The flag is out of range, or would not come before Megatron's own time-out.
    """
    asked = args.hang_timeout_seconds
    collective = 60.0 * args.distributed_timeout_minutes
    after_init = args.distributed_timeout_seconds_after_init
    if after_init is not None:
        collective = min(collective, after_init)
    if args.inprocess_restart:
        if asked:
            raise ValueError(
                f"hang_timeout_seconds={asked:g} with inprocess_restart, which has its own "
                "time-outs and needs the process alive: drop --hang-timeout-seconds"
            )
        return 0.0
    if args.fake_process_group:
        return 0.0  # there are no other ranks
    if asked is None:
        return collective / 2
    if asked < 0:
        raise ValueError(f"hang_timeout_seconds={asked:g}: expected seconds above 0, or 0 for none")
    if asked and asked + DIAGNOSIS * beat(asked) >= collective:
        raise ValueError(
            f"hang_timeout_seconds={asked:g} and up to {DIAGNOSIS * beat(asked):g} s to find the "
            f"rank that hangs are not below Megatron's time-out of a collective operation, "
            f"{collective:g} s, which would end the run without naming a rank: lower it, or raise "
            "--distributed-timeout-minutes"
        )
    return asked


def check_faults_args(args: Namespace) -> None:
    """Raise ValueError for a setting that cannot be honoured.

    Args:
        args: Megatron's, as parsed.
    """
    hang_timeout(args)
    if args.on_save_failure != "continue" or args.save is None:
        return
    obstacles = {
        f"ckpt_format {args.ckpt_format}": args.ckpt_format != "torch_dist",
        "non_persistent_ckpt_type local": args.non_persistent_ckpt_type == "local",
        "async_strategy nvrx": args.async_save and args.async_strategy == "nvrx",
        f"save {args.save}": "://" in args.save,
    }
    for name, is_set in obstacles.items():
        if is_set:
            raise ValueError(
                f"on_save_failure=continue with {name}: the ranks cannot agree that a save has "
                "failed: use --on-save-failure stop, or save to a folder with --ckpt-format "
                "torch_dist, and with --async-save also set --async-strategy mcore "
                "--use-persistent-ckpt-worker"
            )
