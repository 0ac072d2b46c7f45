"""What the Baichuan-M1 layout asks for beyond other names: its normalized output layer.

Clients of the layout scale every row of lm_head to length one when they load it (w / |w|), so that
an ordinary output layer would give other logits there, without a word. Two exports are exact:

fold: where all rows have the same length C, C moves into the weight of the final norm.
pad: any output layer. The hidden size grows by zero channels, and in some of them lm_head gets what
    each row lacks to the length of the longest. See `norm_head_padding`.
"""

from dataclasses import asdict, replace

import torch
from torch import Tensor

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.baichuan.norm_head_padding import FIELD, PaddedTable, Padding
from kvshift_megatron.convert.hf_config import config_from_architecture

# Relative: rows of one length, as far as the dtype can say.
_SAME_LENGTH = 1e-6
_EPSILON = 1e-7  # clients add it to the length that they divide by


def config_for_clients(architecture: Architecture, norm_head: str) -> dict:
    """The config.json of a model as written, but for what `for_clients` adds.

    Raises:
        ValueError: the layout cannot express the model, padded or not.
    """
    # Clients want an lm_head, also of a tied model.
    one = replace(architecture, tied=False)
    if norm_head == "pad":
        one = _padding(one, 1.0).widened(one)
    return config_from_architecture("baichuan_m1", one)


def for_clients(table, architecture: Architecture, norm_head: str):
    """The table with the output layer made ready for being normalized.

    Args:
        table: a MegatronTable in the layout baichuan_m1, of a tied or an untied model.
        architecture: as written.
        norm_head: "fold" or "pad".

    Returns:
        (table, further fields of config.json).

    Raises:
        ValueError: "fold", and the rows differ in length.
    """
    lengths = _row_lengths(table)
    longest, shortest = lengths.max().item(), lengths.min().item()
    if norm_head == "pad":
        padding = _padding(architecture, longest)
        return PaddedTable(OutputTable(table), padding, architecture), {FIELD: asdict(padding)}
    if longest - shortest > _SAME_LENGTH * longest:
        raise ValueError(
            f"the rows of the output layer have lengths from {shortest:.4g} to {longest:.4g}, and "
            "clients of the layout baichuan_m1 scale them all to one, which would change the "
            "logits: add --norm-head pad, which widens the model by a few zero channels and keeps "
            "the logits"
        )
    return OutputTable(table, lengths.mean().item()), {}


def _padding(one: Architecture, row_length: float) -> Padding:
    return Padding(one.hidden_size, one.kv_channels, one.norm_epsilon, one.rotary_base, row_length)


def _output_row(table) -> int:
    """Index of the row with the output layer: the embedding, where the two are tied."""
    name = "embedding.word_embeddings.weight" if table.architecture.tied else "output_layer.weight"
    return next(i for i, row in enumerate(table.rows) if row.megatron[0].te == name)


def _row_lengths(table) -> Tensor:
    (weight,) = table.read(_output_row(table))
    # In parts, so that the copy in float64 stays small.
    lengths = torch.cat([part.double().norm(dim=-1) for part in weight.split(4096)])
    if not lengths.isfinite().all() or lengths.max() == 0.0:
        raise ValueError("the output layer is all zeros or not finite, which cannot be normalized")
    return lengths


class OutputTable:
    """The table with an lm_head also of a tied model, and the final norm's weight times a factor.

    Args:
        table: a MegatronTable in the layout baichuan_m1.
        factor: the common length of lm_head's rows; 1 leaves the norm alone.
    """

    def __init__(self, table, factor: float = 1.0):
        self._table, self._factor = table, factor
        self._output = _output_row(table)
        norm = "decoder.final_layernorm.weight"
        self._norm = next(i for i, row in enumerate(table.rows) if row.megatron[0].te == norm)

    def __len__(self) -> int:
        return len(self._table) + self._table.architecture.tied

    def planned(self, i: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """As MegatronTable.planned."""
        if i < len(self._table):
            return self._table.planned(i)
        ((_, shape, dtype),) = self._table.planned(self._output)
        return [("lm_head.weight", shape, dtype)]

    def read(self, i: int) -> tuple[Tensor, ...]:
        """As MegatronTable.read."""
        if i == len(self._table):
            return self._table.read(self._output)
        tensors = self._table.read(i)
        if i == self._norm and self._factor != 1.0:
            (weight,) = tensors
            return ((weight.double() * self._factor).to(weight.dtype),)
        return tensors


def normalized(weight: Tensor) -> Tensor:
    """lm_head as a client of the layout uses it, [vocab, h], in its own dtype; in place."""
    for part in weight.split(4096):
        rows = part.double()
        part.copy_(rows / (rows.norm(dim=-1, keepdim=True) + _EPSILON))
    return weight
