"""Train a case for a few steps with Megatron-Core's own schedules, DDP and optimizer."""

import contextlib
import functools
from dataclasses import replace
from unittest import mock

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import (
    DistributedDataParallel,
    DistributedDataParallelConfig,
    finalize_model_grads,
)
from megatron.core.enums import ModelType
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.tensor_parallel.layers import ColumnParallelLinear, RowParallelLinear
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.module import Float16Module
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.core.utils import get_attr_wrapped_model
from torch.nn.functional import linear

from tests.distributed import attentions, canonical, models
from tests.distributed.cases import Case
from tests.distributed.plants import planted

GLOBAL_BATCH = 8


def run(case: Case) -> dict:
    """Train `case` in its layout; return what comparisons need, as CPU tensors and floats.

    Returns:
        {"losses": [steps], "grad_norms": [steps], "params": {name: whole tensor after the last
        step}, "grads": {name: whole gradient of the first step} (not with the distributed
        optimizer, which leaves each rank a shard), "weight_decay": {name: multiplier},
        "attention": from `attentions.of_model`, not for a vanilla model}.
    """
    # models.py plants this one when it builds the model.
    error = None if case.planted_error == models.MTP_NOT_CONVERTED else case.planted_error
    with expert_parallel(case), planted(error), reordered_sums(case.reordering):
        tensor_parallel.model_parallel_cuda_manual_seed(1234)
        return _train(case)


@contextlib.contextmanager
def expert_parallel(case: Case):
    """Set up the process groups of a case with expert parallelism, and then those without."""
    if case.ep == 1:
        yield
        return
    sizes = dict(
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        virtual_pipeline_model_parallel_size=case.vpp,
    )
    parallel_state.destroy_model_parallel()
    parallel_state.initialize_model_parallel(**sizes, expert_model_parallel_size=case.ep)
    try:
        yield
    finally:
        parallel_state.destroy_model_parallel()
        parallel_state.initialize_model_parallel(**sizes)


def transformer_config(case: Case) -> TransformerConfig:
    dtype = torch.bfloat16 if case.model.bf16 else torch.float32
    fields = dict(
        num_layers=4,
        hidden_size=64,
        ffn_hidden_size=96,
        num_attention_heads=8,
        num_query_groups=case.model.num_query_groups,
        kv_channels=8,
        normalization="RMSNorm",
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        transformer_impl="local",
        use_cpu_initialization=True,
        gradient_accumulation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        persist_layer_norm=False,
        tensor_model_parallel_size=case.tp,
        pipeline_model_parallel_size=case.pp,
        context_parallel_size=case.cp,
        expert_model_parallel_size=case.ep,
        virtual_pipeline_model_parallel_size=case.vpp,
        sequence_parallel=case.sp,
        # As Megatron's arguments set it for an interleaved schedule. Otherwise two stages would
        # send each other two messages in one batch, and could mistake one for the other.
        overlap_p2p_comm=case.vpp is not None,
        batch_p2p_comm=case.vpp is None,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=case.model.bf16,
    )
    fields |= {**case.model.transformer, **case.transformer}
    if "heterogeneous_layers_config_encoded_json" in fields:
        return HeterogeneousTransformerConfig(**fields)
    return TransformerConfig(**fields)


def build(case: Case) -> list[torch.nn.Module]:
    """Build the case's model chunks, not yet wrapped."""
    config = transformer_config(case)
    chunks = []
    for stage in range(case.vpp or 1):
        vp_stage = stage if case.vpp else None
        model = models.chunk(case, config, vp_stage)
        model.model_type = ModelType.encoder_or_decoder
        for param in model.parameters():
            tensor_parallel.set_defaults_if_not_set_tensor_model_parallel_attributes(param)
        chunks.append(model)
    return chunks


