"""An exact export of any output layer to clients that normalize it (layout baichuan_m1).

Such a client divides every row of lm_head by its length |w|. Here all rows get the same length C,
the longest one's, by zero channels:

- Every head grows from d to d' channels, so that the hidden size H' = heads * d' has channels to
  spare. Nothing writes to them: the residual stream is zero there.
- lm_head has sqrt(C^2 - |w|^2) in spare channels, where it meets zeros; C goes into the final norm.
- RMSNorm takes its mean over H' channels instead of H: its weight times sqrt(H / H') and epsilon
  times H / H' give the same output.
- RoPE turns channel i of a head with i + d/2 by theta^(-2i/d): the halves of a head go to the
  beginnings of the two new halves, and theta^(d'/d) takes theta's place.
- The softmax scale is 1 / sqrt(d'): the queries' rows times sqrt(d' / d) make up for it.
"""

from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.formats.safetensors_files import SafetensorsFolder

FIELD = "kvshift_padding"  # in config.json: what the import has to undo


@dataclass(frozen=True)
class Padding:
    """Sizes of the model as it was, and what was changed beside them.

    Args:
        hidden_size, head_dim, rms_norm_eps, rope_theta: before padding.
        row_length: C, of every row of lm_head now.
    """

    hidden_size: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    row_length: float

    def new_head_dim(self, num_heads: int) -> int:
        """The smallest even one with at least one channel to spare over all heads."""
        wanted = max(self.head_dim, -(-(self.hidden_size + 1) // num_heads))
        return wanted + wanted % 2

    def widened(self, architecture: Architecture) -> Architecture:
        """The architecture with the new sizes.

        Raises:
            ValueError: an odd head size, which has no halves.
        """
        if self.head_dim % 2:
            raise ValueError(f"--norm-head pad: kv_channels={self.head_dim} must be even")
        heads = architecture.num_attention_heads
        head_dim = self.new_head_dim(heads)
        return replace(
            architecture,
            hidden_size=heads * head_dim,
            kv_channels=head_dim,
            norm_epsilon=self.rms_norm_eps * self.hidden_size / (heads * head_dim),
            rotary_base=self.rope_theta ** (head_dim / self.head_dim),
        )


class _Channels:
    """Placing and taking out the original channels of each kind of tensor."""

    def __init__(self, padding: Padding, heads: int, groups: int):
        self.old, self.heads, self.groups = padding, heads, groups
        self.head_dim = padding.new_head_dim(heads)
        self.hidden = heads * self.head_dim
        half, new_half = padding.head_dim // 2, self.head_dim // 2
        first = torch.arange(half)
        self.kept_in_head = torch.cat((first, new_half + first))
        self.norm_scale = (padding.hidden_size / self.hidden) ** 0.5
        self.query_scale = (self.head_dim / padding.head_dim) ** 0.5

    def widen(self, name: str, tensor: Tensor) -> Tensor:
        """A tensor of the model as it was -> as it is written."""
        if name.endswith("norm.weight"):
            scale = self.norm_scale * (self.old.row_length if name == "model.norm.weight" else 1.0)
            return self._hidden(_scaled(tensor, scale), 0)
        if name.endswith("W_pack.weight"):
            packed = self._in_heads(self._hidden(tensor, 1), 0)
            queries = packed[: self.hidden]
            queries.copy_(_scaled(queries, self.query_scale))
            return packed
        if name.endswith("o_proj.weight"):
            return self._hidden(self._in_heads(tensor, 1), 0)
        if name == "lm_head.weight":
            return self._with_length(self._hidden(tensor, 1))
        axis = self.hidden_axis(name)
        return tensor if axis is None else self._hidden(tensor, axis)

    def narrow(self, name: str, tensor: Tensor) -> Tensor:
        """The reverse of `widen`."""
        hidden = self.old.hidden_size
        if name.endswith("norm.weight"):
            scale = self.norm_scale * (self.old.row_length if name == "model.norm.weight" else 1.0)
            return _scaled(tensor[:hidden], 1.0 / scale)
        if name.endswith("W_pack.weight"):
            queries = _scaled(tensor[: self.hidden], 1.0 / self.query_scale)
            packed = torch.cat((queries, tensor[self.hidden :]))
            return self._out_of_heads(packed, 0)[:, :hidden]
        if name.endswith("o_proj.weight"):
            return self._out_of_heads(tensor, 1)[:hidden]
        axis = self.hidden_axis(name)
        return tensor if axis is None else tensor.narrow(axis, 0, hidden)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The shape that `narrow` gives."""
        with torch.device("meta"):
            return tuple(self.narrow(name, torch.empty(shape)).shape)

    @staticmethod
    def hidden_axis(name: str) -> int | None:
        """The axis of a plain matrix that the residual stream meets; None for the taps."""
        if name.endswith(("conv_k", "conv_v")):
            return None
        return 0 if name.endswith("down_proj.weight") else 1

    def _hidden(self, tensor: Tensor, axis: int) -> Tensor:
        shape = list(tensor.shape)
        shape[axis] = self.hidden
        wide = tensor.new_zeros(shape)
        wide.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
        return wide

    def _in_heads(self, tensor: Tensor, axis: int) -> Tensor:
        split = tensor.unflatten(axis, (-1, self.old.head_dim))
        shape = list(split.shape)
        shape[axis + 1] = self.head_dim
        wide = tensor.new_zeros(shape)
        wide.index_copy_(axis + 1, self.kept_in_head.to(tensor.device), split)
        return wide.flatten(axis, axis + 1)

    def _out_of_heads(self, tensor: Tensor, axis: int) -> Tensor:
        split = tensor.unflatten(axis, (-1, self.head_dim))
        kept = self.kept_in_head.to(tensor.device)
        return split.index_select(axis + 1, kept).flatten(axis, axis + 1)

    def _with_length(self, weight: Tensor) -> Tensor:
        """Fill spare channels so that every row has the length C, as far as the dtype can."""
        spare = min(3, self.hidden - self.old.hidden_size)
        eps = torch.finfo(weight.dtype).eps
        for rows in weight.split(4096):
            missing = self.old.row_length**2 - rows.double().square().sum(dim=-1)
            for channel in range(spare):
                root = missing.clamp(min=0.0).sqrt()
                if channel + 1 < spare:
                    root = root * (1.0 - eps)  # below, so that the next channel has the rest
                column = rows[:, self.old.hidden_size + channel]
                column.copy_(root)
                missing = missing - column.double().square()
        return weight


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    if tensor.is_meta:
        return tensor
    return (tensor.double() * scale).to(tensor.dtype)


class PaddedTable:
    """A table in the layout baichuan_m1 with every tensor widened; see the module.

    Args:
        table: a MegatronTable, or baichuan.py's with an lm_head.
        padding: what is padded.
    """

    def __init__(self, table, padding: Padding, architecture: Architecture):
        self._table = table
        self._channels = _Channels(
            padding, architecture.num_attention_heads, architecture.num_query_groups
        )

    def __len__(self) -> int:
        return len(self._table)

    def planned(self, i: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """As MegatronTable.planned."""
        planned = []
        for name, shape, dtype in self._table.planned(i):
            # A row of lm_head is filled up by its numbers, not by its shape alone.
            alike = "model.embed_tokens.weight" if name == "lm_head.weight" else name
            with torch.device("cpu"):
                wide = self._channels.widen(alike, torch.empty(shape, dtype=dtype, device="meta"))
            planned.append((name, tuple(wide.shape), dtype))
        return planned

    def read(self, i: int) -> tuple[Tensor, ...]:
        """As MegatronTable.read."""
        names = [name for name, _, _ in self._table.planned(i)]
        tensors = self._table.read(i)
        return tuple(self._channels.widen(name, one) for name, one in zip(names, tensors))


class UnpaddedFolder:
    """A folder that `PaddedTable` wrote, with the padding taken out again.

    Args:
        folder: the tensors as stored.
        fields: config.json.
        file: its name, for messages.

    Raises:
        ValueError: the record of the padding does not fit the rest of config.json.
    """

    def __init__(self, folder: SafetensorsFolder, fields: dict, file: Path):
        self.path, self._folder = folder.path, folder
        try:
            padding = Padding(**fields[FIELD])
            heads, groups = fields["num_attention_heads"], fields["num_key_value_heads"]
            self._channels = _Channels(padding, heads, groups)
        except (TypeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"{file}: {FIELD} is damaged: {error}") from error
        if fields["hidden_size"] != self._channels.hidden:
            raise ValueError(
                f"{file}: hidden_size={fields['hidden_size']} is not {self._channels.hidden}, which"
                f" {FIELD} means: the two are not of the same model"
            )
        self.fields = {
            **fields,
            **{k: v for k, v in asdict(padding).items() if k != "row_length"},
        }

    def names(self) -> set[str]:
        """As SafetensorsFolder.names."""
        return self._folder.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """As SafetensorsFolder.shape, of the tensor without padding."""
        return self._channels.shape(name, self._folder.shape(name))

    def dtype(self, name: str) -> torch.dtype:
        """As SafetensorsFolder.dtype."""
        return self._folder.dtype(name)

    def read(self, name: str) -> Tensor:
        """As SafetensorsFolder.read, of the tensor without padding."""
        return self._channels.narrow(name, self._folder.read(name)).contiguous()
