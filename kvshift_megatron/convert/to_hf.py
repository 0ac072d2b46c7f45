"""Convert Megatron's torch_dist to a Hugging Face folder."""

import json
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from kvshift_megatron.config import Variant
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.baichuan import export
from kvshift_megatron.convert.casts import Casts
from kvshift_megatron.convert.config_fields import check_arguments
from kvshift_megatron.convert.formats.output import (
    WriteProgress,
    check_free_space,
    check_target,
    complete_or_absent,
)
from kvshift_megatron.convert.formats.safetensors_files import Planned, write_safetensors
from kvshift_megatron.convert.formats.tokenizer_files import (
    SUBFOLDER,
    carry_tokenizer,
    has_tokenizer,
    keep_token_ids,
    keep_trained_settings,
)
from kvshift_megatron.convert.formats.torch_dist import Location, TorchDistReader, find_checkpoint
from kvshift_megatron.convert.hybrid_arguments import hybrid_layers, take_form
from kvshift_megatron.convert.library_defaults import TOKEN_IDS, carried_fields
from kvshift_megatron.convert.megatron_arguments import (
    COMPARED,
    architecture_from_arguments,
    hf_fields_from_arguments,
    kv_shift_from_arguments,
)
from kvshift_megatron.convert.name_map import Row, expand
from kvshift_megatron.convert.tensor_table import TensorTable
from kvshift_megatron.convert.to_hf_config import config_from_architecture
from kvshift_megatron.convert.vocabulary import number_of_tokens, tokenizer_folder
from kvshift_megatron.taps import taps_among


@dataclass(frozen=True)
class ToHF:
    """What to convert and how.

    Args:
        source: Megatron's checkpoint: the folder of --save, or one iteration in it.
        target: The folder to create.
        layout: A layout of the name map; None takes the one that fits the model.
        dtype: Dtype of everything written; None keeps each tensor's.
        vocab_size: Number of tokens that exist; None takes it from the checkpoint's arguments.
        variant: Variant of the taps, for checkpoints whose arguments do not say it.
        max_shard_size: Bytes per file.
        tokenizer: Folder with tokenizer files; None takes those in the checkpoint, or those that
            the model was trained with.
        norm_head: "fold" or "pad", for baichuan_m1 (see baichuan/export.py).
        overwrite: Replace an existing target.
        progress: Report progress on standard error.
        verify_integrity: Compare the source's files with their hashes before anything is written.
    """

    source: Path
    target: Path
    layout: str | None = None
    dtype: torch.dtype | None = None
    vocab_size: int | None = None
    variant: Variant | None = None
    max_shard_size: int = 5_000_000_000
    tokenizer: Path | None = None
    norm_head: str = "fold"
    overwrite: bool = False
    progress: bool = False
    verify_integrity: bool = True


def megatron_to_hf(job: ToHF, verify: Callable[[Path], None] | None = None) -> Architecture:
    """Convert a checkpoint, with one row of the name map in memory at a time.

    Args:
        job: What to convert.
        verify: Called with the complete folder before it gets its name; if it raises, there will be
            no target.

    Returns:
        The model that was converted.

    Raises:
        ValueError: The source cannot be converted, or not to that layout; nothing is written.
        OSError: The file system reports an error; nothing is left at the target.
    """
    check_target(job.target, _inputs(job), job.overwrite)
    reader = TorchDistReader(job.source)
    tokenizer = tokenizer_folder(reader.arguments(), reader.path, job.tokenizer)
    check_target(job.target, [tokenizer], job.overwrite)  # it may be what the arguments name
    architecture = read_architecture(reader, job.vocab_size, job.variant, job.tokenizer)
    layout = job.layout or fitting_layout(architecture)
    written = architecture if job.dtype is None else replace(architecture, dtype=job.dtype)
    if job.tokenizer and not has_tokenizer(job.tokenizer):
        raise ValueError(f"--tokenizer {job.tokenizer} holds no tokenizer file")
    if layout == "baichuan_m1":
        config = export.config_for_clients(written, job.norm_head)
    else:
        config = config_from_architecture(layout, written)
    config.update(carried_fields(hf_fields_from_arguments(reader.arguments(), reader.path), layout))
    if layout == "kvshift":
        # This imports Transformers: if it is missing, fail before the work and not after it.
        from kvshift_megatron.hf import AUTO_MAP, KVShiftLlamaConfig, write_code

        KVShiftLlamaConfig(**config)  # refuses what could not be loaded
    stored = MegatronTable(reader, layout, architecture, job.dtype)
    table: TensorTable = stored
    if layout == "baichuan_m1":
        table, further = export.for_clients(stored, written, job.norm_head)
        config.update(further)
    groups = [[Planned(*one) for one in table.planned(i)] for i in range(len(table))]
    total = sum(planned.nbytes for group in groups for planned in group)
    check_free_space(job.target, total)
    if job.verify_integrity:
        reader.compare_hashes()
    progress = WriteProgress(total, job.progress)

    def read(i: int) -> tuple[Tensor, ...]:
        tensors = table.read(i)
        progress.add(sum(tensor.nbytes for tensor in tensors))
        return tensors

    with complete_or_absent(job.target) as folder:
        write_safetensors(folder, groups, read, job.max_shard_size)
        stored.casts.say()
        carry_tokenizer(tokenizer, folder)
        keep_trained_settings(folder, reader.arguments())
        ids = keep_token_ids(folder, written.vocab_size, {}, {})
        config.update({name: ids.get(name) for name in TOKEN_IDS})
        if layout == "kvshift":
            config["auto_map"] = dict(AUTO_MAP)
            write_code(folder)
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        if verify is not None:
            verify(folder)
    return architecture


