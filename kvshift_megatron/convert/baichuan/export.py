"""Prepare the output layer for the Baichuan-M1 layout, whose clients normalize it.

Clients of the layout scale every row of lm_head to length one when they load it (w / |w|), which
silently changes the logits of an ordinary output layer. Two exports are exact:

fold: If all rows have the same length C, C moves into the weight of the final norm.
pad: For any output layer. The hidden size grows by zero channels, and in some of them lm_head gets
    what each row lacks to reach the length of the longest. See `norm_head_padding`.
"""

from dataclasses import asdict, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.baichuan.norm_head_padding import FIELD, PaddedTable, Padding
from kvshift_megatron.convert.tensor_table import TensorTable
from kvshift_megatron.convert.to_hf_config import config_from_architecture

if TYPE_CHECKING:
    from kvshift_megatron.convert.to_hf import MegatronTable

# Relative difference up to which rows count as equally long, as they are rounded.
_SAME_LENGTH = 1e-6
_EPSILON = 1e-7  # clients add it to the length that they divide by


def config_for_clients(architecture: Architecture, norm_head: str) -> dict:
    """Return the config.json of a model as written, without the fields that `for_clients` adds.

    Raises:
        ValueError: The layout cannot express the model, padded or not.
    """
    # Clients require an lm_head, even for a tied model.
    untied = replace(architecture, tied=False)
    if norm_head == "pad":
        untied = _padding(untied, 1.0).widened(untied)
    return config_from_architecture("baichuan_m1", untied)


def for_clients(
    table: "MegatronTable", architecture: Architecture, norm_head: str
) -> tuple[TensorTable, dict]:
    """Prepare the table's output layer for clients that normalize it.

    Args:
        table: In the layout baichuan_m1, for a tied or an untied model.
        architecture: The model as written.
        norm_head: "fold" or "pad".

    Returns:
        (table, further fields of config.json).

    Raises:
        ValueError: norm_head is "fold", and the rows differ in length.
    """
    lengths = _row_lengths(table)
    longest, shortest = lengths.max().item(), lengths.min().item()
    if norm_head == "pad":
        padding = _padding(architecture, longest)
        return PaddedTable(OutputTable(table), padding, architecture), {FIELD: asdict(padding)}
    if longest - shortest > _SAME_LENGTH * longest:
        raise ValueError(
            f"the rows of the output layer have lengths from {shortest:.4g} to {longest:.4g}, but "
            "clients of the layout baichuan_m1 scale them all to length one, which would change "
            "the logits: add --norm-head pad, which widens the model by a few zero channels and "
            "keeps the logits"
        )
    return OutputTable(table, lengths.mean().item()), {}


def _padding(arch: Architecture, row_length: float) -> Padding:
    return Padding(
        arch.hidden_size,
        arch.kv_channels,
        arch.norm_epsilon,
        arch.rotary_base,
        row_length,
        arch.ffn_hidden_size,
    )


def _output_row(table: "MegatronTable") -> int:
    """Return the index of the row with the output layer: the embedding of a tied model."""
    name = "embedding.word_embeddings.weight" if table.architecture.tied else "output_layer.weight"
    return next(i for i, row in enumerate(table.rows) if row.megatron[0].te == name)


def _row_lengths(table: "MegatronTable") -> Tensor:
    (weight,) = table.read(_output_row(table))
    # In parts, so that the copy in float64 stays small.
    lengths = torch.cat([part.double().norm(dim=-1) for part in weight.split(4096)])
    if not lengths.isfinite().all() or lengths.max() == 0.0:
        raise ValueError("the output layer is all zeros or not finite: it cannot be normalized")
    return lengths


class OutputTable:
    """A table that has an lm_head even for a tied model, and scales the final norm's weight.

    Args:
        table: In the layout baichuan_m1.
        factor: The common length of lm_head's rows; 1 leaves the norm unchanged.
    """

    def __init__(self, table: "MegatronTable", factor: float = 1.0):
        self._table, self._factor = table, factor
        self._output = _output_row(table)
        norm = "decoder.final_layernorm.weight"
        self._norm = next(i for i, row in enumerate(table.rows) if row.megatron[0].te == norm)

    def __len__(self) -> int:
        return len(self._table) + self._table.architecture.tied

    def planned(self, i: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """See TensorTable.planned."""
        if i < len(self._table):
            return self._table.planned(i)
        ((_, shape, dtype),) = self._table.planned(self._output)
        return [("lm_head.weight", shape, dtype)]

    def read(self, i: int) -> tuple[Tensor, ...]:
        """See TensorTable.read."""
        if i == len(self._table):
            return self._table.read(self._output)
        tensors = self._table.read(i)
        if i == self._norm and self._factor != 1.0:
            (weight,) = tensors
            return ((weight.double() * self._factor).to(weight.dtype),)
        return tensors


def normalized(weight: Tensor) -> Tensor:
    """Normalize lm_head [vocab, h] in place, as clients of the layout do; return it."""
    for part in weight.split(4096):
        rows = part.double()
        part.copy_(rows / (rows.norm(dim=-1, keepdim=True) + _EPSILON))
    return weight
