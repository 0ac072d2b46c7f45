"""A CPU device layer: unmodified Megatron-Core and Megatron-LM scripts run over gloo, with no GPU.

`python -m kvshift_megatron.cpu [--nproc-per-node N] SCRIPT ARGS...` runs a script on it.
In a program, call `enable()`, if possible before Megatron is imported. Importing this package
changes nothing and does not import torch. While the layer is on, glibc keeps the memory that
tensors free (`allocator`; `KVSHIFT_KEEP_MEMORY=0` turns this off). What is replaced is listed in
`kvshift_megatron.upstream.cpu_table`.

Covered: the training loop with tensor, pipeline and data parallelism, the distributed optimizer,
activation recompute, dropout and torch_dist checkpoints. Not covered: FSDP, CUDA graphs,
offloading, FP8 and FP4 (`flags` refuses these by name), and the inference engines.
"""

import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING

from kvshift_megatron.cpu.flags import GPUOnlyFlagError, check_flags, fill_flags

if TYPE_CHECKING:
    from kvshift_megatron.cpu.layer import Layer

__all__ = [
    "GPUOnlyFlagError",
    "check_flags",
    "cpu_device_layer",
    "disable",
    "enable",
    "fill_flags",
    "is_enabled",
]

_layer: "Layer | None" = None  # while it is on
_environment: dict[str, str | None] = {}  # earlier values of the variables that we set


def enable(reason: str | None = None, *, force: bool = False) -> bool:
    """Turn the layer on in this process. Calling it again changes nothing.

    Args:
        reason: Why, for the one line that rank 0 prints; None works it out.
        force: Use the CPU even if a GPU is present, as `KVSHIFT_CPU=1` does.

    Returns:
        Whether the layer is on. False means that a GPU is present and nothing was changed.
    """
    global _layer
    if _layer is not None:
        return True
    import torch

    is_requested = force or os.environ.get("KVSHIFT_CPU") == "1"
    if is_requested:
        # Before anything counts the GPUs: CUDA reads this only once.
        _set_environment("CUDA_VISIBLE_DEVICES", "")
    elif torch.cuda.is_available():
        return False
    if "CUDA_DEVICE_MAX_CONNECTIONS" not in os.environ:
        # With tensor or context parallelism Megatron asserts this below compute capability 10,
        # and the layer reports 0 for a CPU.
        _set_environment("CUDA_DEVICE_MAX_CONNECTIONS", "1")

    from kvshift_megatron.cpu.allocator import keep_freed_memory
    from kvshift_megatron.cpu.layer import Layer

    keep_freed_memory()
    _layer = Layer()
    _layer.apply()
    if os.environ.get("RANK", "0") == "0":
        why = reason or ("requested" if is_requested else "no GPU is present")
        print(
            f"kvshift_megatron: CPU device layer on ({why}): gloo, {len(_layer)} substitutions",
            flush=True,
        )
    return True


def disable() -> None:
    """Restore every original; do nothing if the layer is off."""
    global _layer
    if _layer is None:
        return
    from kvshift_megatron.cpu.allocator import give_back

    _layer.undo()
    _layer = None
    give_back()
    for name, before in _environment.items():
        if before is None:
            os.environ.pop(name, None)
        else:
            os.environ[name] = before
    _environment.clear()


def _set_environment(name: str, value: str) -> None:
    _environment[name] = os.environ.get(name)
    os.environ[name] = value


def is_enabled() -> bool:
    """Return whether the layer is on in this process."""
    return _layer is not None


@contextlib.contextmanager
def cpu_device_layer(*, force: bool = False) -> Iterator[bool]:
    """Turn the layer on for a block of a test, and yield what `enable` returned.

    A layer that was on before the block stays on after it.
    """
    was_enabled = is_enabled()
    try:
        yield enable(force=force)
    finally:
        if not was_enabled:
            disable()
