"""Megatron's TensorBoard writer, and beside it one JSON line per iteration with the same tags.

Megatron writes each number with `add_scalar` on the object that `get_tensorboard_writer` returns,
on the last rank. That object stays Megatron's SummaryWriter; what it writes is recorded too. If no
TensorBoard was asked for, or it is not installed, LinesOnly stands in for it, so that Megatron's
numbers reach the JSON lines all the same.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from kvshift_megatron.training.metrics.json_lines import JsonLines
from kvshift_megatron.upstream import metrics_table, substitutions

# Megatron writes these tags a second time over the samples; a line has "samples" once instead.
_OVER_SAMPLES = " vs samples"


class Recorder:
    """Collect the tags of an iteration and write them as one line.

    Args:
        lines: where they are written; None writes nothing.
    """

    def __init__(self, lines: JsonLines | None):
        self._lines = lines
        self._pending: dict[int, dict[str, Any]] = {}
        self._last: int | None = None

    def record(self, tag: str, value: Any, iteration: int) -> None:
        """Record one value: a number, or what else a line can hold."""
        if tag.endswith(_OVER_SAMPLES):
            # Comes after the same value over iterations.
            if self._last in self._pending:
                self._pending[self._last]["samples"] = iteration
            return
        if tag in self._pending.get(iteration, {}):
            # Nothing is overwritten: Megatron's last evaluations share a tag and an iteration.
            self.flush()
        self._pending.setdefault(iteration, {})[tag] = value
        self._last = iteration

    def get(self, tag: str, iteration: int) -> Any:
        """Return what was recorded since the last `flush`; None if nothing was."""
        return self._pending.get(iteration, {}).get(tag)

    def flush(self, **heading: Any) -> None:
        """Write what is pending, with `heading` at the start of each line."""
        pending, self._pending = self._pending, {}
        if self._lines is not None:
            for iteration, values in pending.items():
                self._lines.append({"time": time.time(), "iteration": iteration} | heading | values)


class LinesOnly:
    """What Megatron calls on a SummaryWriter, for a recorder alone."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def add_scalar(self, tag: str, value: Any, global_step: int, *_: Any, **__: Any) -> None:
        """Record one number."""
        self._recorder.record(tag, float(value), int(global_step))

    def add_text(self, *_: Any, **__: Any) -> None:
        """Ignore the run's arguments, which are no metrics."""

    def add_many(self, values: dict[str, Any], iteration: int) -> None:
        """Record {tag: value}, as the method that `record_scalars` adds."""
        for tag, value in values.items():
            self._recorder.record(tag, value, iteration)

    def flush(self) -> None:
        """Write the lines that are pending."""
        self._recorder.flush()

    def close(self) -> None:
        """Write the lines that are pending."""
        self._recorder.flush()


def record_scalars(
    writer: Any, recorder: Recorder, warn: Callable[[str], None] | None = None
) -> Callable[[], None]:
    """Record a SummaryWriter's scalars too; a full disk under it is one warning.

    Args:
        writer: Megatron's SummaryWriter; its methods are replaced on the object, and it gets
            `add_many(values, iteration)` for {tag: number}, which makes one event of them all:
            `add_scalar` makes and queues one each, and there are hundreds of taps. Strings and
            lists among the values go to the recorder only.
        recorder: gets every scalar, whatever becomes of it in TensorBoard.
        warn: takes a sentence; None prints it on standard error.

    Returns:
        A function that restores the writer's own methods.
    """
    state = {"failed": False}

    def guarded(method: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> None:
            if state["failed"]:
                return
            try:
                method(*args, **kwargs)
            except OSError as error:
                state["failed"] = True
                (warn or _to_stderr)(
                    f"kvshift_megatron: TensorBoard's files cannot be written ({error}); they "
                    "end here, training goes on"
                )

        return call

    def recorded(method: Callable) -> Callable:
        add_scalar = guarded(method)

        def add_scalar_and_record(
            tag: str, scalar_value: Any, global_step: int | None = None, *args: Any, **kwargs: Any
        ) -> None:
            # Once to the CPU, for both.
            value = float(scalar_value)
            recorder.record(tag, value, int(global_step))
            add_scalar(tag, value, global_step, *args, **kwargs)

        return add_scalar_and_record

    def flushed(method: Callable) -> Callable:
        flush = guarded(method)

        def flush_both() -> None:
            recorder.flush()
            flush()

        return flush_both

    def add_event(values: dict[str, Any], iteration: int) -> None:
        from tensorboard.compat.proto.summary_pb2 import Summary

        numbers = {tag: value for tag, value in values.items() if isinstance(value, int | float)}
        writer.file_writer.add_summary(
            Summary(value=[Summary.Value(tag=t, simple_value=v) for t, v in numbers.items()]),
            iteration,
        )

    add_event = guarded(add_event)

    def add_many(values: dict[str, Any], iteration: int) -> None:
        for tag, value in values.items():
            recorder.record(tag, value, iteration)
        add_event(values, iteration)

    applied = substitutions.apply(
        metrics_table.tensorboard_writer(
            writer, add_scalar=recorded, add_text=guarded, flush=flushed, close=guarded
        )
    )
    writer.add_many = add_many

    def restore() -> None:
        del writer.add_many
        applied.undo()

    return restore


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
