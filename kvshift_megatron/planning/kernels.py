"""Which kernels a dry run stands for: what they keep for the backward pass is what differs.

On the meta device torch takes its decompositions, which keep more than any real kernel does, so the
choice has to be made here. `gpu`: Transformer Engine's and this package's kernels, as far as they
are known; `cpu`: what torch's kernels on a CPU keep, to compare a plan with a run on a CPU.

                 gpu keeps                                   cpu keeps
    attention    query, key, value, output, log-sum-exp;     the same, and the whole QKV output if
                 values that are a view are copied first     values are a view (with packing or
                 (with context parallelism: all ranks'       context parallelism: no log-sum-exp)
                 keys and values)
    RMSNorm      input, one fp32 a token                     fp32 copies (torch's decomposition)
    shift        keys and values, or copies of them where    keys and values
                 they are little of the QKV output
    SwiGLU       its input                                   its parts
    (--no-bias-swiglu-fusion: as on the cpu)

Under context parallelism (p2p) Transformer Engine's attention keeps its own keys and values and not
all ranks', and passes them and their gradients on by sends, where this package's gathers and
reduce-scatters: other messages and, backward, fewer bytes. With --recompute-modules layernorm, or
FP8, it differs too.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from kvshift_megatron.ops.dispatch import HAS_TRITON, VARIABLE, requested

aten = torch.ops.aten


def use(kernels: str) -> None:
    """Installs them in this process, for good.

    Args:
        kernels: gpu or cpu.
    """
    from kvshift_megatron.specs.te_free import core_attention, sdpa

    if kernels == "cpu":
        sdpa.scaled_dot_product_attention = _as_on_cpu(sdpa.scaled_dot_product_attention)
        # Tensors without data get a GPU's kernels unless told otherwise.
        os.environ[VARIABLE] = "eager"
    else:
        if not HAS_TRITON and requested() != "eager":
            raise ValueError(
                "a GPU's kernels of the shift are Triton's, which is not installed: pip install "
                f"triton, or set {VARIABLE}=eager to plan without them"
            )
        sdpa.scaled_dot_product_attention = _on_gpu
        core_attention.blockwise_attention = whole_attention
        torch.nn.functional.rms_norm = _rms_norm(torch.nn.functional.rms_norm)


def flash_attention(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False
) -> Tensor:
    """torch's scaled_dot_product_attention with the kernel that it takes on a CPU."""
    if attn_mask is not None:
        # As torch converts it before it calls the kernel.
        zero, infinite = (torch.scalar_tensor(x, dtype=query.dtype) for x in (0.0, -torch.inf))
        attn_mask = torch.where(attn_mask, zero, infinite)
    return aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
    )[0]


def _on_gpu(query, key, value, *args, **kwargs) -> Tensor:
    if value.untyped_storage().nbytes() > value.numel() * value.element_size():
        value = value.clone()
    return flash_attention(query, key, value, *args, **kwargs)


def _as_on_cpu(original: Callable) -> Callable:
    def attention(*args, dropout_p=0.0, **kwargs):
        # With dropout torch has no fused kernel on a CPU.
        kernel = original if dropout_p else flash_attention
        return kernel(*args, dropout_p=dropout_p, **kwargs)

    return attention


def whole_attention(query, key, value, *places, scale, dropout, window=None) -> Tensor:
    """`blockwise_attention` as one kernel that needs no masks in memory."""
    from kvshift_megatron.specs.te_free.sdpa import sdpa

    return sdpa(query, key, value, scale=scale, dropout=dropout)


def _rms_norm(original: Callable) -> Callable:
    def rms_norm(input, normalized_shape, weight=None, eps=None):
        if not input.is_meta or weight is None:
            return original(input, normalized_shape, weight, eps)
        return FusedRMSNorm.apply(input, weight)

    return rms_norm


class FusedRMSNorm(torch.autograd.Function):
    """Shapes of the fused kernel: no arithmetic is done."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        reciprocal = x.new_empty((*x.shape[:-1], 1), dtype=torch.float32)
        ctx.save_for_backward(x, weight, reciprocal)
        return torch.empty_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor):
        x, weight, _ = ctx.saved_tensors
        return torch.empty_like(x), torch.empty_like(weight)
