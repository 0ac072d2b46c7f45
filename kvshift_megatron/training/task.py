"""What a run trains on: Megatron's GPT datasets, or a `--task-module` with its own.

A task module may define, each optional:
    add_args(parser) -> parser
    train_valid_test_datasets_provider(train_val_test_num_samples, vp_stage=None) -> three datasets
    BATCH_KEYS: names of further float32 [seq_length] entries of a sample
    validation_metrics(logits, batch) -> {name: float32 [2], the sum and the count}
        logits: [b, s, vocab / TP], batch: tensors [b, s]; called on the last pipeline stage.
"""

import importlib
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


@dataclass
class Task:
    """The parts of a task module, with this package's defaults for those it lacks."""

    add_args: Callable
    datasets_provider: Callable
    batch_keys: tuple[str, ...] = ()
    validation_metrics: Callable | None = None


def load_task(module_name: str | None) -> Task:
    """Import a task module; None gives Megatron's GPT datasets.

    Raises:
        ValueError: the module cannot be imported.
    """
    if module_name is None:
        return Task(add_args=lambda parser: parser, datasets_provider=gpt_datasets_provider)
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ValueError(
            f"task_module={module_name!r} cannot be imported ({error}): give a module's dotted "
            "name, importable from the working directory"
        ) from error
    return Task(
        add_args=getattr(module, "add_args", lambda parser: parser),
        datasets_provider=getattr(
            module, "train_valid_test_datasets_provider", gpt_datasets_provider
        ),
        batch_keys=tuple(getattr(module, "BATCH_KEYS", ())),
        validation_metrics=getattr(module, "validation_metrics", None),
    )


def gpt_datasets_provider(train_val_test_num_samples: list[int], vp_stage: int | None = None):
    """Megatron's GPTDataset for train, validation and test.

    MockGPTDataset with `--mock-data`, SFTDataset with `--sft`.
    """
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, MockGPTDataset
    from megatron.training import get_args

    args = get_args()
    if args.sft:
        from megatron.training.datasets.sft_dataset import SFTDataset as dataset
    else:
        dataset = MockGPTDataset if args.mock_data else GPTDataset
    return BlendedMegatronDatasetBuilder(
        dataset,
        train_val_test_num_samples,
        lambda: is_dataset_built_on_rank(vp_stage),
        gpt_dataset_config(args),
    ).build()


def is_dataset_built_on_rank(vp_stage: int | None = None) -> bool:
    """Whether this rank reads samples.

    Tensor-parallel rank 0 of the first and last pipeline stages and of those with multi-token
    prediction does; of every stage where documents are packed, as each stage's attention needs to
    know where they end.
    """
    from megatron.core import mpu
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    is_packed = args.sft or args.dataloader_inter_document_masking
    return mpu.get_tensor_model_parallel_rank() == 0 and (
        is_packed or needs_tokens(core_transformer_config_from_args(args), vp_stage)
    )


def needs_tokens(config: "TransformerConfig", vp_stage: int | None = None) -> bool:
    """Whether this pipeline stage takes tokens or labels: an end, or multi-token prediction."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(config, vp_stage)


def has_mtp(config: "TransformerConfig", vp_stage: int | None = None) -> bool:
    """Whether this pipeline stage holds layers of multi-token prediction."""
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank

    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """The pipeline ranks that hold the embedding: the first, those with tied output weights or MTP.

    Args:
        pp_ranks: global ranks of one pipeline, first stage first.
    """
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
    return sorted(ranks)


def gpt_dataset_config(args: Namespace, **overrides: Any):
    """Megatron's GPTDatasetConfig from Megatron's arguments."""
    import json

    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    fields = {
        "random_seed": args.seed,
        "sequence_length": args.seq_length,
        "blend": blend,
        "blend_per_split": blend_per_split,
        "split": args.split,
        "multiple_validation_sets": args.multiple_validation_sets,
        "full_validation": args.full_validation,
        "num_dataset_builder_threads": args.num_dataset_builder_threads,
        "path_to_cache": args.data_cache_path,
        "mmap_bin_files": args.mmap_bin_files,
        "tokenizer": build_tokenizer(args),
        "reset_position_ids": args.reset_position_ids,
        "reset_attention_mask": args.reset_attention_mask,
        "eod_mask_loss": args.eod_mask_loss,
        "create_attention_mask": args.create_attention_mask_in_dataloader,
        "object_storage_cache_path": args.object_storage_cache_path,
        "mid_level_dataset_surplus": args.mid_level_dataset_surplus,
        "allow_ambiguous_pad_tokens": args.allow_ambiguous_pad_tokens,
        "fast_cache_load": args.dataloader_fast_cache_load,
        "sequences_per_dataset": sequences_per_dataset,
        "defer_npy_index_mmap": args.dataloader_defer_npy_index_mmap,
        "context_parallel_size": args.context_parallel_size,
        "data_parallel_size": args.data_parallel_size,
        "inter_document_masking": args.dataloader_inter_document_masking,
        "sequence_parallel_size": args.tensor_model_parallel_size * args.sequence_parallel,
    }
    return GPTDatasetConfig(**{**fields, **overrides})
