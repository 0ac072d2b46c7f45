"""The GPUs that can be planned for, and their figures."""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from kvshift_megatron.training.metrics.gpu_peaks import peak_tflops


@dataclass(frozen=True)
class GPU:
    """One GPU and its links.

    Attributes:
        memory: Bytes that a process can have.
        flops: Dense bf16 FLOP/s, the peak that MFU is measured against.
        memory_bandwidth: Bytes/s.
        nvlink: Bytes/s from a GPU to others of its node, one direction.
        network: Bytes/s from a GPU to other nodes, one direction.
        node: GPUs per node.
        source: Where the figures come from.
    """

    memory: float
    flops: float
    memory_bandwidth: float
    nvlink: float
    network: float
    node: int = 8
    source: str = "the user"


_GIB, _TERA, _GIGA = 2**30, 1e12, 1e9


def _peak(name: str) -> float:
    """Return the FLOP/s that a run's MFU is measured against, by CUDA's name for the GPU."""
    peak = peak_tflops(name)
    if peak is None:
        raise ValueError(f"{name}: no peak is known; add it to training/metrics/gpu_peaks.py")
    return peak * _TERA


# Memory: what the driver reports for the card. NVLink: half of the data sheet's figure, which
# counts both directions. Network: that of NVIDIA's own 8-GPU systems, one adapter per GPU.
GPUS = {
    "a100-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA A100-SXM4-80GB"), 2.039 * _TERA, 300 * _GIGA, 25 * _GIGA,
        source="NVIDIA A100 SXM4 80GB data sheet; DGX A100: HDR InfiniBand, 200 Gb/s per GPU",
    ),
    "a800-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA A800-SXM4-80GB"), 2.039 * _TERA, 200 * _GIGA, 25 * _GIGA,
        source="NVIDIA A800 80GB: an A100 with 400 GB/s of NVLink",
    ),
    "h100-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA H100 80GB HBM3"), 3.35 * _TERA, 450 * _GIGA, 50 * _GIGA,
        source="NVIDIA H100 SXM5 data sheet; DGX H100: NDR InfiniBand, 400 Gb/s per GPU",
    ),
    "h800-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA H800"), 3.35 * _TERA, 200 * _GIGA, 50 * _GIGA,
        source="NVIDIA H800 SXM5: an H100 with 400 GB/s of NVLink",
    ),
    "h200": GPU(
        139.8 * _GIB, _peak("NVIDIA H200"), 4.8 * _TERA, 450 * _GIGA, 50 * _GIGA,
        source="NVIDIA H200 SXM data sheet; DGX H200: NDR InfiniBand, 400 Gb/s per GPU",
    ),
    "b200": GPU(
        178.4 * _GIB, _peak("NVIDIA B200"), 7.7 * _TERA, 900 * _GIGA, 50 * _GIGA,
        source="NVIDIA DGX B200 data sheet (eight GPUs, divided): 400 Gb/s per GPU",
    ),
}  # fmt: skip


def find(name: str, changes: Sequence[str] = ()) -> GPU:
    """Return a GPU of the table, with the user's figures.

    Args:
        name: A key of GPUS.
        changes: FIELD=NUMBER, in the units of GPU.

    Raises:
        ValueError: The name or a field is unknown, or a value is no positive number.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: not one of {', '.join(GPUS)}")
    numbers: dict[str, Any] = {}
    fields = [field.name for field in dataclasses.fields(GPU) if field.name != "source"]
    for change in changes:
        field, _, value = change.partition("=")
        try:
            numbers[field] = int(value) if field == "node" else float(value)
        except ValueError:
            numbers[field] = 0
        if field not in fields or numbers[field] <= 0:
            raise ValueError(
                f"--gpu-set {change}: expected FIELD=NUMBER with a positive number and one of the "
                f"fields {', '.join(fields)}"
            )
    source = GPUS[name].source + ("; changed by the user" if numbers else "")
    return dataclasses.replace(GPUS[name], **numbers, source=source)
