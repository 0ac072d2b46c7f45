"""Peak dense bf16 FLOP/s by GPU, for MFU; for a GPU that is not listed, give --gpu-peak-tflops.

From NVIDIA's data sheets at the full power limit: dense, half of what they state with sparsity.
"""

import re

# (pattern for torch.cuda.get_device_name, TFLOP/s, data sheet). The first match counts.
_PEAKS = (
    (r"\bGB200\b", 2500.0, "NVIDIA GB200 NVL72: 5 PFLOPS a GPU with sparsity"),
    (r"\bB200\b", 2250.0, "NVIDIA HGX B200: 4.5 PFLOPS a GPU with sparsity"),
    (r"\bH200 NVL\b", 835.5, "NVIDIA H200: NVL, 1,671 TFLOPS with sparsity"),
    (r"\bG?H200\b", 989.4, "NVIDIA H200: SXM, 1,979 TFLOPS with sparsity; GH200 likewise"),
    (r"\bH100 NVL\b", 835.5, "NVIDIA H100: NVL, 1,671 TFLOPS with sparsity"),
    (r"\bH100 PCIe\b", 756.5, "NVIDIA H100: PCIe, 1,513 TFLOPS with sparsity"),
    (r"\bH[18]00\b", 989.4, "NVIDIA H100: SXM, 1,979 TFLOPS with sparsity; H800 likewise"),
    (r"\bA[18]00\b", 312.0, "NVIDIA A100: 312 TFLOPS, every form; A800 likewise"),
    (r"\bL40S\b", 362.0, "NVIDIA L40S: 362 TFLOPS"),
)


def peak_tflops(name: str) -> float | None:
    """Return the peak dense bf16 TFLOP/s of a GPU by its name in CUDA; None if unknown.

    That of a part of a GPU (MIG) is unknown.
    """
    if " MIG " in name:
        return None
    return next((peak for pattern, peak, _ in _PEAKS if re.search(pattern, name)), None)
