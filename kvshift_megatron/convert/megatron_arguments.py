"""Convert the training arguments in a Megatron checkpoint to an Architecture and back."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch

from kvshift_megatron.arguments import set_field
from kvshift_megatron.config import KVShiftConfig, Variant
from kvshift_megatron.convert.architecture import Architecture, Llama3RopeScaling
from kvshift_megatron.stored.settings import MEANING, meaning, stored_settings

# Settings that change what the weights compute, and the values for which the name map is right. A
# setting that a release does not have counts as set to the first value.
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
COMPARED = (*_REQUIRED, *_REQUIRED_OF_EXPERTS)


def architecture_from_arguments(
    arguments: Namespace,
    kv_shift: KVShiftConfig | None,
    dtype: torch.dtype,
    vocab_size: int,
    padded_vocab_size: int,
    checkpoint: Path,
) -> Architecture:
    """Return the architecture that a checkpoint's arguments describe.

    Args:
        arguments: Megatron's training arguments.
        kv_shift, dtype, padded_vocab_size: From the stored tensors: the arguments may lack them.
        vocab_size: Number of tokens that exist (see `vocabulary`).
        checkpoint: Path of the checkpoint, for messages.

    Raises:
        ValueError: Hugging Face's layouts have no place for a setting; the message names it.
    """
    num_experts = getattr(arguments, "num_experts", None) or 0
    required = {**_REQUIRED, **(_REQUIRED_OF_EXPERTS if num_experts else {})}
    for name, allowed in required.items():
        value = getattr(arguments, name, allowed[0])
        if value not in allowed:
            raise ValueError(
                f"{checkpoint}: the model was trained with {name}={value!r}, but the layouts that "
                f"can be written have a place for {name}={allowed[0]!r} only"
            )
    heads = _required(arguments, "num_attention_heads", checkpoint)
    hidden = _required(arguments, "hidden_size", checkpoint)
    grouped = getattr(arguments, "group_query_attention", False)
    ffn = _required(arguments, "ffn_hidden_size", checkpoint)
    if num_experts:
        ffn = getattr(arguments, "moe_ffn_hidden_size", None) or ffn
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


def _required(arguments: Namespace, name: str, checkpoint: Path) -> Any:
    value = getattr(arguments, name, None)
    if value is None:
        raise ValueError(
            f"{checkpoint}: the checkpoint's arguments lack {name}: save it with Megatron's own "
            "training loop"
        )
    return value


def hf_fields_from_arguments(arguments: Namespace, checkpoint: Path) -> dict[str, Any]:
    """Return the fields of a config.json that a converted checkpoint carries to the next one.

    Raises:
        ValueError: The arguments hold something else under that name.
    """
    fields = getattr(arguments, "hf_config_fields", None) or {}
    plain = (bool, int, float, str, type(None))
    if not isinstance(fields, dict) or not all(isinstance(v, plain) for v in fields.values()):
        raise ValueError(f"{checkpoint}: the checkpoint's hf_config_fields={fields!r} is damaged")
    return fields


def kv_shift_from_arguments(
    arguments: Namespace, stored: set[str], variant: Variant | None, checkpoint: Path
) -> KVShiftConfig | None:
    """Return the configuration of a checkpoint's taps, from their names and the arguments.

    Args:
        arguments: Megatron's training arguments.
        stored: Names of the stored taps, such as {"alpha_1", "alpha_2"}.
        variant: The variant that the user states; None takes it from the arguments.
        checkpoint: Path of the checkpoint, for messages.

    Raises:
        ValueError: Names and arguments contradict each other, or leave the variant open.
    """
    if not stored:
        return None
    recorded = stored_settings(arguments, checkpoint)
    has_gates = any(name.endswith("_logit") for name in stored)
    if recorded is None and variant is None and not has_gates:
        raise ValueError(
            f"{checkpoint}: the checkpoint's arguments do not say what its taps mean: add "
            "--kv-shift-variant free, or clamp if it was trained with that"
        )
    if recorded is not None and variant not in (None, recorded.variant):
        raise ValueError(
            f"{checkpoint}: the taps were trained with variant {recorded.variant!r}, and "
            f"--kv-shift-variant says {variant!r}: drop --kv-shift-variant"
        )
    chosen = variant or (recorded.variant if recorded else "gate")
    if (chosen == "gate") != has_gates:
        raise ValueError(
            f"{checkpoint}: the taps {', '.join(sorted(stored))} are not those of variant "
            f"{chosen!r}: check --kv-shift-variant"
        )
    window = 2 if has_gates else max(int(name.rpartition("_")[2]) for name in stored)
    shifted = {kind: any(name.startswith(kind) for name in stored) for kind in ("alpha", "beta")}
    kv_shift = KVShiftConfig(
        variant=chosen,
        window=window,
        shift_keys=shifted["alpha"],
        shift_values=shifted["beta"],
        init="uniform" if chosen == "gate" else "identity",
    )
    if recorded is not None and meaning(recorded) != meaning(kv_shift):
        raise ValueError(
            f"{checkpoint}: it holds the taps {', '.join(sorted(stored))}, and its arguments state "
            f"{recorded.describe()}: they are not of the same model"
        )
    return kv_shift


def arguments_from_architecture(
    architecture: Architecture, divisible_by: int, hf_fields: dict[str, Any] | None = None
) -> Namespace:
    """Return Megatron's arguments for a checkpoint of this architecture, plain values only.

    They are those that `--use-checkpoint-args` reads, that Megatron compares when it loads, and
    that `architecture_from_arguments` needs.

    Args:
        architecture: The model.
        divisible_by: The vocabulary was padded to a multiple of it.
        hf_fields: Fields of a config.json to keep for the next one (see hf_fields_from_arguments).

    Raises:
        ValueError: Megatron's arguments cannot express something.
    """
    arch = architecture
    if arch.rotary_base != int(arch.rotary_base):
        raise ValueError(
            f"rope_theta={arch.rotary_base} is not a whole number, but Megatron's --rotary-base "
            "takes whole numbers only"
        )
    scaling = arch.rope_scaling
    if scaling is not None and scaling != (standard := Llama3RopeScaling(scaling.factor)):
        raise ValueError(
            f"rope_scaling={scaling}: Megatron's --use-rope-scaling lets you choose the factor "
            f"only; the rest has to be as in {standard}"
        )
    arguments = Namespace(
        num_layers=arch.num_layers,
        hidden_size=arch.hidden_size,
        ffn_hidden_size=arch.ffn_hidden_size,
        num_attention_heads=arch.num_attention_heads,
        group_query_attention=True,
        num_query_groups=arch.num_query_groups,
        kv_channels=arch.kv_channels,
        seq_length=arch.max_position_embeddings,
        max_position_embeddings=arch.max_position_embeddings,
        position_embedding_type="rope",
        add_position_embedding=True,
        use_rotary_position_embeddings=False,
        rotary_base=int(arch.rotary_base),
        rotary_percent=1.0,
        rotary_interleaved=False,
        use_rope_scaling=arch.rope_scaling is not None,
        rope_scaling_factor=arch.rope_scaling.factor if arch.rope_scaling else 8.0,
        normalization="RMSNorm",
        layernorm_epsilon=arch.norm_epsilon,
        norm_epsilon=arch.norm_epsilon,
        swiglu=True,
        squared_relu=False,
        add_bias_linear=arch.add_bias_linear,
        add_qkv_bias=arch.add_qkv_bias,
        qk_layernorm=arch.qk_layernorm,
        apply_layernorm_1p=False,
        apply_query_key_layer_scaling=False,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        untie_embeddings_and_output_weights=not arch.tied,
        vocab_size=arch.vocab_size,
        padded_vocab_size=arch.padded_vocab_size,
        make_vocab_size_divisible_by=divisible_by,
        num_experts=arch.num_experts or None,
        params_dtype=arch.dtype,
        bf16=arch.dtype == torch.bfloat16,
        fp16=arch.dtype == torch.float16,
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
    if hf_fields:
        arguments.hf_config_fields = hf_fields
    if arch.num_experts:
        arguments.moe_ffn_hidden_size = arch.ffn_hidden_size
        arguments.moe_layer_freq = 1
        arguments.moe_router_topk = arch.moe_router_topk
        arguments.moe_router_pre_softmax = False
        arguments.moe_router_score_function = "softmax"
    if arch.kv_shift is None:
        arguments.no_kv_shift = True
    else:
        arguments.no_kv_shift = False
        for name in (*MEANING, "init"):
            set_field(arguments, name, getattr(arch.kv_shift, name))
    return arguments
