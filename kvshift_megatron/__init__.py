"""KV-shifting attention (arXiv 2411.19574) for NVIDIA Megatron-Core.

Importing the package changes nothing in the process. It raises if the process was started with
`--spec` and a module of this package that does not exist: Megatron would train vanilla attention.
"""

import sys
from typing import Any

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.specs.named_specs import refuse_misspelt

__version__ = "0.1.0"

__all__ = ["KVShiftConfig", "__version__", "assert_kv_shift"]

refuse_misspelt(getattr(sys, "argv", []))


def __getattr__(name: str) -> Any:
    # On first use only: this imports Megatron, which on a CPU must wait for `cpu.enable()`.
    if name == "assert_kv_shift":
        from kvshift_megatron.checks.model import assert_kv_shift

        return assert_kv_shift
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
