"""Hooks into Megatron's loop: after each `training_log`, and before each optimizer step."""

import os
import socket
from argparse import Namespace
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any

import torch
from megatron.core.distributed import finalize_model_grads
from megatron.core.num_microbatches_calculator import get_current_running_global_batch_size
from megatron.core.utils import get_model_config

from kvshift_megatron.training.metrics.gpu_peaks import peak_tflops
from kvshift_megatron.training.metrics.json_lines import JsonLines
from kvshift_megatron.training.metrics.recorders import Recorder
from kvshift_megatron.training.metrics.tap_statistics import TapStatistics
from kvshift_megatron.training.metrics.telemetry import Sampler
from kvshift_megatron.training.metrics.telemetry_summary import TelemetrySummary, telemetry_file


class Watcher:
    """One rank's part in watching a run.

    Args:
        args: Megatron's arguments, with this package's.
        path: Of the metrics file; None for none.
        recorder: On the writing rank, which is the last one; None on other ranks.
        writer: On the writing rank, what `get_tensorboard_writer` returns.
        wandb: On the writing rank, Megatron's Weights & Biases writer if there is one.
    """

    def __init__(
        self,
        args: Namespace,
        path: Path | None,
        recorder: Recorder | None,
        writer: Any = None,
        wandb: Any = None,
    ):
        self._args, self._path = args, path
        self._recorder, self._writer, self._wandb = recorder, writer, wandb
        self._taps: TapStatistics | None = None
        self._peak = args.gpu_peak_tflops
        if self._peak is None and (args.bf16 or args.fp16):
            self._peak = peak_tflops(torch.cuda.get_device_name())
        self._sampler: Sampler | None = None
        self._summary: TelemetrySummary | None = None

    def watch_taps(self, model: list[torch.nn.Module]) -> list[torch.nn.Module]:
        """Read the taps of this model; a post-wrap hook of Megatron's model builder."""
        taps = self._taps = TapStatistics(model)
        config = get_model_config(model[0])
        # Megatron's loop uses this function if none is configured.
        finalize = config.finalize_model_grads_func or finalize_model_grads

        @wraps(finalize)
        def finalize_and_take(*args: Any, **kwargs: Any) -> Any:
            result = finalize(*args, **kwargs)
            # Megatron counts from 0 while the step runs.
            if (self._args.curr_iteration + 1) % self._args.log_interval == 0:
                taps.take()
            return result

        config.finalize_model_grads_func = finalize_and_take
        return model

    def logging(self, training_log: Callable) -> Callable:
        """Wrap Megatron's `training_log` to be followed by `after_log`."""

        @wraps(training_log)
        def log(
            loss_dict: Any,
            total_loss_dict: Any,
            learning_rate: Any,
            iteration: int,
            *args: Any,
            **kwargs: Any,
        ) -> Any:
            result = training_log(
                loss_dict, total_loss_dict, learning_rate, iteration, *args, **kwargs
            )
            self.after_log(iteration, kwargs.get("total_real_tokens_in_batch"))
            return result

        return log

    def evaluating(self, evaluate: Callable) -> Callable:
        """Wrap Megatron's `evaluate_and_print_results` to write its values as their own line."""

        @wraps(evaluate)
        def evaluate_and_flush(prefix: str, *args: Any, **kwargs: Any) -> None:
            evaluate(prefix, *args, **kwargs)
            if self._recorder is not None:
                # The tags do not say which data set it was, but this text of Megatron's does.
                self._recorder.flush(evaluated=prefix)

        return evaluate_and_flush

    def after_log(self, iteration: int, tokens: float | None) -> None:
        """Add what Megatron does not log, at its log interval; end the iteration's line.

        Args:
            iteration: As Megatron counts.
            tokens: In the global batch without padding; None if there is no padding.
        """
        is_due = iteration % self._args.log_interval == 0
        values: dict[str, Any] = self._taps.describe() if self._taps is not None and is_due else {}
        if self._recorder is None:
            return
        if is_due:
            values |= self._throughput(self._recorder, iteration, tokens)
            if self._summary is not None:
                values |= self._summary.values()
        if values:
            self._writer.add_many(values, iteration)
            if self._wandb is not None:
                self._wandb.log(values, iteration)
        self._recorder.flush()

    def _throughput(
        self, recorder: Recorder, iteration: int, tokens: float | None
    ) -> dict[str, float]:
        """Return tokens per second and MFU, from what Megatron has just recorded."""
        seconds = recorder.get("iteration-time", iteration)
        if not seconds:
            return {}
        if tokens is None:
            tokens = get_current_running_global_batch_size() * self._args.seq_length
        rate = tokens / seconds
        values = {
            "tokens-per-second": rate,
            "tokens-per-second/gpu": rate / self._args.world_size,
        }
        achieved = recorder.get("throughput", iteration)
        if self._peak and achieved is not None:
            values["mfu"] = achieved / self._peak
        return values

    def start_telemetry(self) -> None:
        """Start the sampler on each node's first rank, and the summary on the writing rank."""
        if self._args.no_gpu_telemetry:
            return
        try:
            gpus = job_gpus()
        except (AttributeError, RuntimeError) as error:
            print(f"kvshift_megatron: WARNING: no GPU telemetry: {error}", flush=True)
            return
        if not gpus:
            return
        if self._path is None:
            if self._recorder is not None:
                print("kvshift_megatron: no GPU telemetry: set --metrics-file", flush=True)
            return
        interval_s = self._args.gpu_telemetry_interval
        if int(os.environ.get("LOCAL_RANK", "0")) == 0:
            # Two Slurm nodes can be on one host.
            node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
            lines = JsonLines(telemetry_file(self._path, node))
            self._sampler = Sampler(
                lines.append,
                node,
                gpus,
                interval_s,
                iteration=lambda: getattr(self._args, "curr_iteration", 0),
            )
            if not self._sampler.start():
                self._sampler = None
        if self._recorder is not None:
            per_node = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            nodes = -(-self._args.world_size // per_node)
            self._summary = TelemetrySummary(self._path, nodes, interval_s)
            self._summary.start()

    def stop(self) -> None:
        """End the threads and write pending lines."""
        for part in (self._sampler, self._summary):
            if part is not None:
                part.stop()
        if self._recorder is not None:
            self._recorder.flush()

    def describe(self) -> str:
        """Return a line for the log that says what is written where."""
        args = self._args
        parts = [
            f"metrics every {args.tensorboard_log_interval}, taps and throughput every "
            f"{args.log_interval} iterations, to "
            + (f"{self._path}" if self._path else "Megatron's writers only")
        ]
        if self._peak:
            parts.append(f"MFU against {self._peak:g} TFLOP/s per GPU")
        else:
            parts.append("no MFU (give --gpu-peak-tflops)")
        return f"kvshift_megatron: {'; '.join(parts)}"


def job_gpus() -> list[str]:
    """Return NVML's names of the GPUs that this process sees through CUDA; none on a CPU."""
    if not torch.cuda.is_available():
        return []
    count = torch.cuda.device_count()
    return [f"GPU-{torch.cuda.get_device_properties(index).uuid}" for index in range(count)]
