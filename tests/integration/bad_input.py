"""Command lines that must be refused: name -> (flags, parts of the message)."""

from tests.integration.tiny_gpt import flags

BAD_INPUT = {
    "query groups and TP": (
        flags(num_attention_heads=12, hidden_size=96, num_query_groups=3,
              tensor_model_parallel_size=2),
        ["num_query_groups=3", "tensor_model_parallel_size=2", "one must divide the other"],
    ),
    "MLA": (
        flags(multi_latent_attention=True),
        ["multi_latent_attention", "drop --multi-latent-attention"],
    ),
    "reset_attention_mask": (
        flags(reset_attention_mask=True),
        ["reset_attention_mask", "--dataloader-inter-document-masking or --sft"],
    ),
    "window 1": (flags(kv_shift_window=1), ["window=1", "2, 3 or 4"]),
    "window 5": (flags(kv_shift_window=5), ["window=5", "2, 3 or 4"]),
    "unknown variant": (
        flags(kv_shift_variant="fancy"),
        ["variant='fancy'", "free, gate, clamp"],
    ),
    "unknown init": (flags(kv_shift_init="zeros"), ["init='zeros'", "uniform, identity"]),
    "gate with identity": (
        flags(kv_shift_variant="gate", kv_shift_init="identity"),
        ["init='identity'", "use variant='free'"],
    ),
    "nothing shifted": (
        flags(no_kv_shift_keys=True, no_kv_shift_values=True),
        ["shift_keys and shift_values are both off"],
    ),
    "taps for the baseline model": (
        flags(no_kv_shift=True, kv_shift_window=3),
        ["--no-kv-shift", "window", "drop one of the two"],
    ),
    "inter-document masking with context parallelism": (
        flags(dataloader_inter_document_masking=True, context_parallel_size=2),
        ["dataloader_inter_document_masking", "set --context-parallel-size 1"],
    ),
    "sft with context parallelism, without Transformer Engine": (
        flags(sft=True, context_parallel_size=2),
        ["sft with context_parallel_size=2", "install it, or set --context-parallel-size 1"],
    ),
    "hybrid context parallelism": (
        flags(hybrid_context_parallel=True),
        ["hybrid_context_parallel", "drop --hybrid-context-parallel"],
    ),
    "packed micro-batches over pipeline stages": (
        flags(dataloader_inter_document_masking=True, pipeline_model_parallel_size=2),
        ["micro_batch_size=2", "set --micro-batch-size 1"],
    ),
    "spec": (
        flags(spec="kvshift_megatron.layer_specs kv_shift_layer_spec"),
        ["spec", "drop --spec"],
    ),
    "no layer pattern": (
        flags(num_layers=None, hybrid_layer_pattern="*-?"),
        ["'?'"],
    ),
    "the flag of a patched Megatron-LM": (flags(kv_shift=True), ["kv_shift", "drop --kv-shift"]),
    "fp8 on a CPU": (flags(fp8_format="hybrid"), ["--fp8-format"]),
    "Transformer Engine on a CPU": (
        flags(transformer_impl="transformer_engine"),
        ["--transformer-impl", "local"],
    ),
    "task module": (
        flags(task_module="no.such.module"),
        ["task_module='no.such.module'", "importable"],
    ),
}  # fmt: skip
