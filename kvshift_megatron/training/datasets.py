"""Megatron's GPT datasets, built from Megatron's arguments on the ranks that read samples."""

from argparse import Namespace
from typing import TYPE_CHECKING, Any

from kvshift_megatron.training.stages import needs_tokens

if TYPE_CHECKING:
    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig


def gpt_datasets_provider(
    train_val_test_num_samples: list[int], vp_stage: int | None = None
) -> list[Any]:
    """Build Megatron's datasets for training, validation and test.

    They are GPTDataset, MockGPTDataset with `--mock-data`, or SFTDataset with `--sft`.

    Returns:
        Three datasets; None for those that this rank does not read.
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
    """Return whether this rank reads samples.

    Tensor-parallel rank 0 does, on the first and last pipeline stages and those with multi-token
    prediction; with packed documents on every stage, as attention needs the documents' bounds.
    """
    from megatron.core import mpu
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    is_packed = args.sft or args.dataloader_inter_document_masking
    return mpu.get_tensor_model_parallel_rank() == 0 and (
        is_packed or needs_tokens(core_transformer_config_from_args(args), vp_stage)
    )


def gpt_dataset_config(args: Namespace, **overrides: Any) -> "GPTDatasetConfig":
    """Return Megatron's GPTDatasetConfig, and note the tokenizer's size in Megatron's arguments."""
    import json

    from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
    from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
    from megatron.training.utils import get_blend_and_blend_per_split

    blend, blend_per_split = get_blend_and_blend_per_split(args)
    sequences_per_dataset = None
    if args.per_dataset_sequences_path is not None:
        with open(args.per_dataset_sequences_path) as file:
            sequences_per_dataset = json.load(file)
    tokenizer = build_tokenizer(args)
    # A checkpoint keeps the arguments: a conversion has to tell tokens from padding.
    args.tokenizer_vocab_size = tokenizer.vocab_size
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
        "tokenizer": tokenizer,
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
