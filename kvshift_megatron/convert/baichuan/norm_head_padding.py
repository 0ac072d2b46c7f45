"""Export any output layer exactly to clients that normalize it (layout baichuan_m1).

Such a client divides every row of lm_head by its length |w|. Zero channels give all rows the same
length C here, that of the longest row:

- Every head grows from d to d' channels, so that the hidden size H' = heads * d' has spare
  channels. Nothing writes to them: the residual stream is zero there.
- lm_head has sqrt(C^2 - |w|^2) in spare channels, where it meets zeros. The weight of the final
  norm is multiplied by C.
- RMSNorm takes its mean over H' channels instead of H. Its weight times sqrt(H / H') and its
  epsilon times H / H' give the same output.
- RoPE rotates channel i of a head together with channel i + d/2, at the frequency theta^(-2i/d).
  Each half of a head goes to the beginning of a new half, and theta^(d'/d) replaces theta.
- The softmax scale becomes 1 / sqrt(d'). The rows of the queries times sqrt(d' / d) compensate.

All widths are multiples of 64, as clients quantize only those: d' is chosen so, and the MLP grows
by channels that nothing reads.
"""

import math
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.formats.safetensors_files import SafetensorsFolder
from kvshift_megatron.convert.tensor_table import TensorTable

FIELD = "kvshift_padding"  # field of config.json: what the import has to undo
_MULTIPLE = 64  # numbers that mlx-lm quantizes as one group, unless told otherwise


