"""The induction task as `--task-module examples.induction.task` of kvshift_megatron.pretrain.

The entry point uses `add_args`, `train_valid_test_datasets_provider`, `validation_metrics` and
`BATCH_KEYS`. Sequence length, vocabulary, seed and batch are set by Megatron's own flags
(`--seq-length`, `--vocab-size`, `--seed`, `--micro-batch-size`).

Use `--tokenizer-type NullTokenizer --vocab-size N`: it has exactly N tokens and calls the last one
end-of-document, which this task uses like any other. Megatron pads N to a multiple of
`--make-vocab-size-divisible-by` times TP. The padded logits count in the loss and in the accuracy
below, as in Megatron's own loss, and training drives them down. Set that flag to 1 to have none.
"""

import argparse

import numpy as np
import torch
from megatron.core import parallel_state
from megatron.core.datasets.blended_megatron_dataset_builder import BlendedMegatronDatasetBuilder
from megatron.core.datasets.gpt_dataset import GPTDatasetConfig
from megatron.core.datasets.megatron_dataset import MegatronDataset
from megatron.core.datasets.utils import Split
from torch import Tensor

from examples.induction.data import NO_REPEAT, InductionSequences

BATCH_KEYS = ("induction_mask",)
"""Keys of a sample in addition to GPTDataset's, to be broadcast and sliced with the batch."""

METRIC = "induction accuracy"

_SPLIT_SEQUENCES = 2**40  # indices per split, so that train, valid and test never overlap


def add_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
    """Add the task's own flag to Megatron's parser."""
    group = parser.add_argument_group(title="induction task")
    group.add_argument(
        "--induction-seed",
        type=int,
        default=None,
        help="seed of the data (default: --seed, which also seeds the weights)",
    )
    return parser


class InductionDataset(MegatronDataset):
    """Megatron's mid-level dataset over the index range of one split.

    The low-level dataset is the tuple of the three splits' ranges, so that Megatron's split matrix
    gives one range to each.

    Args:
        dataset: Three `range` objects of sequence indices.
        dataset_path: Unused, None.
        indices: Which of the ranges this split owns, int [1].
        num_samples: Number of samples; sequences are made on demand and never repeat.
        index_split: Train, valid or test.
        config: `random_seed`, `sequence_length`, `tokenizer.vocab_size` and
            `create_attention_mask` are read.
    """

    def __init__(
        self,
        dataset: tuple[range, ...],
        dataset_path: str | None,
        indices: np.ndarray,
        num_samples: int | None,
        index_split: Split,
        config: GPTDatasetConfig,
    ) -> None:
        super().__init__(dataset, dataset_path, indices, num_samples, index_split, config)
        if num_samples is None:
            raise ValueError("--full-validation needs epochs, which this data lacks: drop the flag")
        (owned,) = indices
        self._range = dataset[owned]
        self._sequences = InductionSequences(
            config.random_seed, config.sequence_length, config.tokenizer.vocab_size
        )
        self._position_ids = torch.arange(config.sequence_length)
        self._loss_mask = torch.ones(config.sequence_length)
        self._attention_mask = None
        if config.create_attention_mask:
            shape = (1, config.sequence_length, config.sequence_length)
            self._attention_mask = torch.ones(shape, dtype=torch.bool).triu(1)

    @staticmethod
    def build_low_level_dataset(
        dataset_path: str | None, config: GPTDatasetConfig
    ) -> tuple[range, ...]:
        """Return the index ranges of train, valid and test."""
        starts = [split.value * _SPLIT_SEQUENCES for split in Split]
        return tuple(range(start, start + _SPLIT_SEQUENCES) for start in starts)

    @staticmethod
    def numel_low_level_dataset(low_level_dataset: tuple[range, ...]) -> int:
        """Return the number of index ranges."""
        return len(low_level_dataset)

    def __len__(self) -> int:
        return self.num_samples

    def __getitem__(self, idx: int) -> dict[str, Tensor]:
        """Return sample `idx` of this split.

        Returns:
            tokens, labels, position_ids: int64 [seq_length]; loss_mask: float32 [seq_length], all
            ones; induction_mask: float32 [seq_length], 1 at the first repeat, all zero without one;
            attention_mask: bool [1, seq_length, seq_length], True above the diagonal, missing with
            --no-create-attention-mask-in-dataloader.
        """
        sequence, repeat = self._sequences[self._range[idx]]
        tokens = torch.tensor(sequence)  # a copy, as `sequence` is a view of a block
        induction_mask = torch.zeros(len(tokens) - 1)
        if repeat != NO_REPEAT:
            induction_mask[repeat] = 1.0
        sample = {
            "tokens": tokens[:-1],
            "labels": tokens[1:],
            "loss_mask": self._loss_mask,
            "position_ids": self._position_ids,
            "induction_mask": induction_mask,
        }
        if self._attention_mask is not None:
            sample["attention_mask"] = self._attention_mask
        return sample


