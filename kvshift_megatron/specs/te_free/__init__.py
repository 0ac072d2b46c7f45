"""Layer parts that run without Transformer Engine (TE-free), on a CPU or a GPU.

They replace two of Megatron's own TE-free parts: a norm that refuses sequence parallelism, and a
core attention that materializes the score matrix.
"""

from kvshift_megatron.specs.te_free.core_attention import SDPACoreAttention
from kvshift_megatron.specs.te_free.norm import SequenceParallelNorm
from kvshift_megatron.specs.te_free.spec import with_local_parts

__all__ = ["SDPACoreAttention", "SequenceParallelNorm", "with_local_parts"]
