"""A `--task-module` that breaks one rank of a run at one step: the fault under test.

    --plant KIND --plant-rank RANK --plant-iteration N (counted from 1)
    --losses FILE: rank 0 adds a line for every step, its iteration and its loss to the bit

The data are the package's own, and the loop is Megatron's.
"""

import functools
import os
import resource
import signal
import time
from pathlib import Path

import torch

import tests.support.small_mock_data  # noqa: F401
from kvshift_megatron.training.datasets import gpt_datasets_provider

KINDS = (
    *("pauses", "killed", "sleeps", "stopped", "holds the lock"),
    *(
        "ignores SIGTERM",
        "killed while writing",
        "refused",
        "no metadata",
        "no tracker",
        "small files",
    ),
    "nan",
)


def add_args(parser):
    group = parser.add_argument_group("planted fault")
    group.add_argument("--plant", choices=KINDS)
    group.add_argument("--plant-rank", type=int, default=1)
    group.add_argument("--plant-iteration", type=int, default=0)
    group.add_argument("--losses", type=Path)
    known, _ = parser.parse_known_args()
    if known.losses is not None:
        _record_losses(known.losses)
    if known.plant is not None:
        _plant(known.plant, known.plant_rank, known.plant_iteration)
    return parser


def _once(function):
    """Run a function once, although Megatron parses its command line several times."""
    return functools.cache(function)


@_once
def _record_losses(file: Path) -> None:
    from megatron.training import training

    original = training.train_step

    @functools.wraps(original)
    def train_step(*args, **kwargs):
        answer = original(*args, **kwargs)
        losses = answer[0]
        if os.environ["RANK"] == "0" and losses:
            with file.open("a") as output:
                print(kwargs["iteration"] + 1, float(losses["lm loss"]).hex(), file=output)
        return answer

    training.train_step = train_step


@_once
def _plant(kind: str, rank: int, iteration: int) -> None:
    if int(os.environ["RANK"]) != rank:
        return
    if kind == "ignores SIGTERM":
        # For all processes that it starts, as under examples/slurm.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        # Also for the process that collects a save's results, which a forked run already has.
        from megatron.core.dist_checkpointing.strategies import filesystem_async

        filesystem_async._results_queue = None
    if kind in _IN_A_STEP:
        # A real step is longer than the time between two reports: let this rank report once more.
        pause = 0 if kind == "killed" else 2.5
        _before_step(iteration, _IN_A_STEP[kind], pause)
    elif kind in _IN_A_SAVE:
        _while_writing(f"iter_{iteration:07d}", _IN_A_SAVE[kind])


def _signal(number: int) -> None:
    os.kill(os.getpid(), number)


def _hold_the_lock() -> None:
    """Call a C function that never releases the GIL."""
    import ctypes

    ctypes.PyDLL(None).sleep(10_000)


def _refuse(_: Path) -> None:
    raise PermissionError(13, "Permission denied")


def _no_metadata(folder: Path) -> None:
    """Put a folder in place of the file that is written last."""
    (folder / ".metadata.tmp").mkdir(exist_ok=True)


def _no_tracker(folder: Path) -> None:
    """Put a folder in place of the new tracker file."""
    (folder.parent / "latest_checkpointed_iteration.txt.new").mkdir(exist_ok=True)


def _small_files(_: Path) -> None:
    """Stand in for a full disk without the permission to mount one."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (310_000, resource.RLIM_INFINITY))


def _go_on() -> None:
    """Continue after a pause in which a background save ends."""


_IN_A_STEP = {
    "pauses": _go_on,
    "ignores SIGTERM": _go_on,
    "killed": functools.partial(_signal, signal.SIGKILL),
    "sleeps": functools.partial(time.sleep, 10_000),
    "stopped": functools.partial(_signal, signal.SIGSTOP),
    "holds the lock": _hold_the_lock,
}

_IN_A_SAVE = {
    "killed while writing": lambda _: _signal(signal.SIGKILL),
    "refused": _refuse,
    "no metadata": _no_metadata,
    "no tracker": _no_tracker,
    "small files": _small_files,
}


def _before_step(iteration: int, fault, pause: float) -> None:
    from megatron.training import training

    original = training.train_step

    @functools.wraps(original)
    def train_step(*args, **kwargs):
        if kwargs["iteration"] + 1 == iteration:
            time.sleep(pause)
            fault()
        return original(*args, **kwargs)

    training.train_step = train_step


def _while_writing(folder: str, fault) -> None:
    """Plant a fault for when the first half of a file has been written."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    original = filesystem_async._write_item

    def write_item(transforms, stream, *args, **kwargs):
        answer = original(transforms, stream, *args, **kwargs)
        file = Path(stream.name)
        if file.parent.name == folder and stream.tell() > 300_000:
            stream.flush()
            fault(file.parent)
        return answer

    # Megatron inspects its parameters.
    filesystem_async._write_item = functools.wraps(original)(write_item)


class _WithNaN(torch.utils.data.Dataset):
    """A data set in which the loss mask of sample `position` is NaN."""

    def __init__(self, samples, position: int):
        self.samples, self.position = samples, position

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        sample = dict(self.samples[index])
        if index == self.position:
            sample["loss_mask"] = sample["loss_mask"] * float("nan")
        return sample


def train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage=None):
    from megatron.training import get_args

    args = get_args()
    train, *others = gpt_datasets_provider(train_val_test_num_samples, vp_stage)
    if args.plant == "nan" and train is not None:
        # In a global batch the data-parallel ranks' micro-batches follow each other.
        first = (args.plant_iteration - 1) * args.global_batch_size
        train = _WithNaN(train, first + args.plant_rank * args.micro_batch_size)
    return (train, *others)
