"""Megatron's training arguments, as a checkpoint holds them, to an Architecture and back."""

from argparse import Namespace
from pathlib import Path

import torch

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.convert.architecture import Architecture, Llama3RopeScaling

# Settings that change what the weights compute, and the values for which the name map holds. One
# that a release does not have yet, or no longer, is at its first value.
_REQUIRED = {
    "normalization": ("RMSNorm",),
    "swiglu": (True,),
    "position_embedding_type": ("rope",),
    "rotary_percent": (1.0,),
    "rotary_interleaved": (False, None),
    "rotary_seq_len_interpolation_factor": (None, 1),
    "no_rope_freq": (None,),
    "apply_layernorm_1p": (False, None),
    "layernorm_zero_centered_gamma": (False, None),
    "apply_residual_connection_post_layernorm": (False, None),
    "qk_l2_norm": (False, None),
    "multi_latent_attention": (False, None),
    "experimental_attention_variant": (None,),
    "linear_attention_freq": (None,),
    "attention_output_gate": (False, None),
    "softmax_type": ("vanilla", None),
    "softmax_scale": (None,),
    "window_size": (None,),
    "squared_relu": (False, None),
    "quick_geglu": (False, None),
    "glu_linear_offset": (0.0, None),
    "activation_func_clamp_value": (None,),
    "use_mup": (False, None),
    "mtp_num_layers": (None, 0),
    "heterogeneous_layers_config_path": (None,),
    "heterogeneous_layers_config_encoded_json": (None, ""),
    "hybrid_layer_pattern": (None,),
    "hybrid_override_pattern": (None,),
}
_REQUIRED_OF_EXPERTS = {
    "moe_layer_freq": (1, None),
    "moe_shared_expert_intermediate_size": (None,),
    "moe_router_score_function": ("softmax", None),
    "moe_router_pre_softmax": (False, None),
    "moe_router_topk_scaling_factor": (None,),
    "moe_router_enable_expert_bias": (False, None),
    "moe_router_num_groups": (None,),
    "moe_router_load_balancing_type": ("aux_loss", "seq_aux_loss", "global_aux_loss", "none"),
    "moe_apply_probs_on_input": (False, None),
    "moe_expert_capacity_factor": (None,),
    "moe_latent_size": (None,),
    "moe_mlp_glu_interleave_size": (None,),
}


def architecture_from_arguments(
    arguments: Namespace,
    kv_shift: KVShiftConfig | None,
    dtype: torch.dtype,
    vocab_size: int | None,
    padded_vocab_size: int,
    checkpoint: Path,
) -> Architecture:
    """What a checkpoint's arguments say that its model is.

    Args:
        kv_shift, dtype, padded_vocab_size: of the stored tensors, which the arguments need not say.
        vocab_size: tokens that exist; None takes the arguments'.
        checkpoint: for messages.

    Raises:
        ValueError: a setting that Hugging Face's layouts have no place for; the message names it.
    """
    num_experts = getattr(arguments, "num_experts", None) or 0
    required = {**_REQUIRED, **(_REQUIRED_OF_EXPERTS if num_experts else {})}
    for name, allowed in required.items():
        value = getattr(arguments, name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{checkpoint}: the model was trained with {name}={value!r}, for which there is no "
                f"place in the layouts that can be written: {allowed[0]!r} can be converted"
            )
    heads = _required(arguments, "num_attention_heads", checkpoint)
    hidden = _required(arguments, "hidden_size", checkpoint)
    grouped = getattr(arguments, "group_query_attention", False)
    ffn = _required(arguments, "ffn_hidden_size", checkpoint)
    if num_experts:
        ffn = getattr(arguments, "moe_ffn_hidden_size", None) or ffn
    vocab_size = _vocab_size(arguments, vocab_size, padded_vocab_size, checkpoint)
    epsilon = getattr(arguments, "layernorm_epsilon", getattr(arguments, "norm_epsilon", None))
    if epsilon is None:
        epsilon = _required(arguments, "layernorm_epsilon", checkpoint)
    scaling = None
    if getattr(arguments, "use_rope_scaling", False):
        # The other parameters are Megatron's constants.
        scaling = Llama3RopeScaling(factor=float(arguments.rope_scaling_factor))
    return Architecture(
        num_layers=_required(arguments, "num_layers", checkpoint),
        hidden_size=hidden,
        ffn_hidden_size=ffn,
        num_attention_heads=heads,
        num_query_groups=arguments.num_query_groups if grouped else heads,
        kv_channels=getattr(arguments, "kv_channels", None) or hidden // heads,
        vocab_size=vocab_size,
        padded_vocab_size=padded_vocab_size,
        max_position_embeddings=_required(arguments, "max_position_embeddings", checkpoint),
        norm_epsilon=epsilon,
        rotary_base=float(_required(arguments, "rotary_base", checkpoint)),
        rope_scaling=scaling,
        tied=not getattr(arguments, "untie_embeddings_and_output_weights", False),
        qk_layernorm=bool(getattr(arguments, "qk_layernorm", False)),
        add_bias_linear=bool(getattr(arguments, "add_bias_linear", True)),
        add_qkv_bias=bool(getattr(arguments, "add_qkv_bias", False)),
        num_experts=num_experts,
        moe_router_topk=getattr(arguments, "moe_router_topk", 2),
        kv_shift=kv_shift,
        dtype=dtype,
    )


