"""torch's LayerNorm and RMSNorm, usable under sequence parallelism."""

from typing import Any

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class SequenceParallelNorm:
    """Build torch's norm for `config.normalization`, with WrappedTorchNorm's arguments.

    Parallelism: The parameters are replicated. Under sequence parallelism each rank sees only its
    part of the tokens, so they carry the attribute by which Megatron sums their gradients over the
    tensor-parallel group (`finalize_model_grads`).

    Raises:
        ValueError: torch has no module for the normalization.
    """

    def __new__(  # type: ignore[misc]  # a torch module, as from WrappedTorchNorm
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused: Any
    ) -> torch.nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma needs Transformer Engine's norm: drop "
                "--apply-layernorm-1p, or use --transformer-impl transformer_engine on a GPU"
            )
        norm: torch.nn.Module
        if config.normalization == "LayerNorm":
            norm = torch.nn.LayerNorm(hidden_size, eps=eps)
        elif config.normalization == "RMSNorm":
            norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        else:
            raise ValueError(
                f"normalization={config.normalization!r} has no TE-free norm: "
                "use LayerNorm or RMSNorm"
            )
        parameter: Any  # Megatron's attribute is not one of torch's
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
