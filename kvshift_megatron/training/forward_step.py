"""One forward step for Megatron's loop: the batch, the model, the loss and the metrics."""

from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from megatron.core import mpu
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.rerun_state_machine import get_rerun_state_machine
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import (
    flatten_batch_for_packed_sequences,
    get_attr_wrapped_model,
    get_batch_on_this_cp_rank,
    get_batch_on_this_tp_rank,
    unwrap_model,
)
from megatron.training import get_args, get_timers
from megatron.training.training import update_seqlen_stats_from_cu_seqlens
from torch import Tensor

from kvshift_megatron.training.stages import has_mtp, needs_tokens
from kvshift_megatron.training.task import Task

# A loss this many times the largest seen so far is reported by --check-for-spiky-loss.
_SPIKE = 10

# Tensors by name; None for an entry that the dataset or the pipeline stage does not have.
Batch = dict[str, Any]

# Entries that a dataset may leave out.
_OPTIONAL_KEYS = (
    "attention_mask",
    "cu_seqlens",
    "cu_seqlens_padded",
    "max_seqlen",
    "local_cp_size",
)


class ForwardStep:
    """Megatron's `forward_step_func` for a task.

    Args:
        task: Gives the additional entries of a batch and the validation metrics.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def __call__(
        self, data_iterator: Any, model: torch.nn.Module
    ) -> tuple[Tensor, Callable[[Tensor], tuple[Tensor, Tensor, dict[str, Tensor]]]]:
        """Run the model on the next micro-batch.

        Args:
            data_iterator: Iterator of samples; None on ranks that read none.
            model: This rank's chunk, wrapped or not.

        Returns:
            (losses [b, s], or hidden states for the next stage; the loss function).
        """
        timers = get_timers()
        timers("batch-generator", log_level=2).start()
        vp_stage = get_attr_wrapped_model(model, "vp_stage")
        args = get_args()
        micro_batch_size = args.micro_batch_size if model.training else args.eval_micro_batch_size
        config = get_attr_wrapped_model(model, "config")
        batch = self._get_batch(data_iterator, config, vp_stage, micro_batch_size)
        timers("batch-generator").stop()

        inputs = (batch.get("tokens"), batch.get("position_ids"), batch.get("attention_mask"))
        labels = batch.get("labels")
        loss_mask: Any = batch.get("loss_mask")  # None on stages that compute no loss
        packed = _packed_seq_params(batch, args.seq_length)
        metrics: dict[str, Tensor] = {}
        validation_metrics = None if model.training else self.task.validation_metrics
        if validation_metrics is not None and mpu.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ):
            # Without labels the model returns logits, from which the loss is computed here.
            logits = model(*inputs, packed_seq_params=packed)
            metrics = validation_metrics(logits, batch)
            gpt = unwrap_model(model)
            output = gpt.compute_language_model_loss(labels, logits.transpose(0, 1).contiguous())
        else:
            output = model(*inputs, labels=labels, loss_mask=loss_mask, packed_seq_params=packed)
        return output, partial(masked_loss, loss_mask, metrics)

    def _get_batch(
        self,
        data_iterator: Iterator[Batch],
        config: TransformerConfig,
        vp_stage: int | None,
        micro_batch_size: int,
    ) -> Batch:
        """Return this rank's part of the micro-batch.

        On a middle pipeline stage it is empty or, for packed documents, holds only their bounds.
        """
        args = get_args()
        takes_tokens = needs_tokens(config, vp_stage)
        is_packed = args.sft or args.dataloader_inter_document_masking
        if not (takes_tokens or is_packed):
            return {}
        tp_rank = mpu.get_tensor_model_parallel_rank()
        sample: Batch = {}
        if tp_rank == 0:
            sample = dict.fromkeys(_OPTIONAL_KEYS) | next(data_iterator)
            sample = {
                key: value.cuda(non_blocking=True) if isinstance(value, Tensor) else value
                for key, value in sample.items()
            }
            if args.create_attention_mask_in_dataloader and sample["attention_mask"] is None:
                # Otherwise the other ranks would wait for a broadcast that never comes.
                raise ValueError(
                    "create_attention_mask_in_dataloader is on, but the samples hold no "
                    "attention_mask: add --no-create-attention-mask-in-dataloader"
                )
        batch = get_batch_on_this_tp_rank(
            sample,
            has_cu_seqlens=is_packed,
            is_hybrid_cp=False,
            create_attention_mask_in_dataloader=args.create_attention_mask_in_dataloader,
            broadcast_src_rank=mpu.get_tensor_model_parallel_src_rank(),
            broadcast_group=mpu.get_tensor_model_parallel_group(),
            cp_size=args.context_parallel_size,
            tp_rank=tp_rank,
            micro_batch_size=micro_batch_size,
            seq_length=args.seq_length,
            mtp_on_this_rank=has_mtp(config, vp_stage),
            pipeline_model_parallel_size=args.pipeline_model_parallel_size,
            is_pipeline_first_stage=mpu.is_pipeline_first_stage(),
            is_pipeline_last_stage=mpu.is_pipeline_last_stage(),
        )
        batch |= self._broadcast_extra(sample, (micro_batch_size, args.seq_length))
        batch = flatten_batch_for_packed_sequences(batch)
        if not takes_tokens:
            return batch
        return get_batch_on_this_cp_rank(
            batch, is_hybrid_cp=False, cp_group=mpu.get_context_parallel_group()
        )

    def _broadcast_extra(self, sample: Batch, shape: tuple[int, int]) -> Batch:
        """Return the task's own entries, broadcast from tensor-parallel rank 0."""
        entries: Batch = {}
        for key in self.task.batch_keys:
            entry = sample.get(key)
            if entry is None:
                device = torch.cuda.current_device()
                entry = torch.empty(shape, dtype=torch.float32, device=device)
            torch.distributed.broadcast(
                entry,
                mpu.get_tensor_model_parallel_src_rank(),
                group=mpu.get_tensor_model_parallel_group(),
            )
            entries[key] = entry
        return entries


