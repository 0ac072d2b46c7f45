"""Find mistakes in a run's flags before it takes a machine."""

import argparse
import contextlib
import io
import warnings
from argparse import Namespace
from typing import NoReturn

from kvshift_megatron.arguments import (
    add_baseline_arg,
    add_kv_shift_args,
    kv_shift_config_from_args,
)
from kvshift_megatron.attention.validation import check_args, check_transformer_config
from kvshift_megatron.recipes.recipe import Run
from kvshift_megatron.recipes.sizes import arguments, check_sizes
from kvshift_megatron.recipes.toml_flags import command_line


class _Parser(argparse.ArgumentParser):
    """Raises an error without the two thousand lines of Megatron's usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (only flags of Megatron and of KV shifting are known)")


def check(run: Run) -> Namespace:
    """Check names and types of all flags, that sizes divide, and what KV shifting refuses.

    This imports Megatron, which takes seconds. Megatron checks the rest when it starts.

    Returns:
        The parsed flags.

    Raises:
        ValueError: A flag is wrong; the message names it and what is wrong, in one sentence.
    """
    args = parse(run)
    if args.hybrid_layer_pattern is not None:
        _check_symbols(args.hybrid_layer_pattern)
    return _checked(run, args)


def check_without_megatron(run: Run) -> Namespace:
    """Check what `check` does, except the names and types of Megatron's flags.

    Returns:
        The flags. Only those that `sizes` lists are sure to be numbers.

    Raises:
        ValueError: As for `check`.
    """
    parser = _kv_shift_parser()
    own = {name: value for name, value in run.flags.items() if "kv-shift" in name}
    args = Namespace(**vars(arguments(run.flags)) | vars(parser.parse_args(command_line(own))))
    return _checked(run, args)


def parse(run: Run) -> Namespace:
    """Parse the run's flags by Megatron's parser, with this package's flags.

    Raises:
        ValueError: A flag is unknown or a value has the wrong type, in the parser's words.
    """
    from kvshift_megatron import cpu

    # Without a GPU Megatron can be imported only with the CPU layer on. What the layer prints, and
    # warnings about packages that are not installed, do not matter to a parser.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu.enable()
        from megatron.training.arguments import add_megatron_arguments

        from kvshift_megatron.training.task import load_task

        parser = add_megatron_arguments(_kv_shift_parser())
        parser.add_argument("--task-module", default=None)
        task = load_task(run.flags.get("task-module"))
        return task.add_args(parser).parse_args(command_line(run.flags))


def _check_symbols(pattern: str) -> None:
    """Raise ValueError if Megatron cannot read the pattern."""
    from kvshift_megatron.specs.hybrid_pattern import num_layers

    try:
        num_layers(pattern)
    except ValueError as error:
        raise ValueError(f"hybrid-layer-pattern {pattern}: {error}") from error


def _kv_shift_parser() -> argparse.ArgumentParser:
    parser = _Parser(allow_abbrev=False, add_help=False)
    return add_baseline_arg(add_kv_shift_args(parser))


def _checked(run: Run, args: Namespace) -> Namespace:
    check_sizes(run.nproc, args)
    check_args(args)
    if kv_shift_config_from_args(args) is not None:
        heads, groups = args.num_attention_heads, args.num_query_groups
        groups = groups if args.group_query_attention else heads
        check_transformer_config(Namespace(**{**vars(args), "num_query_groups": groups}))
    return args