def _holds_data(vp_stage: int | None) -> bool:
    """Return whether this rank reads samples: first and last pipeline stage, tensor rank 0."""
    first = parallel_state.is_pipeline_first_stage(
        ignore_virtual=vp_stage is None, vp_stage=vp_stage
    )
    last = parallel_state.is_pipeline_last_stage(ignore_virtual=vp_stage is None, vp_stage=vp_stage)
    return (first or last) and parallel_state.get_tensor_model_parallel_rank() == 0


def train_valid_test_datasets_provider(
    train_val_test_num_samples: list[int | None], vp_stage: int | None = None
) -> list[InductionDataset | None]:
    """Build the three splits with Megatron's builder.

    Args:
        train_val_test_num_samples: How many samples Megatron wants of each split.
        vp_stage: Virtual pipeline stage, or None.

    Returns:
        [train, valid, test], each None on ranks that get their batch by broadcast.
    """
    # Imported here, as nothing else in this module needs megatron.training.
    from megatron.training import get_args, get_tokenizer

    args = get_args()
    config = GPTDatasetConfig(
        random_seed=args.seed if args.induction_seed is None else args.induction_seed,
        sequence_length=args.seq_length,
        tokenizer=get_tokenizer(),
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=False,
        create_attention_mask=args.create_attention_mask_in_dataloader,
    )
    return BlendedMegatronDatasetBuilder(
        InductionDataset, train_val_test_num_samples, lambda: _holds_data(vp_stage), config
    ).build()


train_valid_test_datasets_provider.is_distributed = True  # every rank calls it, as in pretrain_gpt


def vocab_parallel_argmax(
    logits: Tensor, tp_group: torch.distributed.ProcessGroup | None
) -> Tensor:
    """Return the index of the largest logit over a vocabulary split evenly across `tp_group`.

    Args:
        logits: float [n, vocab/TP], this rank's contiguous part, in rank order.
        tp_group: Tensor-parallel group; None for an unsplit vocabulary.

    Returns:
        int64 [n], the same on every rank. Of equal logits the lowest index wins.
    """
    part = logits.shape[-1]
    best, index = logits.float().max(dim=-1)
    if tp_group is None or tp_group.size() == 1:
        return index
    index = index + tp_group.rank() * part
    overall = best.clone()
    torch.distributed.all_reduce(overall, op=torch.distributed.ReduceOp.MAX, group=tp_group)
    # A rank that does not hold the maximum offers one past the last index.
    index = torch.where(best == overall, index, part * tp_group.size())
    torch.distributed.all_reduce(index, op=torch.distributed.ReduceOp.MIN, group=tp_group)
    return index


def validation_metrics(logits: Tensor, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Count how often the prediction at the first repeat is the recorded successor.

    Args:
        logits: [b, s, vocab/TP] of this tensor-parallel rank.
        batch: labels int64 [b, s] and induction_mask float32 [b, s], on the logits' device.

    Returns:
        {"induction accuracy": float32 [2]}, the numbers of correct and of all predictions over this
        rank's samples. The entry point sums both over micro-batches and data-parallel ranks.

    Parallelism: all ranks of the tensor-parallel group must call this together. They get the same.
    """
    scored = batch["induction_mask"] > 0  # the same on every tensor-parallel rank
    tp_group = None
    if parallel_state.model_parallel_is_initialized():
        tp_group = parallel_state.get_tensor_model_parallel_group()
    predicted = vocab_parallel_argmax(logits[scored], tp_group)
    correct = (predicted == batch["labels"][scored]).sum()
    return {METRIC: torch.stack((correct, scored.sum())).float()}
