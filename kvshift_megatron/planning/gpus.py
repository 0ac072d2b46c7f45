"""GPUs by what a plan needs to know of them."""

import dataclasses
from dataclasses import dataclass

from kvshift_megatron.training.metrics.gpu_peaks import peak_tflops


@dataclass(frozen=True)
class GPU:
    """One GPU and its links.

    Attributes:
        memory: bytes that a process can have.
        flops: dense bf16 FLOP/s, the peak that MFU is measured against.
        memory_bandwidth: bytes/s.
        nvlink: bytes/s a GPU sends to others of its node, one direction.
        network: bytes/s a GPU sends to other nodes, one direction.
        node: GPUs a node.
        source: of the figures.
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
    """The FLOP/s that a run's MFU is measured against, by the name that CUDA gives the GPU."""
    return peak_tflops(name) * _TERA


# Memory: what the driver reports for the card. NVLink: half of the data sheet's figure, which
# counts both directions. Network: of NVIDIA's own 8-GPU systems, one adapter a GPU.
GPUS = {
    "a100-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA A100-SXM4-80GB"), 2.039 * _TERA, 300 * _GIGA, 25 * _GIGA,
        source="NVIDIA A100 SXM4 80GB data sheet; DGX A100: HDR InfiniBand, 200 Gb/s a GPU",
    ),
    "a800-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA A800-SXM4-80GB"), 2.039 * _TERA, 200 * _GIGA, 25 * _GIGA,
        source="NVIDIA A800 80GB: an A100 with 400 GB/s of NVLink",
    ),
    "h100-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA H100 80GB HBM3"), 3.35 * _TERA, 450 * _GIGA, 50 * _GIGA,
        source="NVIDIA H100 SXM5 data sheet; DGX H100: NDR InfiniBand, 400 Gb/s a GPU",
    ),
    "h800-80gb": GPU(
        79.1 * _GIB, _peak("NVIDIA H800"), 3.35 * _TERA, 200 * _GIGA, 50 * _GIGA,
        source="NVIDIA H800 SXM5: an H100 with 400 GB/s of NVLink",
    ),
    "h200": GPU(
        139.8 * _GIB, _peak("NVIDIA H200"), 4.8 * _TERA, 450 * _GIGA, 50 * _GIGA,
        source="NVIDIA H200 SXM data sheet; DGX H200: NDR InfiniBand, 400 Gb/s a GPU",
    ),
    "b200": GPU(
        178.4 * _GIB, _peak("NVIDIA B200"), 7.7 * _TERA, 900 * _GIGA, 50 * _GIGA,
        source="NVIDIA DGX B200 data sheet (eight GPUs, divided): 400 Gb/s a GPU",
    ),
}  # fmt: skip


def find(name: str, changes: list[str] = ()) -> GPU:
    """A GPU of the table, with the user's figures.

    Args:
        name: in the table.
        changes: FIELD=NUMBER, in the units of GPU.

    Raises:
        ValueError: an unknown name or field, or no number.
    """
    if name not in GPUS:
        raise ValueError(f"--gpu {name}: not one of {', '.join(GPUS)}")
    numbers = {}
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
