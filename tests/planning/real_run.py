"""Run kvshift_megatron.pretrain and leave what was measured, by the planner and independently.

Independent of the planner's counters are the bytes of Megatron's buffers and of the optimizer's
state (by their names), messages (by the recorder of tests/distributed), and what a forward pass
leaves allocated (by torch's profiler).
"""

import json
import os
import sys
from pathlib import Path
from unittest import mock

from megatron.training import training

from kvshift_megatron import pretrain
from kvshift_megatron.planning.observe import StepObserver
from tests.planning.between_ranks import BetweenRanks

_WHICH_STEP = 2  # from 0; the first differs from all others


def main() -> None:
    """Run what sys.argv says: FOLDER, then the flags of at least three iterations."""
    folder = Path(sys.argv.pop(1))
    independent: dict = {}
    observer = StepObserver()
    measure = mock.patch.object(training, "train_step", _measured(training.train_step, independent))
    with measure, observer.installed():
        pretrain.main()
    counted = {"static": observer.static, "steps": observer.steps, "independent": independent}
    (folder / f"rank-{os.environ['RANK']}.json").write_text(json.dumps(counted))


def _measured(real, result: dict):
    number = -1

    def train_step(forward_step_func, data_iterator, model, optimizer, *rest, **keywords):
        nonlocal number
        number += 1
        if number != _WHICH_STEP:
            return real(forward_step_func, data_iterator, model, optimizer, *rest, **keywords)
        left = []

        def forward_step(*arguments):
            with recorder.profiled() as profiler:
                output = forward_step_func(*arguments)
            allocated = sum(event.self_cpu_memory_usage for event in profiler.events())
            # Autograd keeps the output only if the next operation does.
            left.append([allocated, output[0].nbytes])
            return output

        with BetweenRanks() as recorder:
            answer = real(forward_step, data_iterator, model, optimizer, *rest, **keywords)
        result["left_allocated"] = left
        result["traffic"] = [[name, size] for name, _, size in recorder.log]
        result.update(_by_name(model, optimizer))
        return answer

    return train_step


def _by_name(model, optimizer) -> dict[str, int]:
    """Return the bytes of what Megatron's objects hold, by name."""
    buffers = [b for chunk in model for b in (*chunk.buffers, *chunk.expert_parallel_buffers)]
    parameters = [p for chunk in model for p in chunk.parameters()]
    kept = {
        "parameters": sum(p.numel() for p in parameters),
        "gradient_bytes": sum(b.numel * b.grad_data.element_size() for b in buffers),
    }
    if all(b.param_data is not None for b in buffers):
        kept["parameter_bytes"] = sum(b.numel * b.param_data.element_size() for b in buffers)
    else:
        kept["parameter_bytes"] = sum(p.numel() * p.element_size() for p in parameters)
    main, moments, steps = 0, 0, 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        groups = getattr(part, "shard_fp32_from_float16_groups", None)
        if groups is None:
            groups = getattr(part, "fp32_from_float16_groups", [])
        main += sum(p.numel() * 4 for group in groups for p in group)
        for state in part.optimizer.state.values():
            moments += sum(state[name].numel() * 4 for name in ("exp_avg", "exp_avg_sq"))
            steps += 4  # torch's Adam counts steps in an fp32 scalar per parameter
    return kept | {"main_parameter_bytes": main, "moment_bytes": moments,
                   "other_optimizer_bytes": steps}  # fmt: skip
