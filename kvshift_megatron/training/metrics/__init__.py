"""Metrics of a run: taps, loss, throughput, MFU and GPUs, to Megatron's writers and to JSON lines.

The entry point calls only `watch`, which does nothing if there is nowhere to write to
(--metrics-file, --tensorboard-dir, --save or --wandb-project).
"""

import argparse
import contextlib
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kvshift_megatron.training.files_read import files_read
from kvshift_megatron.training.metrics.json_lines import JsonLines, read_lines, read_metrics
from kvshift_megatron.upstream import metrics_table
from kvshift_megatron.upstream.substitutions import Applied
from kvshift_megatron.utils.output_paths import check_outputs

__all__ = ["add_watching_args", "check_watching_args", "metrics_file", "read_lines", "read_metrics",
           "watch"]  # fmt: skip

METRICS = "metrics.jsonl"


def add_watching_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the flags of this package to Megatron's parser."""
    group = parser.add_argument_group("watching a run")
    group.add_argument(
        "--metrics-file",
        default=None,
        metavar="PATH",
        help="File for JSON lines with everything that is logged, one per iteration; a resumed run "
        "appends. Default: metrics.jsonl in --tensorboard-dir, else in --save, else none.",
    )
    group.add_argument(
        "--gpu-peak-tflops",
        type=float,
        default=None,
        help="Peak dense TFLOP/s of one GPU, for MFU. Default: the bf16 peak of the GPU, if its "
        "name is known.",
    )
    group.add_argument(
        "--no-gpu-telemetry", action="store_true", help="Do not sample the GPUs through NVML."
    )
    group.add_argument(
        "--gpu-telemetry-interval",
        type=float,
        default=10.0,
        metavar="SECONDS",
        help="Seconds between two samples of a node's GPUs. Default: 10.",
    )
    return parser


def check_watching_args(args: Namespace) -> None:
    """Raise ValueError for a flag of this package that cannot be honoured."""
    path = metrics_file(args)
    if path is not None and path.is_dir():
        raise ValueError(f"metrics_file={str(path)!r} is a folder: give --metrics-file a file")
    # Megatron and this package write further files below these folders.
    folders = [Path(folder) / METRICS for folder in (args.save, args.tensorboard_dir) if folder]
    check_outputs([*folders, *([path] if path else [])], files_read(args), look_inside=False)
    if args.gpu_peak_tflops is not None and not args.gpu_peak_tflops > 0:
        raise ValueError(
            f"gpu_peak_tflops={args.gpu_peak_tflops} must be above 0: give --gpu-peak-tflops the "
            "TFLOP/s of one GPU, or leave it out"
        )
    if not args.gpu_telemetry_interval > 0:
        raise ValueError(
            f"gpu_telemetry_interval={args.gpu_telemetry_interval} must be above 0 seconds: change "
            "--gpu-telemetry-interval, or turn telemetry off with --no-gpu-telemetry"
        )


def metrics_file(args: Namespace) -> Path | None:
    """Return the file for the JSON lines of a run; None for none."""
    if args.metrics_file:
        return Path(args.metrics_file)
    folder = args.tensorboard_dir or args.save
    return Path(folder) / METRICS if folder else None


def _is_watched(args: Namespace) -> bool:
    """Return whether a run records numbers anywhere."""
    return bool(metrics_file(args) or args.tensorboard_dir or getattr(args, "wandb_project", ""))


def log_more(args: Namespace) -> None:
    """Turn on two of Megatron's own numbers, if a run records any: seconds per step, and TFLOP/s.

    Args:
        args: Changed in place, before Megatron's configuration is made of them.
    """
    if _is_watched(args):
        args.log_timers_to_tensorboard = True
        args.log_throughput = True


@contextlib.contextmanager
def watch(args: Namespace, model_config: Any) -> Iterator[None]:
    """Watch the training that happens inside the block, on every rank.

    Args:
        args: Megatron's, parsed and validated, after Megatron has set up its writers.
        model_config: Megatron's model configuration, which gets a post-wrap hook.
    """
    if not _is_watched(args):
        yield
        return
    path = metrics_file(args)

    # Imported late: the device layer has to be on before Megatron is imported.
    from megatron.training import global_vars

    from kvshift_megatron.training.metrics.recorders import LinesOnly, Recorder, record_scalars
    from kvshift_megatron.training.metrics.watcher import Watcher

    with contextlib.ExitStack() as stack:
        recorder = writer = None
        if args.rank == args.world_size - 1:
            recorder = Recorder(JsonLines(path) if path else None)
            writer = global_vars.get_tensorboard_writer()
            if writer is not None:
                stack.callback(record_scalars(writer, recorder))
            else:
                writer = LinesOnly(recorder)
                rows = metrics_table.without_tensorboard(writer, LinesOnly)
                stack.enter_context(Applied(rows))
        watcher = Watcher(args, path, recorder, writer, global_vars.get_wandb_writer())
        rows = metrics_table.loop(log=watcher.logging, evaluate=watcher.evaluating)
        stack.enter_context(Applied(rows))
        if model_config.kv_shift is not None:
            reason = _why_no_taps(args)
            if reason is None:
                model_config.post_wrap_hooks.append(watcher.watch_taps)
            elif args.rank == 0:
                print(f"kvshift_megatron: no tap statistics: {reason}", flush=True)
        if recorder is not None:
            print(watcher.describe(), flush=True)
        stack.callback(watcher.stop)
        watcher.start_telemetry()
        yield


def _why_no_taps(args: Namespace) -> str | None:
    """Return why the taps cannot be read between backward pass and step; None if they can."""
    if args.use_torch_fsdp2 or args.use_megatron_fsdp:
        return "between passes, FSDP holds only a shard of each parameter"
    if args.cuda_graph_impl == "full_iteration":
        return "a CUDA graph of the whole iteration allows no code between its passes"
    return None
