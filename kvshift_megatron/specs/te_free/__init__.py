"""The layer parts that run without Transformer Engine, on a CPU or a GPU.

Megatron's own TE-free norm refuses sequence parallelism, and its core attention materializes the
score matrix; these two take their places.
"""

from kvshift_megatron.specs.te_free.core_attention import SDPACoreAttention
from kvshift_megatron.specs.te_free.norm import SequenceParallelNorm
from kvshift_megatron.specs.te_free.spec import with_local_parts

__all__ = ["SDPACoreAttention", "SequenceParallelNorm", "with_local_parts"]
