"""Count the training steps of a run of Megatron's loop, dry or real.

    torchrun ... -m kvshift_megatron.planning.observe FOLDER <flags of kvshift_megatron.pretrain>

is a real run, on GPUs or on a CPU. It writes FOLDER/rank-N.json to be compared with the plan: what
`plan` predicts for a rank, counted with the same counters in a run, and on a GPU the allocator's
own peak.
"""

import contextlib
import json
import os
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from kvshift_megatron.planning.counting import StepCounter
from kvshift_megatron.planning.memory import LiveStorages, SavedTensors, follow_resizes
from kvshift_megatron.planning.static_memory import static_bytes, static_tensors
from kvshift_megatron.upstream import planning_table
from kvshift_megatron.upstream.substitutions import Applied
from kvshift_megatron.utils.atomic_files import replace


class EnoughSteps(Exception):
    """All steps that were asked for have been counted."""


class StepObserver:
    """Count around Megatron's `train_step`.

    Args:
        micro_batches: The number in each step in turn; after the last, EnoughSteps is raised. None
            counts every step as it comes and lets the run end by itself. The first step differs
            from all others: the optimizer gets its state, and no parameters are gathered.

    Attributes:
        steps: What was counted, one entry per step.
        static: Bytes after the last step; see static_bytes.
    """

    def __init__(self, micro_batches: list[int] | None = None):
        self._micro_batches = micro_batches
        self.steps: list[dict] = []
        self.static: dict[str, int] = {}

    @contextlib.contextmanager
    def installed(self) -> Iterator[None]:
        """Count the steps of Megatron's loop in the block."""
        with Applied(planning_table.steps(self._counting)):
            yield

    def _counting(self, real: Callable) -> Callable:
        """Wrap Megatron's `train_step`."""
        from megatron.training import training

        def train_step(
            forward_step_func: Callable,
            data_iterator: Any,
            model: list[torch.nn.Module],
            optimizer: Any,
            *rest: Any,
            **keywords: Any,
        ) -> Any:
            number = len(self.steps)
            with contextlib.ExitStack() as stack:
                if self._micro_batches is None:
                    count = training.get_num_microbatches()
                else:
                    count = self._micro_batches[number]
                    stack.enter_context(Applied(planning_table.micro_batches(count)))
                step = _Step(model, optimizer, count)
                result = step.run(
                    real, forward_step_func, data_iterator, model, optimizer, *rest, **keywords
                )
            self.steps.append(step.counted())
            self.static = static_bytes(model, optimizer)
            if self._micro_batches is not None and len(self.steps) == len(self._micro_batches):
                raise EnoughSteps
            return result

        return train_step


class _Step:
    """One training step and its counters."""

    def __init__(self, model: list[Any], optimizer: Any, micro_batches: int):
        parameters = [p for chunk in model for p in chunk.module.parameters()]
        self._device = parameters[0].device.type
        self._storages = LiveStorages(self._device, static_tensors(model, optimizer))
        self._saved = SavedTensors(parameters)
        self._counter = StepCounter(self._storages)
        self._micro_batches = micro_batches
        self._forward_saves: list[int] = []
        self._forward_leaves: list[int] = []
        self._before_optimizer = (0, 0)

    def run(
        self,
        real: Callable,
        forward_step_func: Callable,
        data_iterator: Any,
        model: list[torch.nn.Module],
        optimizer: Any,
        *rest: Any,
        **keywords: Any,
    ) -> Any:
        """Run Megatron's `train_step` with the counters on."""

        def forward_step(*arguments: Any) -> Any:
            before, alive = self._saved.now, self._storages.now
            with self._counter.during("forward"):
                output = forward_step_func(*arguments)
            self._forward_saves.append(self._saved.now - before)
            self._forward_leaves.append(self._storages.now - alive)
            return output

        def counted(optimizer_step: Callable) -> Callable:
            def step() -> Any:
                self._before_optimizer = (self._storages.peak, self._allocator_peak())
                self._storages.peak = self._storages.now
                with self._counter.during("optimizer"):
                    return optimizer_step()

            return step

        if self._device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        with (
            Applied(planning_table.optimizer_step(optimizer, counted)),
            follow_resizes(self._storages),
            self._saved,
            self._counter,
        ):
            return real(forward_step, data_iterator, model, optimizer, *rest, **keywords)

    def _allocator_peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self._device == "cuda" else 0

    def counted(self) -> dict:
        """Return what was counted: bytes, messages, FLOPs; see StepCounter and Traffic.rows."""
        peak, allocator_peak = self._before_optimizer
        work: dict[str, dict[str, int]] = {}
        for (during, what), number in self._counter.work.items():
            work.setdefault(during, {})[what] = number
        return {
            "micro_batches": self._micro_batches,
            "saved_per_forward": self._forward_saves,
            "alive_after_forward": self._forward_leaves,
            "saved_peak": self._saved.peak,
            "live_peak": peak,
            "live_peak_in_optimizer": self._storages.peak,
            "allocator_peak": allocator_peak,
            "work": work,
            "traffic": self._counter.traffic.rows(),
        }


def main() -> None:
    """Run kvshift_megatron.pretrain and write what was counted."""
    from kvshift_megatron import cpu, pretrain

    folder = Path(sys.argv.pop(1))
    folder.mkdir(parents=True, exist_ok=True)
    cpu.enable()
    observer = StepObserver()
    with observer.installed():
        pretrain.main()
    path = folder / f"rank-{os.environ.get('RANK', '0')}.json"
    text = json.dumps({"static": observer.static, "steps": observer.steps})
    replace(path, lambda temporary: temporary.write_text(text))


if __name__ == "__main__":
    main()
