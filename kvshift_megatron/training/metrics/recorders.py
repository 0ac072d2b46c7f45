"""Record what Megatron writes to TensorBoard as one JSON line per iteration with the same tags.

On the last rank Megatron writes each number with `add_scalar` on the object that
`get_tensorboard_writer` returns. That object stays Megatron's SummaryWriter; what it writes is also
recorded. If TensorBoard is not requested or not installed, LinesOnly stands in for it, so that
Megatron's numbers still reach the JSON lines.
"""

import sys
import time
from collections.abc import Callable
from typing import Any

from kvshift_megatron.training.metrics.json_lines import JsonLines
from kvshift_megatron.upstream import metrics_table, substitutions

# Megatron also writes each tag over the samples; a line has the number of samples once instead.
_OVER_SAMPLES = " vs samples"


class Recorder:
    """Collect the tags of an iteration and write them as one line.

    Args:
        lines: The file to write to; None writes nothing.
    """

    def __init__(self, lines: JsonLines | None):
        self._lines = lines
        self._pending: dict[int, dict[str, Any]] = {}
        self._last: int | None = None

    def record(self, tag: str, value: Any, iteration: int) -> None:
        """Record one value: a number, or anything else that a line can hold."""
        if tag.endswith(_OVER_SAMPLES):
            # It follows the same value over iterations.
            if self._last in self._pending:
                self._pending[self._last]["samples"] = iteration
            return
        if tag in self._pending.get(iteration, {}):
            # Keep both values: Megatron's last evaluations share a tag and an iteration.
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
    """The methods that Megatron calls on a SummaryWriter; they only record."""

    def __init__(self, recorder: Recorder):
        self._recorder = recorder

    def add_scalar(self, tag: str, value: Any, global_step: int, *_: Any, **__: Any) -> None:
        """Record one number."""
        self._recorder.record(tag, float(value), int(global_step))

    def add_text(self, *_: Any, **__: Any) -> None:
        """Ignore the run's arguments, which are not metrics."""

    def add_many(self, values: dict[str, Any], iteration: int) -> None:
        """Record {tag: value}, like the method that `record_scalars` adds."""
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
    """Record a SummaryWriter's scalars; if its disk is full, warn once instead of raising.

    Args:
        writer: Megatron's SummaryWriter. Its methods are replaced on the object, which also gets a
            new method `add_many(values, iteration)` for {tag: value}. It writes one event for all
            of them; `add_scalar` would queue one each, and there are hundreds of taps. Strings and
            lists among the values go to the recorder only.
        recorder: Gets every scalar, even if TensorBoard's file cannot be written.
        warn: Takes a sentence; None prints it on standard error.

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
                    f"kvshift_megatron: TensorBoard's files cannot be written ({error}); training "
                    "continues, and nothing more is written to them"
                )

        return call

    def recorded(method: Callable) -> Callable:
        add_scalar = guarded(method)

        def add_scalar_and_record(
            tag: str, scalar_value: Any, global_step: int, *args: Any, **kwargs: Any
        ) -> None:
            # Copy it to the CPU once for both.
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
    # Not a row of the table: SummaryWriter has no such method, so nothing is replaced.
    writer.add_many = add_many

    def restore() -> None:
        del writer.add_many
        applied.undo()

    return restore


def _to_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)
