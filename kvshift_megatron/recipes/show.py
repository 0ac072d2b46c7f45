"""Print the Megatron flags of a model on a layout, one per line.

    kvshift-recipe MODEL LAYOUT [--check] [--nproc N] [--hybrid] [--set FLAG[=VALUE] ...]

The lines are a command line for `kvshift_megatron.pretrain`, without the data and the place to save
to. The sizes that follow from them go to standard error. Sizes and KV shifting's flags are always
checked; `--check` also has Megatron's parser check all flags, which takes seconds. Exit status: 0,
or 2 for a mistake.
"""

import argparse
import sys
from argparse import Namespace

from kvshift_megatron.recipes import recipe, validate
from kvshift_megatron.recipes.sizes import data_parallel_size
from kvshift_megatron.recipes.toml_flags import option
from kvshift_megatron.utils.flag_lines import to_line


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="kvshift-recipe", description=__doc__.partition("\n")[0])
    recipe.add_arguments(parser)
    parser.add_argument(
        "--check",
        action="store_true",
        help="also have Megatron's parser check every flag's name and value (imports Megatron, "
        "which takes seconds)",
    )
    return parser.parse_args(argv)


def summary(run: recipe.Run, args: Namespace) -> str:
    """Return the sizes that follow from the flags, in one line."""
    dp = data_parallel_size(run.nproc, args)
    micro_batches = args.global_batch_size // (args.micro_batch_size * dp)
    return (
        f"{run.model} on {run.layout}: nproc {run.nproc} = "
        f"TP {args.tensor_model_parallel_size} x PP {args.pipeline_model_parallel_size} "
        f"x CP {args.context_parallel_size} x DP {dp}; "
        f"{args.train_iters} steps of {args.global_batch_size} x {args.seq_length} tokens, "
        f"{micro_batches} micro-batches each"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = parse_arguments(argv)
    try:
        overrides = dict(recipe.parse_override(text) for text in arguments.set)
        run = recipe.load(
            arguments.model, arguments.layout, overrides, arguments.nproc, hybrid=arguments.hybrid
        )
        args = (validate.check if arguments.check else validate.check_without_megatron)(run)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    unchecked = "" if arguments.check else " (--check: have Megatron's parser check all flags)"
    print(summary(run, args) + unchecked, file=sys.stderr)
    for name, value in run.flags.items():
        if words := option(name, value):
            print(to_line(words))
    return 0
