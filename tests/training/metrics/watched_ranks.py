"""Run kvshift_megatron.pretrain on the ranks of one launch and record what watching does.

torchrun --nproc-per-node N ... -m tests.training.metrics.watched_ranks PLAN.json

PLAN.json and a run's output are as in tests/support/forked_ranks.py. In addition, each line of
NAME-RANK.collectives lists the torch.distributed functions that one call of TapStatistics.describe
called. A run with --gpu-telemetry-interval has two GPUs of tests/training/metrics/fake_nvml.py.
"""

import json
import os
import sys
import threading
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import numpy as np
import torch

from kvshift_megatron import pretrain
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.taps import tap_names
from tests.integration import damaged_checkpoints
from tests.support import forked_ranks
from tests.training.metrics import fake_nvml

_COLLECTIVES = (
    "all_gather", "all_gather_into_tensor", "all_gather_object", "all_reduce", "barrier",
    "broadcast", "broadcast_object_list", "gather", "gather_object", "irecv", "isend", "recv",
    "reduce", "reduce_scatter_tensor", "scatter", "send",
)  # fmt: skip


def copy_and_tear(source: Path, target: Path) -> None:
    """Copy a file and truncate its last line, as a kill in the middle of a write does."""
    data = source.read_bytes()
    target.parent.mkdir()
    target.write_bytes(data[: data.rindex(b"\n", 0, -1) + 40])


def wild_values(
    kv_shift: KVShiftConfig, seed: int, layer_number: int, num_query_groups: int
) -> dict[str, torch.Tensor]:
    """Replace taps.initial_values: draw parameters that also lie well outside [0, 1]."""
    generator = np.random.default_rng([seed, layer_number])
    names = [name for kind in tap_names(kv_shift).values() for name in kind]
    return {name: torch.from_numpy(generator.normal(0.5, 1.0, num_query_groups)) for name in names}


def record_collectives() -> None:
    """Make every TapStatistics.describe write down what it calls."""
    from kvshift_megatron.training.metrics.tap_statistics import TapStatistics

    # This rank's standard output goes to its log.
    log = Path(os.readlink("/proc/self/fd/1")).with_suffix(".collectives")
    original = TapStatistics.describe

    def describe(self):
        calls = []

        def recording(name, function):
            def call(*args, **kwargs):
                calls.append(name)
                return function(*args, **kwargs)

            return call

        recorded = {
            name: recording(name, getattr(torch.distributed, name)) for name in _COLLECTIVES
        }
        with mock.patch.multiple(torch.distributed, **recorded):
            result = original(self)
        with log.open("a") as file:
            file.write(json.dumps(calls) + "\n")
        return result

    TapStatistics.describe = describe


def give_gpus() -> None:
    """Provide two GPUs: one loses a metric, the other gets hot and reports an error."""
    from kvshift_megatron.training.metrics import watcher

    gpus = [fake_nvml.FakeGPU(0), fake_nvml.FakeGPU(1)]
    gpus[1].celsius, gpus[1].reasons = 90, 0x40
    nvml = fake_nvml.fake_nvml(gpus)
    sys.modules["pynvml"] = nvml
    watcher.job_gpus = lambda: [gpu.uuid for gpu in gpus]
    nvml.send(gpus[1], fake_nvml.EVENT_XID, 79)

    def fail():
        nvml.fail = {
            "nvmlDeviceGetPowerUsage": lambda n: fake_nvml.NVML_ERROR_UNKNOWN if n == 0 else None
        }

    timer = threading.Timer(0.3, fail)
    timer.daemon = True
    timer.start()


def watched_main() -> None:
    record_collectives()
    if "--gpu-telemetry-interval" in sys.argv:
        give_gpus()
    pretrain.main()


def main(plan: Path) -> None:
    # Inherited by every run.
    import kvshift_megatron.training.metrics.watcher  # noqa: F401
    from kvshift_megatron.attention import self_attention

    self_attention.initial_values = wild_values
    damaged_checkpoints.copy_and_tear = copy_and_tear
    forked_ranks.pretrain = SimpleNamespace(main=watched_main)
    forked_ranks.main(plan)


if __name__ == "__main__":
    from kvshift_megatron import cpu

    cpu.enable()
    main(Path(sys.argv[1]))
