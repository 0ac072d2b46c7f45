"""Flags that only Megatron refuses, and odd ones that it trains with."""

from tests.integration.tiny_gpt import flags

# What only Megatron knows: name -> (ranks, flags, parts of the sentence).
MEGATRONS: dict[str, tuple[int, dict, list[str]]] = {
    "two precisions": (1, {"fp16": True, "bf16": True}, ["--fp16, --bf16", "`not args.bf16`"]),
    "virtual stages alone": (
        1,
        {"num_virtual_stages_per_pipeline_rank": 2},
        ["pipeline-model-parallel size should be greater than 1"],
    ),
    "layers per virtual stage": (
        2,
        {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 3},
        ["--num-layers-per-virtual-pipeline-stage 3"],
    ),
    "experts and EP": (
        2,
        {"num_experts": 3, "expert_model_parallel_size": 2},
        ["--num-experts 3", "--expert-model-parallel-size 2"],
    ),
    "EP without experts": (
        2,
        {"expert_model_parallel_size": 2},
        ["--expert-model-parallel-size 2 without --num-experts"],
    ),
    "saving retained": (
        1,
        {"save": "unused", "save_interval": 2, "save_retain_interval": 3},
        ["--save-retain-interval 3", "--save-interval 2"],
    ),
    "log memory": (
        1,
        {"log_interval": 2, "log_memory_interval": 3},
        ["--log-memory-interval 3", "--log-interval 2"],
    ),
    "recompute": (
        1,
        {"recompute_granularity": "selective", "recompute_method": "uniform"},
        ["--recompute-method uniform"],
    ),
    "full recompute": (1, {"recompute_granularity": "full"}, ["recompute"]),
    "cross entropy in fp16": (1, {"fp16_lm_cross_entropy": True}, ["--fp16-lm-cross-entropy"]),
    "residuals in fp32": (1, {"fp32_residual_connection": True}, ["--fp32-residual-connection"]),
    "gather without optimizer": (1, {"overlap_param_gather": True}, ["--overlap-param-gather"]),
    "old activations": (1, {"checkpoint_activations": True}, ["--checkpoint-activations"]),
    "old batch size": (1, {"batch_size": 2}, ["--batch-size 2"]),
    "blend of data": (1, {"data_path": "a b"}, ["--mock-data"]),
    "no vocabulary": (1, {"vocab_size": None}, ["ocab"]),
    "hierarchical CP": (
        2,
        {"context_parallel_size": 2, "hierarchical_context_parallel_sizes": "3"},
        ["--hierarchical-context-parallel-sizes"],
    ),
    "layout": (
        2,
        {"pipeline_model_parallel_size": 2, "pipeline_model_parallel_layout": "Et|tL|t"},
        ["layout"],
    ),
}


_GOOD: dict[str, tuple[int, dict]] = {
    "as it is": (1, {}),
    "one head": (1, {"num_attention_heads": 1, "num_query_groups": 1}),
    "groups ignored": (1, {"group_query_attention": None, "num_query_groups": 3}),
    "channels of their own": (1, {"hidden_size": 65, "kv_channels": 8}),
    "odd channels without RoPE": (
        1,
        {"kv_channels": 7, "position_embedding_type": "learned_absolute"},
    ),
    "half of the channels": (1, {"rotary_percent": 0.5}),
    "more than all channels": (1, {"rotary_percent": 2}),
    "groups below TP": (4, {"tensor_model_parallel_size": 4}),
    "uneven stages": (
        3,
        {
            "pipeline_model_parallel_size": 3,
            "num_layers": 5,
            "decoder_first_pipeline_num_layers": 1,
        },
    ),
    "counted embedding": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers": 3,
            "account_for_embedding_in_pipeline_split": True,
        },
    ),
    "a layout": (
        2,
        {
            "pipeline_model_parallel_size": 2,
            "num_layers": 3,
            "pipeline_model_parallel_layout": "Ett|tL",
        },
    ),
    "no batch size": (1, {"global_batch_size": None}),
    "what Megatron 0.19 ignores": (1, {"rampup_batch_size": "2 -2 100"}),
    "a batch that may shrink": (
        1,
        {
            "global_batch_size": 5,
            "decrease_batch_size_if_needed": True,
            "eval_global_batch_size": 4,
        },
    ),
    "by samples": (1, {"train_iters": None, "train_samples": 80, "lr_warmup_samples": 8}),
    "nothing learned": (1, {"lr": 0, "min_lr": 0}),
    "a constant rate": (1, {"lr_decay_style": "constant", "lr_warmup_fraction": 0}),
    "no clipping, no decay": (
        1,
        {"clip_grad": 0, "weight_decay": 0, "adam_beta1": 0, "adam_eps": 0},
    ),
    "growing decay": (
        1,
        {"weight_decay_incr_style": "cosine", "start_weight_decay": 0, "end_weight_decay": 1},
    ),
    "all dropped": (1, {"hidden_dropout": 1, "attention_dropout": 1}),
    "decay beyond the run": (1, {"lr_decay_iters": 1000, "lr_warmup_iters": 100}),
    "WSD": (1, {"lr_decay_style": "WSD", "lr_wsd_decay_iters": 5}),
    "loss scales without fp16": (1, {"initial_loss_scale": 0}),
    "a dynamic loss scale": (1, {"fp16": True, "loss_scale": 0}),
    "save interval without save": (1, {"save_interval": 0}),
    "evaluation only": (1, {"skip_train": True, "train_iters": None, "lr": None, "eval_iters": 2}),
    "no evaluation": (1, {"eval_iters": 0}),
    "no workers": (1, {"num_workers": 0}),
    "no experts": (1, {"num_experts": 0}),
    "experts": (1, {"num_experts": 2, "moe_router_topk": 2}),
    "experts of any width": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "num_experts": 2,
            "ffn_hidden_size": 64,
            "sequence_parallel": True,
        },
    ),
    "short sequence": (1, {"seq_length": 1}),
    "odd sequence": (1, {"seq_length": 31}),
    "packed sequence of any length": (
        2,
        {
            "tensor_model_parallel_size": 2,
            "sequence_parallel": True,
            "dataloader_inter_document_masking": True,
            "seq_length": 30,
        },
    ),
    "old names": (
        1,
        {"num_layers": None, "encoder_num_layers": 2, "seq_length": None, "encoder_seq_length": 32},
    ),
    "the largest seed": (1, {"seed": 2**32 - 1}),
    "the baseline": (1, {"no_kv_shift": True}),
    "long": (1, {"max_position_embeddings": 2**20, "rotary_base": 500_000_000}),
}
GOOD = {name: (ranks, flags(**given)) for name, (ranks, given) in _GOOD.items()}
