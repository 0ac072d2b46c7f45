"""Rearrange the values of a row of the name map between Megatron and Hugging Face.

Every transform maps tuples of tensors, in the row's order, for any dtype and on the meta device
(for shapes alone). It only moves values: a round trip is bitwise exact, except where its docstring
says otherwise.
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
    """[padded_vocab, h] <-> [vocab, h]: remove Megatron's padding, or add it as zeros.

    The values of padding rows are lost; they stand for no token.
    """

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        (table,) = megatron
        return (table[: architecture.vocab_size],)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        (table,) = hf
        missing = architecture.padded_vocab_size - table.shape[0]
        return (torch.nn.functional.pad(table, (0, 0, 0, missing)) if missing else table,)


def _split_groups(fused: Tensor, architecture: Architecture) -> Tensors:
    # Megatron's rows are, for each group, its query heads, its key and its value.
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

    Biases lack the last axis.
    """

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        (fused,) = megatron
        return _split_groups(fused, architecture)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        query, key, value = hf
        return (_join_groups(query, key, value, architecture),)


@dataclass(frozen=True)
class PackedQKV:
    """Megatron's fused QKV <-> Baichuan's W_pack: all of q, then all of k, then all of v."""

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        (fused,) = megatron
        return (torch.cat(_split_groups(fused, architecture)),)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        (packed,) = hf
        queries = architecture.num_attention_heads * architecture.kv_channels
        keys = architecture.num_query_groups * architecture.kv_channels
        query, key, value = packed.split([queries, keys, keys])
        return (_join_groups(query, key, value, architecture),)


@dataclass(frozen=True)
class GateAndUp:
    """Megatron's SwiGLU linear_fc1 [2 * ffn, h], gate first <-> gate and up, [ffn, h] each."""

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        return megatron[0].chunk(2)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        return (torch.cat(hf),)


@dataclass(frozen=True)
class ExpertMatrices:
    """Megatron's stacked experts [E, rows, columns] <-> the matrices of each expert in turn.

    Args:
        per_expert: Matrices per expert: 1 (linear_fc2) or 2 (linear_fc1: gate and up).
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
    """The taps of keys or values, [ng] each <-> Baichuan's conv_k or conv_v [1, 1, ng, 1, 2].

    Baichuan's last axis has the PREVIOUS token first and the current one second (arXiv 2411.19574,
    Appendix F), unlike tap 1 (current) and tap 2 (previous).

    Variants other than `free` are written as the taps that they apply, and come back as `free`.
    """

    def to_hf(self, megatron: Tensors, architecture: Architecture) -> Tensors:
        assert architecture.kv_shift is not None  # only models with taps have such a row
        dtype = megatron[0].dtype
        parameters = torch.stack(megatron).float()
        current, previous = taps_from_parameters(architecture.kv_shift, parameters)
        stored = torch.stack((previous, current), dim=-1).to(dtype)
        return (stored.reshape(1, 1, architecture.num_query_groups, 1, 2),)

    def to_megatron(self, hf: Tensors, architecture: Architecture) -> Tensors:
        (stored,) = hf
        previous, current = stored.reshape(architecture.num_query_groups, 2).unbind(-1)
        return (current, previous)
