"""The command line of kvshift-plan.

    kvshift-plan MODEL LAYOUT [--nproc N] [--hybrid] [--set FLAG[=VALUE]] [--gpu NAME]

MODEL and LAYOUT are those of kvshift_megatron/recipes. The command builds the real model for every
pipeline stage on the meta device, runs Megatron's own training step there, and prints what it
counted (memory, messages, FLOPs) and an estimate of the step's time. It needs no GPU. Exit status:
0 if the layout fits, 1 if it does not, 2 for a mistake.
"""

import argparse
import dataclasses
import json
import os
import sys
import time
from argparse import Namespace
from pathlib import Path

from kvshift_megatron.planning import gpus
from kvshift_megatron.planning.estimate import Assumptions, estimate
from kvshift_megatron.recipes import recipe, validate
from kvshift_megatron.recipes.toml_flags import Flags, command_line
from kvshift_megatron.utils.atomic_files import replace
from kvshift_megatron.utils.output_paths import check_distinct, check_outputs

_LISTED = 12
_FINALISTS = 3
# The most candidates that are built in search of _FINALISTS that fit.
_TRIED = 10


def parse_arguments(argv: list[str] | None) -> Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(
        prog="kvshift-plan",
        description="Print what a configuration needs of a cluster: memory, messages, FLOPs, time.",
    )
    recipe.add_arguments(parser)
    parser.add_argument("--gpu", default="h100-80gb", help=f"one of {', '.join(gpus.GPUS)}")
    parser.add_argument(
        "--gpu-set",
        action="append",
        default=[],
        metavar="FIELD=NUMBER",
        help="memory (bytes), flops (dense bf16 FLOP/s), memory_bandwidth, nvlink, network "
        "(bytes/s, one direction), node (GPUs)",
    )
    for field in dataclasses.fields(Assumptions):
        parser.add_argument(
            f"--{field.name.replace('_', '-')}",
            type=float,
            default=field.default,
            metavar="NUMBER",
            help=f"assumed; default {field.default:g}",
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write all numbers to this file")
    parser.add_argument(
        "--png", type=Path, metavar="FILE", help="draw memory by stage into this file"
    )
    parser.add_argument(
        "--search",
        action="store_true",
        help="propose layouts that fit, best first, and plan the best",
    )
    parser.add_argument("--jobs", type=int, default=2, help="processes at a time; default 2")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return the exit status."""
    arguments = parse_arguments(argv)
    try:
        return _run(arguments)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2


def _run(arguments: Namespace) -> int:
    from kvshift_megatron.planning.dry_run import prepare
    from kvshift_megatron.planning.layout import Layout
    from kvshift_megatron.planning.picture import draw
    from kvshift_megatron.planning.plan import plan
    from kvshift_megatron.planning.report import added_by_kv_shift, report

    start = time.monotonic()
    if arguments.jobs < 1:
        raise ValueError(f"--jobs {arguments.jobs}: expected at least 1")
    gpu = gpus.find(arguments.gpu, arguments.gpu_set)
    assumed = Assumptions(
        **{field.name: getattr(arguments, field.name) for field in dataclasses.fields(Assumptions)}
    )
    log = os.environ.get("KVSHIFT_PLAN_LOG")
    outputs = [path for path in (arguments.json, arguments.png, log and Path(log)) if path]
    for path in outputs:
        if not path.parent.is_dir():
            raise ValueError(f"{path}: there is no directory {path.parent}")
    check_distinct(outputs)
    check_outputs(outputs, recipe.files(arguments.model, arguments.layout))
    overrides = dict(recipe.parse_override(text) for text in arguments.set)
    run = recipe.load(
        arguments.model, arguments.layout, overrides, arguments.nproc, hybrid=arguments.hybrid
    )
    prepare()
    if arguments.search:
        run = _best(run, gpu, assumed, arguments.jobs)
    layout = Layout.of(validate.check(run), run.nproc)
    planned = plan(command_line(run.flags), layout, arguments.jobs)
    title = f"{run.model} on {run.layout}"
    print(report(planned, title, arguments.gpu, gpu, assumed))
    times = estimate(planned, gpu, assumed)
    print(
        f"\nPlanned in {time.monotonic() - start:.0f} s, at most "
        f"{planned['peak_rss'] / 2**30:.1f} GiB per process, {arguments.jobs} at a time."
    )
    if arguments.json is not None:
        everything = {
            "title": title,
            "flags": run.flags,
            "gpu": {"name": arguments.gpu, **dataclasses.asdict(gpu)},
            "assumed": dataclasses.asdict(assumed),
            "estimate": times,
            "twin_estimate": (
                estimate(planned, gpu, assumed, baseline=True) if planned["twin_stages"] else None
            ),
            "added_by_kv_shift": added_by_kv_shift(planned) if planned["twin_stages"] else None,
            **planned,
        }
        text = json.dumps(everything, indent=1) + "\n"
        replace(arguments.json, lambda path: path.write_text(text))
    if arguments.png is not None:
        draw(planned, f"{title}: {layout.describe()}", arguments.gpu, gpu, assumed, arguments.png)
    return 0 if times["fits"] else 1


def _best(run: recipe.Run, gpu: gpus.GPU, assumed: Assumptions, jobs: int) -> recipe.Run:
    """Print the layouts that fit; return the run with the best of those whose stages were built."""
    from kvshift_megatron.planning.blocks import Blocks
    from kvshift_megatron.planning.plan import plan
    from kvshift_megatron.planning.search import search

    args = validate.parse(run)
    found = search(command_line, run.flags, args, run.nproc, gpu, assumed, jobs)
    print(f"Layouts that should fit, fastest first by the quick models ({len(found)} in all):")
    for candidate, times in found[:_LISTED]:
        print(
            f"  {times['step']:9.4g} s, {times['free_bytes'] / 1e9:5.1f} GB free: "
            f"{candidate.describe()}"
        )
    print("The first of them, every stage built:")
    fitting: list[tuple[float, int, Flags]] = []
    for candidate, _ in found[:_TRIED]:
        flags = candidate.flags(run.flags, Blocks.of(args))
        try:
            planned = plan(command_line(flags), candidate.layout, jobs, stages_only=True)
        except ValueError as error:
            print(f"  refused: {candidate.describe()}: {error}", flush=True)
            continue
        times = estimate(planned, gpu, assumed)
        print(
            f"  {times['step']:9.4g} s, {times['free_bytes'] / 1e9:5.1f} GB free, "
            f"MFU {times['mfu']:.1%}: {candidate.describe()}",
            flush=True,
        )
        if times["fits"]:
            fitting.append((times["step"], len(fitting), flags))
        if len(fitting) == _FINALISTS:
            break
    if not fitting:
        raise ValueError(
            f"none of the first {_TRIED} layouts fits once built: take more GPUs with --nproc"
        )
    flags = min(fitting)[-1]
    print()
    return dataclasses.replace(run, flags=flags, layout="the layout found")
