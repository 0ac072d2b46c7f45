"""Choose the kernels that a dry run assumes: they differ in what they keep for the backward pass.

On the meta device torch uses its decompositions, which keep more than any real kernel does, so this
module replaces them. `gpu`: Transformer Engine's and this package's kernels, as far as they are
known; `cpu`: torch's kernels on a CPU, to compare a plan with a run on a CPU.

                 gpu keeps                                   cpu keeps
    attention    query, key, value, output, log-sum-exp;     the same, and the whole QKV output if
                 values that are a view are copied first     values are a view (with packing or
                 (with context parallelism: all ranks'       context parallelism: no log-sum-exp)
                 keys and values)
    RMSNorm      input, one fp32 per token                   fp32 copies (torch's decomposition)
    shift        keys and values, or copies of them if       keys and values
                 they are a small part of the QKV output
    SwiGLU       its input                                   its intermediate results
    (--no-bias-swiglu-fusion: as for cpu)

With context parallelism (p2p) Transformer Engine's attention keeps only its own keys and values and
passes them and their gradients on. This package's gathers and reduce-scatters them instead, with
other messages and, in the backward pass, fewer bytes. Transformer Engine also differs with
--recompute-modules layernorm and with FP8.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from kvshift_megatron.ops.dispatch import HAS_TRITON, VARIABLE, requested
from kvshift_megatron.upstream import planning_table, substitutions

aten = torch.ops.aten


def use(kernels: str) -> None:
    """Install a kind of kernels in this process; this cannot be undone.

    Args:
        kernels: "gpu" or "cpu".

    Raises:
        ValueError: A GPU's kernels need Triton, which is not installed.
    """
    if kernels == "cpu":
        substitutions.apply(planning_table.kernels_of_a_cpu(_as_on_cpu))
        # By default tensors without data get a GPU's kernels.
        os.environ[VARIABLE] = "eager"
    else:
        if not HAS_TRITON and requested() != "eager":
            raise ValueError(
                "a GPU's kernels for the shift need Triton, which is not installed: pip install "
                f"triton, or set {VARIABLE}=eager to plan without them"
            )
        substitutions.apply(
            planning_table.kernels_of_a_gpu(
                attention=_on_gpu, whole_attention=whole_attention, rms_norm=_rms_norm
            )
        )


def flash_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    """Compute scaled_dot_product_attention with the kernel that torch uses on a CPU.

    Args:
        query: [b, np, sq, hn].
        key, value: [b, ng, sk, hn].
        attn_mask: bool, broadcastable to [b, np, sq, sk], True to attend.
        dropout_p, is_causal, scale, enable_gqa: As torch's.

    Returns:
        Attention output [b, np, sq, hn], of the query's dtype.
    """
    if attn_mask is not None:
        # Converted as torch does before it calls the kernel.
        zero, infinite = (torch.scalar_tensor(x, dtype=query.dtype) for x in (0.0, -torch.inf))
        attn_mask = torch.where(attn_mask, zero, infinite)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _on_gpu(query: Tensor, key: Tensor, value: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if value.untyped_storage().nbytes() > value.numel() * value.element_size():
        value = value.clone()
    return flash_attention(query, key, value, *args, **kwargs)


def _as_on_cpu(original: Callable) -> Callable:
    def attention(*args: Any, dropout_p: float = 0.0, **kwargs: Any) -> Tensor:
        # With dropout torch has no fused kernel on a CPU.
        kernel: Callable = original if dropout_p else flash_attention
        return kernel(*args, dropout_p=dropout_p, **kwargs)

    return attention


def whole_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *places: Any,
    scale: float,
    dropout: float,
    window: Any = None,
) -> Tensor:
    """Stand in for `blockwise_attention` as one kernel that needs no masks in memory.

    Args:
        query: [sq, b, np, hn].
        key, value: [sk, b, ng, hn].
        places, window: Ignored, because no mask is made.
        scale: Of the scores.
        dropout: Probability.

    Returns:
        Attention output [sq, b, np, hn], of the query's dtype.
    """
    from kvshift_megatron.specs.te_free.sdpa import sdpa

    return sdpa(query, key, value, scale=scale, dropout=dropout)


def _rms_norm(original: Callable) -> Callable:
    def rms_norm(
        input: Tensor, normalized_shape: Any, weight: Tensor | None = None, eps: float | None = None
    ) -> Tensor:
        if not input.is_meta or weight is None:
            return original(input, normalized_shape, weight, eps)
        return FusedRMSNorm.apply(input, weight)

    return rms_norm


class FusedRMSNorm(torch.autograd.Function):
    """The fused kernel's shapes without its arithmetic."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor) -> Tensor:
        """Return an output like `x` [..., h], and keep one fp32 per token."""
        reciprocal = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, reciprocal)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return gradients like `x` and the weight."""
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
