"""What can be known to be wrong before a machine is asked for."""

import argparse
import contextlib
import io
import warnings
from argparse import Namespace
from typing import NoReturn

from kvshift_megatron.recipes.config import Run
from kvshift_megatron.recipes.flags import command_line


class _Parser(argparse.ArgumentParser):
    """Says what is wrong without the two thousand lines of Megatron's usage."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message} (known are Megatron's flags and KV shifting's)")


def parse(run: Run) -> Namespace:
    """The run's flags through Megatron's parser, with this package's flags.

    Raises:
        ValueError: an unknown flag or a value of the wrong kind, in the parser's words.
    """
    from kvshift_megatron import cpu
    from kvshift_megatron.arguments import add_kv_shift_args, add_vanilla_twin_arg

    # Without a GPU Megatron can be imported only behind the CPU layer. That it is on, and what is
    # not installed here, does not matter to a parser.
    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        cpu.enable()
        from megatron.training.arguments import add_megatron_arguments

        from kvshift_megatron.training_task import load_task

        parser = _Parser(allow_abbrev=False, add_help=False)
        add_vanilla_twin_arg(add_kv_shift_args(add_megatron_arguments(parser)))
        parser.add_argument("--task-module", default=None)
        task = load_task(run.flags.get("task-module"))
        return task.add_args(parser).parse_args(command_line(run.flags))


def check(run: Run) -> Namespace:
    """Checks flags and divisions; Megatron checks the rest when it starts.

    Returns:
        The parsed flags.

    Raises:
        ValueError: one sentence with the flag and what must divide what.
    """
    args = parse(run)
    from kvshift_megatron.arguments import kv_shift_config_from_args
    from kvshift_megatron.validation import check_args, check_transformer_config

    tp, pp = args.tensor_model_parallel_size, args.pipeline_model_parallel_size
    cp, heads = args.context_parallel_size, args.num_attention_heads
    _divides("the number of processes", run.nproc, "TP x PP x CP", tp * pp * cp)
    dp = data_parallel_size(run, args)
    _divides("global-batch-size", args.global_batch_size, "micro-batch-size x DP",
             args.micro_batch_size * dp)  # fmt: skip
    _divides("num-attention-heads", heads, "TP", tp)
    _divides("ffn-hidden-size", args.ffn_hidden_size, "TP", tp)
    if args.pipeline_model_parallel_layout is None:
        _divides("num-layers", args.num_layers, "PP", pp)
    if cp > 1:
        _divides("seq-length", args.seq_length, "2 x CP", 2 * cp)
    if args.sequence_parallel:
        _divides("seq-length", args.seq_length, "TP x CP", tp * cp)
    check_args(args)
    if kv_shift_config_from_args(args) is not None:
        groups = args.num_query_groups if args.group_query_attention else heads
        check_transformer_config(Namespace(**{**vars(args), "num_query_groups": groups}))
    return args


def data_parallel_size(run: Run, args: Namespace) -> int:
    """Replicas of the model, each with its share of the batch."""
    return run.nproc // (
        args.tensor_model_parallel_size
        * args.pipeline_model_parallel_size
        * args.context_parallel_size
    )


def _divides(whole_name: str, whole: int | None, parts_name: str, parts: int | None) -> None:
    if not whole or not parts or whole % parts:
        raise ValueError(f"{whole_name} is {whole}, which {parts_name} = {parts} must divide")
