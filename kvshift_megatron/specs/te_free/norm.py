"""LayerNorm and RMSNorm of torch, made fit for sequence parallelism."""

import torch
from megatron.core.transformer.transformer_config import TransformerConfig


class SequenceParallelNorm:
    """Builds torch's norm for `config.normalization`; takes WrappedTorchNorm's arguments.

    Parallelism: the weight is replicated. Under sequence parallelism a rank sees its part of the
    tokens only, so the parameters carry the attribute by which Megatron sums their gradients over
    the tensor-parallel group (`finalize_model_grads`).

    Raises:
        ValueError: a normalization that torch has no module for.
    """

    def __new__(
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_unused
    ) -> torch.nn.Module:
        if config.layernorm_zero_centered_gamma:
            raise ValueError(
                "layernorm_zero_centered_gamma needs Transformer Engine's norm: drop "
                "--apply-layernorm-1p, or use --transformer-impl transformer_engine on a GPU"
            )
        if config.normalization == "LayerNorm":
            norm = torch.nn.LayerNorm(hidden_size, eps=eps)
        elif config.normalization == "RMSNorm":
            norm = torch.nn.RMSNorm(hidden_size, eps=eps)
        else:
            raise ValueError(
                f"normalization={config.normalization!r} has no TE-free norm: "
                "use LayerNorm or RMSNorm"
            )
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm
