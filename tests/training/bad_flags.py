"""Values of flags that cannot be trained with, each with the flag that the refusal must name."""

from tests.integration.tiny_gpt import flags

# Flags of Megatron -> values that cannot be trained with, by the other flags that they need.
_NUMBERS = (0, -1, -8)
_FRACTIONS = ("nan", "inf", -1)
_HYBRID = {"num_layers": None, "hybrid_layer_pattern": "*-*-"}
_VALUES: dict[str, tuple] = {
    **dict.fromkeys(
        (
            *("num_layers", "hidden_size", "num_attention_heads", "num_query_groups"),
            *("ffn_hidden_size", "kv_channels", "seq_length", "max_position_embeddings"),
            *("tensor_model_parallel_size", "pipeline_model_parallel_size"),
            *("context_parallel_size", "expert_model_parallel_size", "micro_batch_size"),
            *("global_batch_size", "eval_micro_batch_size", "train_iters", "log_interval"),
            *("vocab_size", "make_vocab_size_divisible_by", "eval_interval", "rotary_base"),
        ),
        _NUMBERS,
    ),
    **dict.fromkeys(
        (
            *("lr", "min_lr", "lr_warmup_init", "weight_decay", "clip_grad", "adam_eps"),
            *("norm_epsilon", "init_method_std", "decoupled_lr"),
        ),
        _FRACTIONS,
    ),
    **dict.fromkeys(("adam_beta1", "adam_beta2", "lr_warmup_fraction"), (*_FRACTIONS, 1, 1.5)),
    **dict.fromkeys(("hidden_dropout", "attention_dropout"), (*_FRACTIONS, 1.5)),
    **dict.fromkeys(
        (
            *("eval_iters", "num_workers", "num_experts", "mtp_num_layers", "lr_warmup_iters"),
            *("start_eval_at_iter", "manual_gc_interval"),
        ),
        (-1,),
    ),
    **dict.fromkeys(
        (
            *("seed", "lr_decay_iters", "distributed_timeout_minutes", "eval_global_batch_size"),
            *("padded_vocab_size", "num_dataset_builder_threads", "tensorboard_log_interval"),
            *("expert_tensor_parallel_size", "num_distributed_optimizer_instances"),
            *("num_virtual_stages_per_pipeline_rank", "num_layers_per_virtual_pipeline_stage"),
            *("rotary_seq_len_interpolation_factor", "log_memory_interval"),
        ),
        (0, -1),
    ),
    "rotary_percent": ("nan", "inf", 0, -0.5),
    "hang_timeout_seconds": ("nan",),
    "seed": (0, -1, 2**32),
    "num_layers": (*_NUMBERS, 10**9),
    "hidden_size": (*_NUMBERS, 10**9),
}
_OTHERS: dict[str, tuple[int, dict, str]] = {
    # What belongs to a switch.
    "rope scaling 0": (
        1,
        {"use_rope_scaling": True, "rope_scaling_factor": 0},
        "--rope-scaling-factor 0",
    ),
    "rope scaling nan": (
        1,
        {"use_rope_scaling": True, "rope_scaling_factor": "nan"},
        "--rope-scaling-factor nan",
    ),
    "loss scale nan": (1, {"fp16": True, "loss_scale": "nan"}, "--loss-scale nan"),
    "initial loss scale 0": (1, {"fp16": True, "initial_loss_scale": 0}, "--initial-loss-scale 0"),
    "min loss scale 0": (1, {"fp16": True, "min_loss_scale": 0}, "--min-loss-scale 0"),
    "loss scale window 0": (1, {"fp16": True, "loss_scale_window": 0}, "--loss-scale-window 0"),
    "hysteresis 0": (1, {"fp16": True, "hysteresis": 0}, "--hysteresis 0"),
    "save interval 0": (1, {"save": "unused", "save_interval": 0}, "--save-interval 0"),
    "save interval -1": (1, {"save": "unused", "save_interval": -1}, "--save-interval -1"),
    # What is missing.
    **{
        f"no {name}": (1, {name: None}, f"--{name.replace('_', '-')} is not set")
        for name in (
            "num_layers",
            "hidden_size",
            "num_attention_heads",
            "seq_length",
            "max_position_embeddings",
            "micro_batch_size",
            "train_iters",
            "lr",
            "eval_interval",
        )
    },
    "no save interval": (1, {"save": "unused"}, "--save-interval is not set"),
    "no decay for WSD": (1, {"lr_decay_style": "WSD"}, "--lr-wsd-decay-iters is not set"),
    "no start of decay": (
        1,
        {"weight_decay_incr_style": "linear", "end_weight_decay": 1},
        "--start-weight-decay is not set",
    ),
    "no end of decay": (
        1,
        {"weight_decay_incr_style": "cosine", "start_weight_decay": 1},
        "--end-weight-decay is not set",
    ),
    # What does not fit.
    "heads and hidden size": (1, {"hidden_size": 65}, "--hidden-size 65"),
    "heads and groups": (1, {"num_query_groups": 3}, "--num-query-groups 3"),
    "groups above heads": (1, {"num_query_groups": 8}, "--num-query-groups 8"),
    "odd channels": (1, {"hidden_size": 60}, "--kv-channels"),
    "odd kv-channels": (1, {"kv_channels": 7}, "--kv-channels"),
    "odd share": (1, {"rotary_percent": 0.2}, "--rotary-percent 0.2"),
    "positions": (1, {"seq_length": 64}, "--max-position-embeddings 32"),
    "experts used": (1, {"num_experts": 2, "moe_router_topk": 3}, "--moe-router-topk 3"),
    "scaled rotation, hybrid": (1, {**_HYBRID, "use_rope_scaling": True}, "--use-rope-scaling"),
    "scaled rotation, older name": (
        1,
        {"num_layers": None, "hybrid_override_pattern": "*-*-", "use_rope_scaling": True},
        "--use-rope-scaling",
    ),
    "multimodal rotation, hybrid": (
        1,
        {**_HYBRID, "position_embedding_type": "mrope"},
        "--position-embedding-type mrope",
    ),
    "world and TP": (3, {"tensor_model_parallel_size": 2}, "--tensor-model-parallel-size 2"),
    "world and PP": (1, {"pipeline_model_parallel_size": 2}, "--pipeline-model-parallel-size 2"),
    "world and CP": (6, {"context_parallel_size": 4}, "--context-parallel-size 4"),
    "heads and TP": (8, {"tensor_model_parallel_size": 8}, "--num-attention-heads 4"),
    "groups and TP": (
        6,
        {
            "num_attention_heads": 12,
            "hidden_size": 96,
            "num_query_groups": 4,
            "tensor_model_parallel_size": 6,
        },
        "--num-query-groups",
    ),
    "ffn and TP": (
        2,
        {"tensor_model_parallel_size": 2, "ffn_hidden_size": 129},
        "--ffn-hidden-size 129",
    ),
    "padded vocabulary and TP": (
        2,
        {"tensor_model_parallel_size": 2, "padded_vocab_size": 129},
        "--padded-vocab-size 129",
    ),
    "layers and PP": (3, {"pipeline_model_parallel_size": 3}, "--num-layers 2"),
    "layers, embedding and PP": (
        2,
        {"pipeline_model_parallel_size": 2, "account_for_loss_in_pipeline_split": True},
        "--num-layers 2",
    ),
    "sequence and CP": (4, {"context_parallel_size": 4, "seq_length": 28}, "--seq-length 28"),
    "sequence and TP": (
        2,
        {"tensor_model_parallel_size": 2, "sequence_parallel": True, "seq_length": 31},
        "--seq-length 31",
    ),
    "batch and micro-batch": (1, {"global_batch_size": 3}, "--global-batch-size 3"),
    "batch and replicas": (4, {}, "--global-batch-size 4"),
    "evaluation": (1, {"eval_micro_batch_size": 3}, "--eval-global-batch-size 4"),
    "two lengths": (1, {"train_samples": 8}, "--train-samples"),
    "iterations and samples": (1, {"lr_decay_samples": 8}, "--lr-decay-samples"),
    "samples and iterations": (
        1,
        {"train_iters": None, "train_samples": 8, "lr_warmup_iters": 1},
        "--lr-warmup-iters",
    ),
    "two warmups": (1, {"lr_warmup_fraction": 0.1, "lr_warmup_iters": 1}, "--lr-warmup-iters"),
    "warmup and length": (1, {"lr_warmup_iters": 20}, "--lr-warmup-iters 20"),
    "warmup and decay": (1, {"lr_warmup_iters": 9, "lr_decay_iters": 9}, "--lr-decay-iters 9"),
    "warmup and samples": (
        1,
        {"train_iters": None, "train_samples": 8, "lr_warmup_samples": 8},
        "--lr-warmup-samples 8",
    ),
    "lr below min-lr": (1, {"min_lr": 1}, "--min-lr 1"),
    "lr below its start": (1, {"lr_warmup_init": 1}, "--lr-warmup-init 1"),
    "constant decay": (1, {"start_weight_decay": 0.1}, "--start-weight-decay"),
    "falling decay": (
        1,
        {"weight_decay_incr_style": "linear", "start_weight_decay": 2, "end_weight_decay": 1},
        "--start-weight-decay 2",
    ),
    "two schedules": (
        1,
        {"override_opt_param_scheduler": True, "use_checkpoint_opt_param_scheduler": True},
        "--override-opt_param-scheduler",
    ),
}


def _given(name: str, value: object) -> dict:
    return {name: value, **({"save": None} if name == "save" else {})}


def _flag(name: str) -> str:
    return f"--{name.replace('_', '-')}"


# Name -> (ranks, command line, what the sentence names).
BAD: dict[str, tuple[int, list[str], str]] = {
    **{
        f"{name} {value}": (1, flags(**_given(name, value)), _flag(name))
        for name, values in _VALUES.items()
        for value in values
    },
    **{name: (ranks, flags(**given), part) for name, (ranks, given, part) in _OTHERS.items()},
}