def _required(arguments: Namespace, name: str, checkpoint: Path):
    value = getattr(arguments, name, None)
    if value is None:
        raise ValueError(
            f"{checkpoint}: the checkpoint's arguments lack {name}: save it with Megatron's own "
            "training loop"
        )
    return value


def _vocab_size(arguments, given, padded, checkpoint) -> int:
    stated = getattr(arguments, "padded_vocab_size", None)
    if stated is not None and stated != padded:
        raise ValueError(
            f"{checkpoint}: the embedding has {padded} rows, but the arguments say "
            f"padded_vocab_size={stated}: the two are not of the same model"
        )
    if given is not None:
        if not 0 < given <= padded:
            raise ValueError(
                f"--vocab-size {given} must be at least 1 and at most {padded}, the rows of the "
                f"embedding in {checkpoint}"
            )
        return given
    recorded = getattr(arguments, "vocab_size", None)
    if recorded is None:
        return padded
    multiple = (getattr(arguments, "make_vocab_size_divisible_by", None) or 1) * (
        getattr(arguments, "tensor_model_parallel_size", None) or 1
    )
    if not recorded <= padded < recorded + 2 * multiple:
        raise ValueError(
            f"{checkpoint}: {padded} rows of the embedding are no padding of vocab_size={recorded} "
            f"to a multiple of {multiple}: say with --vocab-size how many tokens there are"
        )
    return recorded


def kv_shift_from_arguments(
    arguments: Namespace, stored: set[str], variant: str | None, checkpoint: Path
) -> KVShiftConfig | None:
    """The taps of a checkpoint, from their names and the arguments.

    Args:
        stored: names of the stored taps, such as {"alpha_1", "alpha_2"}.
        variant: what the user says that they are; None takes the arguments'.

    Raises:
        ValueError: names and arguments do not go together, or leave the variant open.
    """
    if not stored:
        return None
    if any(name.endswith("_logit") for name in stored):
        window, found = 2, "gate"
    else:
        window = max(int(name.rpartition("_")[2]) for name in stored)
        found = None
        if variant is None and not hasattr(arguments, "kv_shift_variant"):
            raise ValueError(
                f"{checkpoint}: the checkpoint's arguments do not say what its taps mean: add "
                "--kv-shift-variant free, or clamp if it was trained with that"
            )
    recorded = getattr(arguments, "kv_shift_variant", None) or found or "free"
    chosen = variant or recorded
    if (chosen == "gate") != (found == "gate"):
        raise ValueError(
            f"{checkpoint}: the taps {', '.join(sorted(stored))} are not those of variant "
            f"{chosen!r}: check --kv-shift-variant"
        )
    shifted = {kind: any(name.startswith(kind) for name in stored) for kind in ("alpha", "beta")}
    return KVShiftConfig(
        variant=chosen,
        window=window,
        shift_keys=shifted["alpha"],
        shift_values=shifted["beta"],
        init="uniform" if chosen == "gate" else "identity",
    )