@dataclass(frozen=True)
class Padding:
    """What the import needs to undo the padding; a field of config.json.

    Args:
        hidden_size, head_dim, rms_norm_eps, rope_theta: Values before padding.
        row_length: C, the length of every row of the padded lm_head.
        intermediate_size: Value before padding; None if it was not padded.
    """

    hidden_size: int
    head_dim: int
    rms_norm_eps: float
    rope_theta: float
    row_length: float
    intermediate_size: int | None = None

    def new_head_dim(self, num_heads: int) -> int:
        """Return the smallest even head size with at least one spare channel over all heads.

        The heads together are a multiple of 64 channels.
        """
        step = math.lcm(2, _MULTIPLE // math.gcd(_MULTIPLE, num_heads))
        needed = max(self.head_dim, -(-(self.hidden_size + 1) // num_heads))
        return -(-needed // step) * step

    def widened(self, architecture: Architecture) -> Architecture:
        """Return the architecture with the new sizes.

        Raises:
            ValueError: The head size is odd, so it has no halves.
        """
        if self.head_dim % 2:
            raise ValueError(f"--norm-head pad: kv_channels={self.head_dim} must be even")
        heads = architecture.num_attention_heads
        head_dim = self.new_head_dim(heads)
        return replace(
            architecture,
            hidden_size=heads * head_dim,
            kv_channels=head_dim,
            ffn_hidden_size=-(-architecture.ffn_hidden_size // _MULTIPLE) * _MULTIPLE,
            norm_epsilon=self.rms_norm_eps * self.hidden_size / (heads * head_dim),
            rotary_base=self.rope_theta ** (head_dim / self.head_dim),
        )


class _Channels:
    """Place the original channels of each kind of tensor among the new ones, and extract them.

    Args:
        padding: The sizes before.
        heads: Number of query heads.
        hidden: Hidden size after padding.
        ffn: Size of the MLP after padding.
    """

    def __init__(self, padding: Padding, heads: int, hidden: int, ffn: int):
        self.old = padding
        self.head_dim = hidden // heads
        self.hidden, self.ffn = hidden, ffn
        half, new_half = padding.head_dim // 2, self.head_dim // 2
        first = torch.arange(half)
        self.kept_in_head = torch.cat((first, new_half + first))
        self.norm_scale = (padding.hidden_size / self.hidden) ** 0.5
        self.query_scale = (self.head_dim / padding.head_dim) ** 0.5

    def widen(self, name: str, tensor: Tensor) -> Tensor:
        """Pad a tensor of the original model."""
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
        if (ffn_axis := self.ffn_axis(name)) is not None:
            tensor = _widened(tensor, ffn_axis, self.ffn)
        axis = self.hidden_axis(name)
        return tensor if axis is None else self._hidden(tensor, axis)

    def narrow(self, name: str, tensor: Tensor) -> Tensor:
        """Undo `widen`."""
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
        if (ffn_axis := self.ffn_axis(name)) is not None:
            tensor = tensor.narrow(ffn_axis, 0, self.old.intermediate_size or self.ffn)
        axis = self.hidden_axis(name)
        return tensor if axis is None else tensor.narrow(axis, 0, hidden)

    def shape(self, name: str, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape that `narrow` gives."""
        with torch.device("meta"):
            return tuple(self.narrow(name, torch.empty(shape)).shape)

    @staticmethod
    def hidden_axis(name: str) -> int | None:
        """Return the axis of a matrix that has the hidden size; None for the taps."""
        if name.endswith(("conv_k", "conv_v")):
            return None
        return 0 if name.endswith("down_proj.weight") else 1

    @staticmethod
    def ffn_axis(name: str) -> int | None:
        """Return the axis of a matrix that has the size of the MLP, if any."""
        if name.endswith("down_proj.weight"):
            return 1
        return 0 if name.endswith(("gate_proj.weight", "up_proj.weight")) else None

    def _hidden(self, tensor: Tensor, axis: int) -> Tensor:
        return _widened(tensor, axis, self.hidden)

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
        """Fill spare channels so that every row has the length C, as exactly as the dtype can."""
        spare = min(3, self.hidden - self.old.hidden_size)
        eps = torch.finfo(weight.dtype).eps
        for rows in weight.split(4096):
            missing = self.old.row_length**2 - rows.double().square().sum(dim=-1)
            for channel in range(spare):
                root = missing.clamp(min=0.0).sqrt()
                if channel + 1 < spare:
                    root = root * (1.0 - eps)  # rounded down: the next channel gets the rest
                column = rows[:, self.old.hidden_size + channel]
                column.copy_(root)
                missing = missing - column.double().square()
        return weight


def _widened(tensor: Tensor, axis: int, size: int) -> Tensor:
    """Append zeros along an axis."""
    shape = list(tensor.shape)
    shape[axis] = size
    wide = tensor.new_zeros(shape)
    wide.narrow(axis, 0, tensor.shape[axis]).copy_(tensor)
    return wide


def _scaled(tensor: Tensor, scale: float) -> Tensor:
    if tensor.is_meta:
        return tensor
    return (tensor.double() * scale).to(tensor.dtype)


class PaddedTable:
    """A table in the layout baichuan_m1 with every tensor padded.

    Args:
        table: In that layout, with an lm_head.
        padding: What to pad.
        architecture: The model before padding.
    """

    def __init__(self, table: TensorTable, padding: Padding, architecture: Architecture):
        self._table = table
        wide = padding.widened(architecture)
        self._channels = _Channels(
            padding, architecture.num_attention_heads, wide.hidden_size, wide.ffn_hidden_size
        )

    def __len__(self) -> int:
        return len(self._table)

    def planned(self, i: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """See TensorTable.planned."""
        planned = []
        for name, shape, dtype in self._table.planned(i):
            # Padding lm_head needs its values; the embedding has the same shape and does not.
            like = "model.embed_tokens.weight" if name == "lm_head.weight" else name
            with torch.device("cpu"):
                wide = self._channels.widen(like, torch.empty(shape, dtype=dtype, device="meta"))
            planned.append((name, tuple(wide.shape), dtype))
        return planned

    def read(self, i: int) -> tuple[Tensor, ...]:
        """See TensorTable.read."""
        names = [name for name, _, _ in self._table.planned(i)]
        tensors = self._table.read(i)
        return tuple(self._channels.widen(name, tensor) for name, tensor in zip(names, tensors))


class UnpaddedFolder:
    """A folder that `PaddedTable` wrote, with the padding removed.

    Args:
        folder: The tensors as stored.
        fields: Content of config.json.
        file: Path of config.json, for messages.

    Raises:
        ValueError: The record of the padding does not fit the rest of config.json.
    """

    def __init__(self, folder: SafetensorsFolder, fields: dict, file: Path):
        self.path, self._folder = folder.path, folder
        try:
            padding = Padding(**fields[FIELD])
            heads, hidden = fields["num_attention_heads"], fields["hidden_size"]
            ffn = fields["intermediate_size"]
            smallest = padding.hidden_size + 1, padding.head_dim * heads
            fits = hidden % (2 * heads) == 0 and hidden >= max(smallest)
            fits = fits and ffn >= (padding.intermediate_size or ffn)
            self._channels = _Channels(padding, heads, hidden, ffn)
        except (TypeError, KeyError, ZeroDivisionError) as error:
            raise ValueError(f"{file}: {FIELD} is damaged: {error}") from error
        if not fits:
            raise ValueError(
                f"{file}: {FIELD}={fields[FIELD]} does not fit hidden_size={hidden} and "
                f"intermediate_size={ffn}: they are not of the same model"
            )
        before = {k: v for k, v in asdict(padding).items() if v is not None and k != "row_length"}
        self.fields = {**fields, **before}

    def names(self) -> set[str]:
        """See SafetensorsFolder.names."""
        return self._folder.names()

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without its padding."""
        stored = self._folder.shape(name)
        try:
            return self._channels.shape(name, stored)
        except (RuntimeError, IndexError) as error:
            raise ValueError(
                f"{self.path}: {name} has the shape {list(stored)}, which is not padded as {FIELD} "
                "in config.json says"
            ) from error

    def dtype(self, name: str) -> torch.dtype:
        """See SafetensorsFolder.dtype."""
        return self._folder.dtype(name)

    def read(self, name: str) -> Tensor:
        """Read a tensor without its padding."""
        return self._channels.narrow(name, self._folder.read(name)).contiguous()
