"""KV-shifting attention (arXiv 2411.19574) for NVIDIA Megatron-Core."""

from kvshift_megatron.config import KVShiftConfig

__version__ = "0.1.0"

__all__ = ["KVShiftConfig", "__version__"]
