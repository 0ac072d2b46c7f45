"""A Hugging Face folder to Megatron's torch_dist."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.baichuan import export
from kvshift_megatron.convert.baichuan.norm_head_padding import FIELD, UnpaddedFolder
from kvshift_megatron.convert.formats.output import (
    WriteProgress,
    check_free_space,
    check_target,
    complete_or_absent,
)
from kvshift_megatron.convert.formats.safetensors_files import SafetensorsFolder, read_json
from kvshift_megatron.convert.formats.tokenizer_files import (
    SUBFOLDER,
    carry_token_ids,
    carry_tokenizer,
)
from kvshift_megatron.convert.formats.torch_dist import split_layer
from kvshift_megatron.convert.formats.torch_dist_writer import Piece, write_torch_dist
from kvshift_megatron.convert.hf_config import architecture_from_config, layout_of
from kvshift_megatron.convert.layouts import LAYOUTS_WITH_TAPS
from kvshift_megatron.convert.megatron_arguments import arguments_from_architecture
from kvshift_megatron.convert.name_map import Row, expand
from kvshift_megatron.taps import initial_values, resolve_seed, tap_in_key

# Older Transformers saved these beside the weights; they follow from the configuration.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class ToMegatron:
    """What to convert and how.

    Args:
        source: a Hugging Face folder with config.json and safetensors.
        target: the folder to make, for Megatron's --load.
        dtype: of everything written; None keeps each tensor's.
        kv_shift: taps to give a model without any; None converts it as vanilla. Ignored for a
            model that has taps.
        divisible_by: the embedding's rows are padded to a multiple of it
            (--make-vocab-size-divisible-by times the tensor-parallel size).
        overwrite: replace an existing target.
        progress: print lines about it on standard error.
    """

    source: Path
    target: Path
    dtype: torch.dtype | None = None
    kv_shift: KVShiftConfig | None = KVShiftConfig(init="identity")
    divisible_by: int = 128
    overwrite: bool = False
    progress: bool = False


def hf_to_megatron(job: ToMegatron, verify: Callable[[Path], None] | None = None) -> Architecture:
    """Convert, one row of the name map in memory at a time.

    Args:
        verify: called with the complete folder before it gets its name; what it raises leaves no
            target.

    Returns:
        What was converted.

    Raises:
        ValueError: the source is damaged or cannot be expressed in Megatron; nothing is written.
        OSError: as the file system has it; nothing is left at the target.
    """
    check_target(job.target, job.source, job.overwrite)
    table = HFTable.open(job.source, job.kv_shift, job.divisible_by)
    written = table.architecture
    if job.dtype is not None:
        written = replace(written, dtype=job.dtype)
    arguments = arguments_from_architecture(written, job.divisible_by)
    pieces = table.pieces(job.dtype)
    total = sum(math.prod(piece.shape) * piece.dtype.itemsize for piece in pieces)
    check_free_space(job.target, total)
    progress = WriteProgress(total, job.progress)
    with complete_or_absent(job.target) as folder:
        counted = [replace(piece, read=_counting(piece, progress)) for piece in pieces]
        write_torch_dist(folder, counted, extra_states(written), arguments)
        carry_tokenizer(job.source, folder / SUBFOLDER)
        carry_token_ids(read_json(job.source / "config.json"), folder / SUBFOLDER)
        if verify is not None:
            verify(folder)
    return written


def _counting(piece: Piece, progress: WriteProgress) -> Callable[[], Tensor]:
    def read() -> Tensor:
        tensor = piece.read()
        progress.add(tensor.nbytes)
        return tensor

    return read


class HFTable:
    """The rows of the name map for one Hugging Face folder.

    Raises:
        ValueError: a tensor is missing, has another shape than config.json says, or is unknown.
    """

    def __init__(self, folder: SafetensorsFolder, layout: str, architecture: Architecture):
        self.folder, self.layout, self.architecture = folder, layout, architecture
        self.rows: list[Row] = list(expand(layout, architecture))
        self._normalizes_head = layout == "baichuan_m1" and isinstance(folder, SafetensorsFolder)
        self._new_taps = None
        if architecture.kv_shift is not None and layout not in LAYOUTS_WITH_TAPS:
            self._new_taps = architecture.kv_shift
        self._check()

    @classmethod
    def open(cls, source: Path, kv_shift: KVShiftConfig | None, divisible_by: int) -> "HFTable":
        """Read config.json and the headers of the safetensors files."""
        file = source / "config.json"
        if not source.is_dir():
            raise ValueError(f"{source}: there is no such folder")
        fields = read_json(file)
        layout = layout_of(fields, file)
        folder = SafetensorsFolder(source)
        if layout == "baichuan_m1" and FIELD in fields:
            folder = UnpaddedFolder(folder, fields, file)
            fields = folder.fields
        architecture = architecture_from_config(fields, file, _dtype(folder))
        vocab = architecture.vocab_size
        architecture = replace(
            architecture,
            padded_vocab_size=-(-vocab // divisible_by) * divisible_by,
            kv_shift=architecture.kv_shift or kv_shift,
        )
        return cls(folder, layout, architecture)

    def _check(self) -> None:
        path, wanted = self.folder.path, {}
        for row in self.rows:
            if self._is_new(row):
                continue
            with torch.device("meta"):
                empty = tuple(torch.empty(name.shape(self.architecture)) for name in row.megatron)
                made = row.transform.to_hf(empty, self.architecture)
            wanted.update(zip(row.hf, (tuple(one.shape) for one in made), strict=True))
        names = {name for name in self.folder.names() if not name.endswith(_DERIVED)}
        if missing := sorted(wanted.keys() - names):
            raise ValueError(
                f"{path} lacks {missing[0]} and {len(missing) - 1} more tensors that its "
                "config.json calls for"
            )
        for name, shape in wanted.items():
            if self.folder.shape(name) != shape:
                raise ValueError(
                    f"{path}: {name} has the shape {list(self.folder.shape(name))}, but config.json"
                    f" means {list(shape)}"
                )
        extra = names - wanted.keys()
        if self.architecture.tied and "lm_head.weight" in extra:
            self._check_tied()
            extra.remove("lm_head.weight")
        if extra:
            raise ValueError(
                f"{path} holds {min(extra)} and {len(extra) - 1} more tensors that its config.json "
                "does not call for: it is of another architecture"
            )

    def _check_tied(self) -> None:
        embedding, head = (
            self.folder.read(name) for name in ("model.embed_tokens.weight", "lm_head.weight")
        )
        if not torch.equal(embedding, head):
            raise ValueError(
                f"{self.folder.path}: config.json says tie_word_embeddings, but lm_head.weight is "
                "not the embedding: set it to false there if the two are meant to differ"
            )

    def _is_new(self, row: Row) -> bool:
        return self._new_taps is not None and tap_in_key(row.megatron[0].te) is not None

    def read(self, i: int) -> tuple[Tensor, ...]:
        """Megatron's tensors of row i."""
        row = self.rows[i]
        if self._is_new(row):
            return self._initial_taps(row)
        tensors = tuple(self.folder.read(name) for name in row.hf)
        if self._normalizes_head and row.hf == ("lm_head.weight",):
            tensors = (export.normalized(*tensors),)
        return row.transform.to_megatron(tensors, self.architecture)

    def _initial_taps(self, row: Row) -> tuple[Tensor, ...]:
        one = self.architecture
        names = [name.te for name in row.megatron]
        layer = int(names[0].split(".")[2])
        values = initial_values(
            self._new_taps, resolve_seed(self._new_taps), layer + 1, one.num_query_groups
        )
        return tuple(values[name.rpartition(".")[2]].to(one.dtype) for name in names)

    def _dtype_of(self, row: Row) -> torch.dtype:
        return self.architecture.dtype if self._is_new(row) else self.folder.dtype(row.hf[0])

    def pieces(self, dtype: torch.dtype | None) -> list[Piece]:
        """Everything to write, layers stacked as Megatron does, in the order of the table."""
        pieces = []
        for i, row in enumerate(self.rows):
            for j, name in enumerate(row.megatron):

                def read(i=i, j=j, dtype=dtype or self._dtype_of(row)) -> Tensor:
                    return self.read(i)[j].to(dtype)

                for key in name.written:
                    layer, stacked = split_layer(key)
                    pieces.append(
                        Piece(
                            stacked,
                            name.shape(self.architecture),
                            dtype or self._dtype_of(row),
                            read,
                            layer,
                            None if layer is None else self.architecture.num_layers,
                        )
                    )
        return pieces


def _dtype(folder) -> torch.dtype:
    """The dtype that most of the folder's tensors have."""
    dtypes = [folder.dtype(name) for name in folder.names()]
    return max(set(dtypes), key=lambda dtype: (dtypes.count(dtype), str(dtype)))


def extra_states(architecture: Architecture) -> list[str]:
    """Keys under which layers ask a checkpoint for a state beside their weights.

    Transformer Engine keeps FP8 scales there, and the TE-free linear layers nothing; either fails
    to load without. One that a layer does not ask for is passed over.
    """
    one = architecture
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    modules.append("self_attention.core_attention")
    if one.qk_layernorm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    linears = ("linear_fc1", "linear_fc2")
    if one.num_experts:
        modules.append("pre_mlp_layernorm")
    else:
        modules += [f"mlp.{linear}" for linear in linears]
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{one.num_layers}"
        for layer in range(one.num_layers)
        for module in modules
    ]
    keys += [
        f"decoder.layers.mlp.experts.experts.{linear}._extra_state/"
        f"shard_{layer}.{expert}_{one.num_layers}.{one.num_experts}"
        for layer in range(one.num_layers)
        for expert in range(one.num_experts)
        for linear in linears
    ]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]
