"""Megatron's names for hybrid stacks, which were Mamba's before 0.18."""

try:
    from megatron.core.models.hybrid.hybrid_block import HybridStack, HybridStackSubmodules
    from megatron.core.models.hybrid.hybrid_layer_allocation import Symbols, parse_hybrid_pattern
except ImportError:
    from megatron.core.ssm.mamba_block import MambaStack as HybridStack
    from megatron.core.ssm.mamba_block import MambaStackSubmodules as HybridStackSubmodules
    from megatron.core.ssm.mamba_hybrid_layer_allocation import Symbols, parse_hybrid_pattern

__all__ = ["HybridStack", "HybridStackSubmodules", "Symbols", "parse_hybrid_pattern"]