def prepare(case: Case, chunks: list[torch.nn.Module]) -> tuple[list[torch.nn.Module], object]:
    """Add canonical weights, the case's wrappers of Megatron, and an optimizer.

    Returns:
        (wrapped chunks, optimizer).
    """
    config = chunks[0].config
    for chunk in chunks:
        canonical.fill(chunk)
    if case.model.bf16:
        chunks = [Float16Module(config, chunk) for chunk in chunks]
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=case.model.bf16,
        overlap_grad_reduce=case.overlap,
        overlap_param_gather=case.overlap and case.distributed_optimizer,
        use_distributed_optimizer=case.distributed_optimizer,
        # Small enough that a model of this size fills several buckets.
        bucket_size=8192 if case.overlap else None,
    )
    chunks = [
        DistributedDataParallel(config, ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    optimizer = get_megatron_optimizer(
        OptimizerConfig(
            optimizer="adam",
            lr=1e-3,
            min_lr=1e-3,
            weight_decay=0.1,
            clip_grad=1.0,
            # Above the rounding of a gradient. With Adam's 1e-8 the step of a parameter whose
            # gradient is almost 0 would depend on the processor's order of summation.
            adam_eps=1e-6,
            bf16=case.model.bf16,
            params_dtype=config.params_dtype,
            use_distributed_optimizer=case.distributed_optimizer,
            overlap_param_gather=ddp_config.overlap_param_gather,
        ),
        chunks,
    )
    config.finalize_model_grads_func = finalize_model_grads
    config.grad_scale_func = optimizer.scale_loss
    if case.overlap:
        config.no_sync_func = [chunk.no_sync for chunk in chunks]
        config.grad_sync_func = [chunk.start_grad_sync for chunk in chunks]
        if ddp_config.overlap_param_gather:
            config.param_sync_func = [chunk.start_param_sync for chunk in chunks]
        if len(chunks) == 1:
            config.no_sync_func, config.grad_sync_func = config.no_sync_func[0], None
            config.param_sync_func = None
    return chunks, optimizer


def _train(case: Case) -> dict:
    chunks = build(case)
    result = {"losses": [], "grad_norms": []}
    if case.model.kv_shift is not None:
        baseline = build(replace(case, model=replace(case.model, kv_shift=None)))
        result["attention"] = attentions.of_model(chunks, baseline)
    chunks, optimizer = prepare(case, chunks)
    for step in range(case.model.steps):
        result["losses"].append(forward_backward(case, chunks, optimizer, step))
        if step == 0 and not case.distributed_optimizer:
            result["grads"] = canonical.gather(chunks, lambda param: param.main_grad)
        success, grad_norm, _ = optimizer.step()
        assert success
        result["grad_norms"].append(float(grad_norm))
    if case.overlap and case.distributed_optimizer:
        for chunk in chunks:
            chunk.disable_forward_pre_hook(param_sync=True)
    result["params"] = canonical.gather(chunks, lambda param: param)
    result["weight_decay"] = _weight_decay(chunks, optimizer)
    return result


def forward_backward(case: Case, chunks, optimizer, step: int) -> float:
    """Compute one step's gradients into main_grad; return the global batch's mean loss."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
    optimizer.zero_grad()
    dp_group = parallel_state.get_data_parallel_group()
    samples = _samples(step, case.model.seq_length).chunk(dp_group.size())[dp_group.rank()]
    micro_batch = _micro_batch(case, len(samples))
    num_microbatches = len(samples) // micro_batch
    losses = get_forward_backward_func()(
        forward_step_func=_forward_step,
        data_iterator=[iter(samples.split(micro_batch)) for _ in chunks],
        model=chunks,
        num_microbatches=num_microbatches,
        seq_length=case.model.seq_length,
        micro_batch_size=micro_batch,
        forward_only=False,
    )
    # Only the last stage knows the loss; the others add zero.
    total = torch.tensor([sum(float(x["loss"]) for x in losses) if losses else 0.0]).double()
    torch.distributed.all_reduce(total, group=parallel_state.get_pipeline_model_parallel_group())
    ranks = parallel_state.get_data_parallel_group(with_context_parallel=True)
    torch.distributed.all_reduce(total, group=ranks)
    return float(total) / (num_microbatches * ranks.size())


def _micro_batch(case: Case, samples: int) -> int:
    """Return the micro-batch size: two micro-batches per rank, and more for a pipeline."""
    if case.reordering:
        return case.reordering[1]
    return 2 if case.pp > 1 or case.model.bf16 else samples // 2


def _samples(step: int, seq_length: int) -> torch.Tensor:
    """Draw int64 [GLOBAL_BATCH, seq_length + 1]."""
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(0, models.VOCAB_SIZE, (GLOBAL_BATCH, seq_length + 1), generator=generator)


def _forward_step(data_iterator, model):
    samples = next(data_iterator)
    tokens, labels = (on_this_cp_rank(x) for x in (samples[:, :-1], samples[:, 1:]))
    positions = on_this_cp_rank(torch.arange(samples.size(1) - 1).expand_as(samples[:, 1:]))
    loss_mask = {}
    if get_attr_wrapped_model(model, "config").mtp_num_layers:
        loss_mask["loss_mask"] = on_this_cp_rank(mtp_loss_mask(samples[:, 1:]))
    output = model(tokens, positions, None, labels=labels, **loss_mask)

    def loss_func(losses):
        loss = losses.float().mean()
        # Megatron takes this rank's part of the mean over all context-parallel ranks, and divides
        # it in place by the number of micro-batches.
        part = loss / parallel_state.get_context_parallel_world_size()
        return part, {"loss": loss.detach().clone()}

    return output, loss_func


def mtp_loss_mask(labels: torch.Tensor) -> torch.Tensor:
    """Mask one token in the middle out of the loss of multi-token prediction.

    Each context-parallel rank takes the mean over its own tokens. The last token of a sequence has
    no label two tokens ahead, so that the first of two ranks would have one token less. With one
    less on the second too, the mean of both means is that of the single process.
    """
    mask = torch.ones(labels.shape)
    mask[:, labels.size(1) // 2] = 0.0
    return mask


def on_this_cp_rank(x: torch.Tensor) -> torch.Tensor:
    """Return chunks r and 2C-1-r of [b, s], as [b, s / C], from the definition."""
    rank = parallel_state.get_context_parallel_rank()
    ranks = parallel_state.get_context_parallel_world_size()
    chunks = x.chunk(2 * ranks, dim=1)
    return torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]), dim=1).contiguous()


def _weight_decay(chunks, optimizer) -> dict[str, float]:
    """Return weight-decay multipliers of the optimizer's parameters, by canonical name."""
    names = {
        id(param): canonical.canonical_name(name, chunk)
        for chunk in chunks
        for name, param in chunk.named_parameters()
    }
    return {
        names[id(param)]: group["wd_mult"]
        for group in optimizer.param_groups
        for param in group["params"]
        if id(param) in names
    }


@contextlib.contextmanager
def reordered_sums(reordering: tuple[int, int] | None):
    """Sum in rounded parts what tensor parallelism sums over as many ranks.

    These are the outputs of row-parallel layers, and in the backward pass the input gradients of
    column-parallel layers.
    """
    if reordering is None:
        yield
        return
    chunks = reordering[0]

    def row_parallel(self, input_):
        parts = zip(input_.chunk(chunks, -1), self.weight.chunk(chunks, 1))
        return functools.reduce(torch.add, [linear(x, w) for x, w in parts]), None

    def column_parallel(self, input_, weight=None, **kwargs):
        weight = self.weight if weight is None else weight
        return torch.cat([linear(input_, w) for w in weight.chunk(chunks, 0)], -1), None

    with (
        mock.patch.object(RowParallelLinear, "forward", row_parallel),
        mock.patch.object(ColumnParallelLinear, "forward", column_parallel),
    ):
        yield
