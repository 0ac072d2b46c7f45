"""Convert a Hugging Face folder to Megatron's torch_dist."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvshift_megatron.checks.model_forms import Form, hybrid_key
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.baichuan import export
from kvshift_megatron.convert.baichuan.norm_head_padding import FIELD, UnpaddedFolder
from kvshift_megatron.convert.casts import Casts
from kvshift_megatron.convert.extra_states import extra_states
from kvshift_megatron.convert.formats.output import (
    WriteProgress,
    check_free_space,
    check_target,
    complete_or_absent,
)
from kvshift_megatron.convert.formats.safetensors_files import SafetensorsFolder, read_json
from kvshift_megatron.convert.formats.tokenizer_files import (
    SUBFOLDER,
    carry_tokenizer,
    keep_token_ids,
)
from kvshift_megatron.convert.formats.torch_dist import split_layer
from kvshift_megatron.convert.formats.torch_dist_writer import Piece, write_torch_dist
from kvshift_megatron.convert.from_hf_config import architecture_from_config, layout_of
from kvshift_megatron.convert.hybrid_arguments import take_form
from kvshift_megatron.convert.layouts import LAYOUTS_WITH_TAPS
from kvshift_megatron.convert.library_defaults import (
    carried_fields,
    default_token_ids,
    stated_token_ids,
)
from kvshift_megatron.convert.megatron_arguments import arguments_from_architecture
from kvshift_megatron.convert.name_map import Row, expand
from kvshift_megatron.taps import initial_values, resolve_seed, tap_in_key

_Folder = SafetensorsFolder | UnpaddedFolder

# Older Transformers saved these with the weights; they follow from the configuration.
_DERIVED = ".rotary_emb.inv_freq"


@dataclass(frozen=True)
class ToMegatron:
    """What to convert and how.

    Args:
        source: A Hugging Face folder with config.json and safetensors.
        target: The folder to create, for Megatron's --load.
        dtype: Dtype of everything written; None keeps each tensor's.
        kv_shift: Taps to add to a model without taps; None adds none. Ignored for a model that has
            taps.
        divisible_by: The embedding's rows are padded to a multiple of it
            (--make-vocab-size-divisible-by times the tensor-parallel size).
        form: Of the model: Megatron's GPT model, or its hybrid model with the same layers.
        overwrite: Replace an existing target.
        progress: Report progress on standard error.
    """

    source: Path
    target: Path
    dtype: torch.dtype | None = None
    kv_shift: KVShiftConfig | None = KVShiftConfig(init="identity")
    divisible_by: int = 128
    form: Form = "gpt"
    overwrite: bool = False
    progress: bool = False


def hf_to_megatron(job: ToMegatron, verify: Callable[[Path], None] | None = None) -> Architecture:
    """Convert a folder, with one row of the name map in memory at a time.

    Args:
        job: What to convert.
        verify: Called with the complete folder before it gets its name; if it raises, there will be
            no target.

    Returns:
        The model that was written.

    Raises:
        ValueError: The source is damaged or cannot be expressed in Megatron; nothing is written.
        OSError: The file system reports an error; nothing is left at the target.
    """
    check_target(job.target, [job.source], job.overwrite)
    table = HFTable.open(job.source, job.kv_shift, job.divisible_by)
    written = table.architecture
    if job.dtype is not None:
        written = replace(written, dtype=job.dtype)
    fields = table.fields
    carried = carried_fields(fields, table.layout)
    arguments = arguments_from_architecture(written, job.divisible_by, carried)
    if job.form == "hybrid" and written.rope_scaling is not None:
        raise ValueError(
            f"{job.source}: it scales its rotary frequencies ({written.rope_scaling}), which "
            "Megatron's hybrid models do not: set --model-form gpt"
        )
    take_form(arguments, job.form, written.num_layers, bool(written.num_experts))
    casts = Casts()
    pieces = table.pieces(job.dtype, casts, job.form)
    total = sum(math.prod(piece.shape) * piece.dtype.itemsize for piece in pieces)
    check_free_space(job.target, total)
    progress = WriteProgress(total, job.progress)
    with complete_or_absent(job.target) as folder:
        counted = [replace(piece, read=_counting(piece, progress)) for piece in pieces]
        write_torch_dist(folder, counted, extra_states(written, job.form), arguments)
        casts.say()
        carry_tokenizer(job.source, folder / SUBFOLDER)
        keep_token_ids(
            folder / SUBFOLDER,
            written.vocab_size,
            stated_token_ids(fields),
            default_token_ids(fields, table.layout),
        )
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

    Args:
        folder: The tensors.
        layout: The folder's layout.
        architecture: The model to write, with its vocabulary padded.
        fields: Content of config.json.

    Raises:
        ValueError: A tensor is missing or unknown, or its shape is not that of config.json.
    """

    def __init__(self, folder: _Folder, layout: str, architecture: Architecture, fields: dict):
        self.folder, self.layout, self.architecture = folder, layout, architecture
        self.fields = fields
        self._check_number()
        self.rows: list[Row] = list(expand(layout, architecture))
        # Padded heads are normalized already.
        self._normalizes_head = layout == "baichuan_m1" and isinstance(folder, SafetensorsFolder)
        # Taps to create for a model that has none.
        self._new_taps: KVShiftConfig | None = None
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
        stored = SafetensorsFolder(source)
        folder: _Folder = stored
        if layout == "baichuan_m1" and FIELD in fields:
            folder = UnpaddedFolder(stored, fields, file)
            fields = folder.fields
        if not folder.names():
            raise ValueError(f"{source} holds no tensors: copy it again")
        architecture = architecture_from_config(fields, file, _dtype(folder))
        vocab = architecture.vocab_size
        architecture = replace(
            architecture,
            padded_vocab_size=-(-vocab // divisible_by) * divisible_by,
            kv_shift=architecture.kv_shift or kv_shift,
        )
        return cls(folder, layout, architecture, fields)

    def _check_number(self) -> None:
        """Refuse more layers and experts than there can be, before a table of them is made."""
        arch, stored = self.architecture, len(self.folder.names())
        least = arch.num_layers * (arch.num_experts if self.layout == "mixtral" else 1)
        if stored < least:
            experts = f" with num_local_experts={arch.num_experts}" if arch.num_experts else ""
            raise ValueError(
                f"{self.folder.path}: config.json says num_hidden_layers={arch.num_layers}{experts}"
                f", but there are only {stored} tensors: the two are not of the same model"
            )

    def _check(self) -> None:
        path = self.folder.path
        expected: dict[str, tuple[int, ...]] = {}
        for row in self.rows:
            if self._is_new(row):
                continue
            with torch.device("meta"):
                empty = tuple(torch.empty(name.shape(self.architecture)) for name in row.megatron)
                tensors = row.transform.to_hf(empty, self.architecture)
            expected.update(zip(row.hf, (tuple(tensor.shape) for tensor in tensors), strict=True))
        names = {name for name in self.folder.names() if not name.endswith(_DERIVED)}
        if missing := sorted(expected.keys() - names):
            raise ValueError(
                f"{path} lacks {missing[0]} and {len(missing) - 1} more tensors that its "
                "config.json calls for"
            )
        for name, shape in expected.items():
            if self.folder.shape(name) != shape:
                raise ValueError(
                    f"{path}: {name} has the shape {list(self.folder.shape(name))}, but config.json"
                    f" calls for {list(shape)}"
                )
        extra = names - expected.keys()
        if self.architecture.tied and "lm_head.weight" in extra:
            self._check_tied()
            extra.remove("lm_head.weight")
        if extra:
            raise ValueError(
                f"{path} holds {min(extra)} and {len(extra) - 1} more tensors that its config.json "
                "does not call for: the two are not of the same architecture"
            )

    def _check_tied(self) -> None:
        embedding, head = (
            self.folder.read(name) for name in ("model.embed_tokens.weight", "lm_head.weight")
        )
        if not torch.equal(embedding, head):
            raise ValueError(
                f"{self.folder.path}: config.json sets tie_word_embeddings, but lm_head.weight is "
                "not the embedding: set it to false there if the two are meant to differ"
            )

    def _is_new(self, row: Row) -> bool:
        return self._new_taps is not None and tap_in_key(row.megatron[0].te) is not None

    def read(self, i: int) -> tuple[Tensor, ...]:
        """Return Megatron's tensors of row i."""
        row = self.rows[i]
        if self._new_taps is not None and self._is_new(row):
            return self._initial_taps(row, self._new_taps)
        tensors = tuple(self.folder.read(name) for name in row.hf)
        if self._normalizes_head and row.hf == ("lm_head.weight",):
            tensors = (export.normalized(*tensors),)
        return row.transform.to_megatron(tensors, self.architecture)

    def _initial_taps(self, row: Row, kv_shift: KVShiftConfig) -> tuple[Tensor, ...]:
        arch = self.architecture
        names = [name.te for name in row.megatron]
        layer = int(names[0].split(".")[2])
        values = initial_values(kv_shift, resolve_seed(kv_shift), layer + 1, arch.num_query_groups)
        return tuple(values[name.rpartition(".")[2]].to(arch.dtype) for name in names)

    def _dtype_of(self, row: Row) -> torch.dtype:
        return self.architecture.dtype if self._is_new(row) else self.folder.dtype(row.hf[0])

    def pieces(self, dtype: torch.dtype | None, casts: Casts, form: Form = "gpt") -> list[Piece]:
        """Return everything to write, in the table's order.

        Args:
            dtype: Of all pieces; None keeps each tensor's.
            casts: Counts what does not fit in the dtype, when the pieces are read.
            form: Of the model: a GPT model's layers are stacked as by Megatron.
        """
        pieces = []
        for i, row in enumerate(self.rows):
            written = dtype or self._dtype_of(row)
            for j, name in enumerate(row.megatron):

                def read(i: int = i, j: int = j, dtype: torch.dtype = written) -> Tensor:
                    return casts.cast(self.rows[i].megatron[j].te, self.read(i)[j], dtype)

                for key in name.written:
                    layer, stacked = split_layer(key) if form == "gpt" else (None, hybrid_key(key))
                    pieces.append(
                        Piece(
                            stacked,
                            name.shape(self.architecture),
                            written,
                            read,
                            layer,
                            None if layer is None else self.architecture.num_layers,
                        )
                    )
        return pieces


def _dtype(folder: _Folder) -> torch.dtype:
    """Return the most frequent dtype among the folder's tensors."""
    dtypes = [folder.dtype(name) for name in folder.names()]
    return max(set(dtypes), key=lambda dtype: (dtypes.count(dtype), str(dtype)))