def arguments_from_architecture(architecture: Architecture, divisible_by: int) -> Namespace:
    """Megatron's arguments for a checkpoint of this architecture, plain values only.

    They are what `--use-checkpoint-args` reads, what Megatron compares when it loads, and what
    `architecture_from_arguments` needs.

    Args:
        divisible_by: what the vocabulary was padded to a multiple of.

    Raises:
        ValueError: something that Megatron's arguments cannot express.
    """
    one = architecture
    if one.rotary_base != int(one.rotary_base):
        raise ValueError(
            f"rope_theta={one.rotary_base} is not a whole number, which Megatron's --rotary-base is"
        )
    if one.rope_scaling not in (None, Llama3RopeScaling(getattr(one.rope_scaling, "factor", 0.0))):
        standard = Llama3RopeScaling(one.rope_scaling.factor)
        raise ValueError(
            f"rope_scaling={one.rope_scaling}: Megatron's --use-rope-scaling has a factor to "
            f"choose, but fixes the rest as {standard}"
        )
    arguments = Namespace(
        num_layers=one.num_layers,
        hidden_size=one.hidden_size,
        ffn_hidden_size=one.ffn_hidden_size,
        num_attention_heads=one.num_attention_heads,
        group_query_attention=True,
        num_query_groups=one.num_query_groups,
        kv_channels=one.kv_channels,
        seq_length=one.max_position_embeddings,
        max_position_embeddings=one.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=int(one.rotary_base),
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=one.rope_scaling is not None,
        rope_scaling_factor=one.rope_scaling.factor if one.rope_scaling else 8.0,
        normalization="RMSNorm",
        layernorm_epsilon=one.norm_epsilon,
        norm_epsilon=one.norm_epsilon,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=one.add_bias_linear,
        add_qkv_bias=one.add_qkv_bias,
        qk_layernorm=one.qk_layernorm,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not one.tied,
        vocab_size=one.vocab_size,
        padded_vocab_size=one.padded_vocab_size,
        make_vocab_size_divisible_by=divisible_by,
        num_experts=one.num_experts or None,
        params_dtype=one.dtype,
        bf16=one.dtype == torch.bfloat16,
        fp16=one.dtype == torch.float16,
        ckpt_format="torch_dist",
        tensor_model_parallel_size=1,
        pipeline_model_parallel_size=1,
        expert_model_parallel_size=1,
        context_parallel_size=1,
        world_size=1,
        data_parallel_size=1,
        consumed_train_samples=0,
        skipped_train_samples=0,
        consumed_valid_samples=0,
    )
    if one.num_experts:
        arguments.moe_ffn_hidden_size = one.ffn_hidden_size
        arguments.moe_layer_freq = 1
        arguments.moe_router_topk = one.moe_router_topk
        arguments.moe_router_pre_softmax = False
        arguments.moe_router_score_function = "softmax"
    if one.kv_shift is None:
        arguments.no_kv_shift = True
    else:
        arguments.no_kv_shift = False
        arguments.kv_shift_variant = one.kv_shift.variant
        arguments.kv_shift_window = one.kv_shift.window
        arguments.no_kv_shift_keys = not one.kv_shift.shift_keys
        arguments.no_kv_shift_values = not one.kv_shift.shift_values
    return arguments
