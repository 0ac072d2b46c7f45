"""How the numbers of a row of the name map change places between Megatron and Hugging Face.

Every transform takes and gives tuples of tensors in the row's order, works on any dtype and on the
meta device (which is how shapes are worked out), and only moves numbers: there and back is equal to
the bit, but for what its docstring says.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.taps import taps_from_parameters

Tensors = tuple[Tensor, ...]


class Transform(Protocol):
    """A pair of inverse functions."""

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        """Megatron's tensors of a row -> Hugging Face's."""

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        """Hugging Face's tensors of a row -> Megatron's."""


@dataclass(frozen=True)
class Identity:
    """The same tensor on both sides."""

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        return megatron

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        return hf


@dataclass(frozen=True)
class Vocabulary:
    """[padded_vocab, h] <-> [vocab, h]: Megatron's padding is cut off, and made of zeros.

    Not reversible in the padding rows, which stand for no token.
    """

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        (table,) = megatron
        return (table[: architecture.vocab_size],)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        (table,) = hf
        missing = architecture.padded_vocab_size - table.shape[0]
        return (torch.nn.functional.pad(table, (0, 0, 0, missing)) if missing else table,)


def _split_groups(fused: Tensor, architecture: Architecture) -> Tensors:
    # Megatron's rows, group by group: the group's query heads, its key, its value.
    groups, heads = architecture.num_query_groups, architecture.heads_per_group
    grouped = fused.reshape(groups, heads + 2, architecture.kv_channels, *fused.shape[1:])
    return tuple(part.reshape(-1, *fused.shape[1:]) for part in grouped.split([heads, 1, 1], dim=1))


def _join_groups(query: Tensor, key: Tensor, value: Tensor, architecture: Architecture) -> Tensor:
    groups = architecture.num_query_groups
    parts = [
        part.reshape(groups, -1, architecture.kv_channels, *part.shape[1:])
        for part in (query, key, value)
    ]
    return torch.cat(parts, dim=1).reshape(-1, *query.shape[1:])


@dataclass(frozen=True)
class SeparateQKV:
    """Megatron's fused QKV [ng * (nh / ng + 2) * hn, h] <-> q [nh * hn, h], k and v [ng * hn, h].

    Biases alike, without the last axis.
    """

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        return _split_groups(*megatron, architecture)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        return (_join_groups(*hf, architecture),)


@dataclass(frozen=True)
class PackedQKV:
    """Megatron's fused QKV <-> Baichuan's W_pack: all of q, then all of k, then all of v."""

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        return (torch.cat(_split_groups(*megatron, architecture)),)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        (packed,) = hf
        queries = architecture.num_attention_heads * architecture.kv_channels
        keys = architecture.num_query_groups * architecture.kv_channels
        return (_join_groups(*packed.split([queries, keys, keys]), architecture),)


@dataclass(frozen=True)
class GateAndUp:
    """Megatron's SwiGLU linear_fc1 [2 * ffn, h], gate first <-> gate and up [ffn, h]."""

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        return megatron[0].chunk(2)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        return (torch.cat(hf),)


@dataclass(frozen=True)
class ExpertMatrices:
    """Megatron's stacked experts [E, rows, columns] <-> the matrices of each expert in turn.

    One matrix an expert (linear_fc2), or two (linear_fc1: gate and up).
    """

    per_expert: int = 1

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        (stacked,) = megatron
        return tuple(matrix for expert in stacked for matrix in expert.chunk(self.per_expert))

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        stacked = torch.stack(hf)
        experts = architecture.num_experts
        return (stacked.reshape(experts, -1, stacked.shape[-1]),)


@dataclass(frozen=True)
class Convolution:
    """The taps of keys or values [ng] each <-> Baichuan's conv_k or conv_v [1, 1, ng, 1, 2].

    Baichuan's last axis has the PREVIOUS token first and the current one second (arXiv 2411.19574,
    Appendix F), the other way round than tap 1 and tap 2.

    Variants other than `free` are written as the taps that they mean, and come back as `free`.
    """

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        dtype = megatron[0].dtype
        parameters = torch.stack(megatron).float()
        current, previous = taps_from_parameters(architecture.kv_shift, parameters)
        stored = torch.stack((previous, current), dim=-1).to(dtype)
        return (stored.reshape(1, 1, architecture.num_query_groups, 1, 2),)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        (stored,) = hf
        previous, current = stored.reshape(architecture.num_query_groups, 2).unbind(-1)
        return (current, previous)