def _inputs(job: ToHF) -> list[Path]:
    # The tokenizer is beside the folder of an iteration, which may be all that the user gave.
    read = [job.source, find_checkpoint(job.source).parent / SUBFOLDER]
    return read if job.tokenizer is None else [*read, job.tokenizer]


def read_architecture(
    reader: TorchDistReader,
    vocab_size: int | None = None,
    variant: Variant | None = None,
    tokenizer: Path | None = None,
) -> Architecture:
    """Return the architecture of the model in a Megatron checkpoint.

    Args:
        reader: The checkpoint.
        vocab_size, variant, tokenizer: The user's, or None (see ToHF).

    Raises:
        ValueError: It is not a GPT model, or its arguments and tensors contradict each other.
    """
    arguments = reader.arguments()
    check_arguments(arguments, reader.path, COMPARED)
    if reader.form == "hybrid":
        layers = hybrid_layers(arguments, reader.weights(), reader.path)
        take_form(arguments, "gpt", *layers)
    embedding = reader.locate("embedding.word_embeddings.weight")
    projection = reader.locate("decoder.layers.0.self_attention.linear_proj.weight")
    if embedding is None or projection is None:
        missing = "embedding.word_embeddings.weight" if embedding is None else "attention layers"
        raise ValueError(f"{reader.path} holds no {missing}: it is not a checkpoint of a GPT model")
    taps = taps_among(reader.weights())
    kv_shift = kv_shift_from_arguments(arguments, taps, variant, reader.path)
    padded = embedding.shape[0]
    folder = tokenizer_folder(arguments, reader.path, tokenizer)
    tokens = number_of_tokens(arguments, vocab_size, padded, reader.path, folder)
    architecture = architecture_from_arguments(
        arguments, kv_shift, reader.dtype(projection), tokens, padded, reader.path
    )
    if architecture.num_layers != reader.num_layers():
        raise ValueError(
            f"{reader.path} holds {reader.num_layers()} layers, but its arguments say num_layers="
            f"{architecture.num_layers}: they are not of the same model"
        )
    return architecture


def fitting_layout(architecture: Architecture) -> str:
    """Return the layout that a model is written in by default."""
    if architecture.kv_shift is not None:
        return "kvshift"
    if architecture.num_experts:
        return "mixtral"
    if architecture.qk_layernorm:
        return "qwen3"
    return "qwen2" if architecture.add_qkv_bias else "llama"


class MegatronTable:
    """The rows of the name map for one Megatron checkpoint; a TensorTable.

    Args:
        reader: The checkpoint.
        layout: A layout of the name map.
        architecture: The model in the checkpoint.
        dtype: Dtype of all tensors; None keeps each one's.

    Raises:
        ValueError: A tensor is missing, its shape is not that of the arguments, or it has no place
            in the layout.
    """

    def __init__(
        self,
        reader: TorchDistReader,
        layout: str,
        architecture: Architecture,
        dtype: torch.dtype | None = None,
    ):
        self.reader, self.architecture, self._dtype = reader, architecture, dtype
        self.casts = Casts()  # what did not fit in the dtype, of all that was read
        self.rows: list[Row] = list(expand(layout, architecture))
        self._locations: list[tuple[Location, ...]] = [self._locate(row) for row in self.rows]
        aliases = {key for row in self.rows for name in row.megatron for key in name.stored}
        used = {key for name in aliases if (at := reader.locate(name)) for key in at.keys}
        if left := sorted(reader.weights() - used):
            raise ValueError(
                f"{reader.path} holds {left[0]} and {len(left) - 1} more tensors that have no place"
                f" in the layout {layout}: its architecture is not the one that its arguments say"
            )

    def _locate(self, row: Row) -> tuple[Location, ...]:
        found = []
        for name in row.megatron:
            places = (self.reader.locate(stored) for stored in name.stored)
            place = next((place for place in places if place), None)
            if place is None:
                raise ValueError(
                    f"{self.reader.path}: the checkpoint lacks {' or '.join(name.stored)}"
                )
            expected = name.shape(self.architecture)
            if place.shape != expected:
                raise ValueError(
                    f"{self.reader.path}: {name.stored[0]} has the shape {list(place.shape)}, but "
                    f"the checkpoint's arguments call for {list(expected)}"
                )
            found.append(place)
        return tuple(found)

    def __len__(self) -> int:
        return len(self.rows)

    def planned(self, i: int) -> list[tuple[str, tuple[int, ...], torch.dtype]]:
        """See TensorTable.planned."""
        row, places = self.rows[i], self._locations[i]
        with torch.device("meta"):
            empty = tuple(torch.empty(at.shape, dtype=self._dtype_of(at)) for at in places)
            tensors = row.transform.to_hf(empty, self.architecture)
        return [
            (name, tuple(tensor.shape), tensor.dtype)
            for name, tensor in zip(row.hf, tensors, strict=True)
        ]

    def megatron(self, i: int) -> tuple[Tensor, ...]:
        """Read Megatron's tensors of row i."""
        return tuple(
            self.casts.cast(name.stored[0], self.reader.read(place), self._dtype_of(place))
            for name, place in zip(self.rows[i].megatron, self._locations[i])
        )

    def _dtype_of(self, place: Location) -> torch.dtype:
        return self._dtype or self.reader.dtype(place)

    def read(self, i: int) -> tuple[Tensor, ...]:
        """See TensorTable.read."""
        return self.rows[i].transform.to_hf(self.megatron(i), self.architecture)
