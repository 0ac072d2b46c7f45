"""What each flag that this package knows may be: one table, read before anything starts.

Megatron answers many of these values with an assertion without text, a division by zero or a tensor
of negative size, some of them minutes after the start. What is not here is left to Megatron: no
value that it trains with is refused. Whether the values fit each other is in `flag_relations`.
"""

from argparse import Namespace

from kvshift_megatron.utils.field_kinds import (
    FFN,
    HEADS,
    HIDDEN,
    LAYERS,
    Kind,
    above,
    at_least,
    share,
    short,
    whole,
)

_COUNT, _COUNT_OR_NONE = whole(1, 2**31 - 1), whole(0, 2**31 - 1)
_STEPS, _STEPS_OR_NONE = whole(1, 10**15), whole(0, 10**15)  # iterations or samples
_RANKS = whole(1, 2**20)
_RATE, _FACTOR, _SHARE, _BETA = at_least(0), above(0), share(), share(below_one=True)

# Argument of Megatron's (0.19) -> what its flag may hold. None always counts as not given.
RANGES: dict[str, Kind] = {
    # The model.
    "num_layers": LAYERS,
    "encoder_num_layers": LAYERS,
    "mtp_num_layers": whole(0, 10_000),
    "hidden_size": HIDDEN,
    "ffn_hidden_size": FFN,
    "moe_ffn_hidden_size": FFN,
    "num_attention_heads": HEADS,
    "kv_channels": HEADS,
    "seq_length": _COUNT,
    "max_position_embeddings": _COUNT,
    "rotary_base": _COUNT,
    "rotary_percent": above(0),
    "rotary_seq_len_interpolation_factor": _COUNT,
    "layernorm_epsilon": _RATE,
    "init_method_std": _RATE,
    "embedding_init_method_std": _RATE,
    "hidden_dropout": _SHARE,
    "attention_dropout": _SHARE,
    "vocab_size": _COUNT,
    "padded_vocab_size": _COUNT,
    "make_vocab_size_divisible_by": _COUNT,
    "num_experts": whole(0, 10_000),
    "moe_router_topk": whole(1, 10_000),
    "mtp_loss_scaling_factor": _RATE,
    "seed": whole(1, 2**32 - 1),
    # How it is spread.
    "tensor_model_parallel_size": _RANKS,
    "pipeline_model_parallel_size": _RANKS,
    "context_parallel_size": _RANKS,
    "expert_model_parallel_size": _RANKS,
    "expert_tensor_parallel_size": _RANKS,
    "num_layers_per_virtual_pipeline_stage": LAYERS,
    "num_virtual_stages_per_pipeline_rank": LAYERS,
    "microbatch_group_size_per_vp_stage": _COUNT,
    "num_distributed_optimizer_instances": _RANKS,
    "distributed_timeout_minutes": whole(1, 10**7),
    # Batches, and the length of the run.
    "micro_batch_size": _COUNT,
    "global_batch_size": _COUNT,
    "eval_micro_batch_size": _COUNT,
    "eval_global_batch_size": _COUNT,
    "train_iters": _STEPS,
    "train_samples": _STEPS,
    "eval_iters": _STEPS_OR_NONE,
    "start_eval_at_iter": _STEPS_OR_NONE,
    "log_interval": _STEPS,
    "tensorboard_log_interval": _STEPS,
    "log_memory_interval": _STEPS,
    "manual_gc_interval": _STEPS_OR_NONE,
    "num_workers": _COUNT_OR_NONE,
    "num_dataset_builder_threads": _COUNT,
    "mid_level_dataset_surplus": _RATE,
    # The optimizer.
    "lr": _RATE,
    "min_lr": _RATE,
    "decoupled_lr": _RATE,
    "decoupled_min_lr": _RATE,
    "lr_warmup_init": _RATE,
    "lr_warmup_fraction": _BETA,
    "lr_warmup_iters": _STEPS_OR_NONE,
    "lr_warmup_samples": _STEPS_OR_NONE,
    "lr_decay_iters": _STEPS,
    "lr_decay_samples": _STEPS,
    "lr_wsd_decay_iters": _STEPS_OR_NONE,
    "lr_wsd_decay_samples": _STEPS_OR_NONE,
    "weight_decay": _RATE,
    "start_weight_decay": _RATE,
    "end_weight_decay": _RATE,
    "clip_grad": _RATE,
    "adam_beta1": _BETA,
    "adam_beta2": _BETA,
    "adam_eps": _RATE,
    "sgd_momentum": _RATE,
    # This package's own.
    "hang_timeout_seconds": _RATE,
    "gpu_peak_tflops": _FACTOR,
    "gpu_telemetry_interval": _FACTOR,
}
# Switch -> what only counts with it.
RANGES_WITH: dict[str, dict[str, Kind]] = {
    "group_query_attention": {"num_query_groups": HEADS},
    "use_rope_scaling": {"rope_scaling_factor": _FACTOR},
    "fp16": {
        "loss_scale": _RATE,
        "initial_loss_scale": _FACTOR,
        "min_loss_scale": _FACTOR,
        "loss_scale_window": at_least(1),
        "hysteresis": _COUNT,
    },
    "save": {"save_interval": _STEPS, "save_retain_interval": _STEPS},
}
# Arguments whose flag has another name.
_FLAGS = {
    "layernorm_epsilon": "--norm-epsilon",
    "microbatch_group_size_per_vp_stage": "--microbatch-group-size-per-virtual-pipeline-stage",
}


def flag_of(name: str) -> str:
    """Return the flag that sets an argument."""
    return _FLAGS.get(name, f"--{name.replace('_', '-')}")


def check_ranges(args: Namespace) -> None:
    """Raise ValueError for a flag that is out of its range.

    Args:
        args: Megatron's, as parsed, with or without what it takes from a checkpoint.
    """
    ranges = dict(RANGES)
    for switch, more in RANGES_WITH.items():
        if getattr(args, switch, None):
            ranges |= more
    for name, kind in ranges.items():
        value = getattr(args, name, None)
        if value is not None and not kind.accepts(value):
            raise ValueError(f"{flag_of(name)} {short(value)} must be {kind.expected}")
