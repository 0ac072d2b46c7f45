"""KV-shifting attention (arXiv 2411.19574) for NVIDIA Megatron-Core."""

import sys

from kvshift_megatron.config import KVShiftConfig

__version__ = "0.1.0"

__all__ = ["KVShiftConfig", "__version__", "assert_kv_shift"]


class _NoSuchModule:
    """The last import finder: a misspelt submodule of this package is no ImportError.

    Megatron turns an ImportError behind `--spec` into "no spec", and trains vanilla attention.
    """

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.startswith(f"{__name__}."):
            raise RuntimeError(
                f"there is no {name}: for --spec, {__name__}.layer_specs has kv_shift_layer_spec, "
                f"and {__name__}.finished_specs the finished specs"
            )


sys.meta_path.append(_NoSuchModule)


def __getattr__(name: str):
    # Importing it imports Megatron, which on a CPU has to wait for the device layer.
    if name == "assert_kv_shift":
        from kvshift_megatron.model_check import assert_kv_shift

        return assert_kv_shift
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