def _packed_seq_params(batch: Batch, seq_length: int) -> PackedSeqParams | None:
    """Return Megatron's description of packed documents, or None without packing."""
    if batch.get("cu_seqlens") is None:
        return None
    # Megatron gives these a batch dimension of 1.
    cu_seqlens = batch["cu_seqlens"].squeeze(0)
    padded = batch.get("cu_seqlens_padded")
    padded = None if padded is None else padded.squeeze(0)
    update_seqlen_stats_from_cu_seqlens(cu_seqlens)
    ends = cu_seqlens if padded is None else padded
    max_seqlen = int(batch["max_seqlen"].item())
    return PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=ends,
        cu_seqlens_kv=ends,
        cu_seqlens_q_padded=padded,
        cu_seqlens_kv_padded=padded,
        max_seqlen_q=max_seqlen,
        max_seqlen_kv=max_seqlen,
        tokens_per_sample=seq_length,
    )


def masked_loss(
    loss_mask: Tensor, metrics: dict[str, Tensor], losses: Tensor
) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Sum the losses of the unmasked tokens.

    Args:
        loss_mask: [b, s], 1.0 for tokens that count.
        metrics: By name, [2]: a sum and a count over this micro-batch.
        losses: [b, s], cross entropy in nats.

    Returns:
        (fp32 sum, int32 number of tokens, sums and counts by name); Megatron reduces the last over
        micro-batches and ranks and logs them.
    """
    args = get_args()
    loss_mask = loss_mask.view(-1).float()
    loss = torch.sum(losses.view(-1).float() * loss_mask)
    num_tokens = loss_mask.sum().detach().to(torch.int)
    _check_loss(loss, args)
    report = {"lm loss": torch.stack((loss.detach(), num_tokens.to(loss.dtype)))}
    return loss, num_tokens, {**report, **metrics}


def _check_loss(loss: Tensor, args: Namespace) -> None:
    """Make Megatron's own checks for a loss that is NaN, infinite or suddenly huge."""
    state_machine = get_rerun_state_machine()
    checks: list[tuple[Callable[[Tensor], Any], str, bool]] = []
    if args.check_for_nan_in_loss_and_grad:
        checks.append((torch.isnan, "found NaN in local forward loss calculation", True))
        checks.append((torch.isinf, "found Inf in local forward loss calculation", True))
    if args.check_for_spiky_loss:
        spiky = partial(state_machine.is_unexpectedly_large, threshold=_SPIKE, context="loss")
        checks.append((spiky, "Spiky loss", False))
    for rejection_func, message, fatal in checks:
        state_machine.validate_result(
            result=loss,
            rejection_func=rejection_func,
            message=message,
            tolerance=0.0,
            fatal=fatal,
        )
