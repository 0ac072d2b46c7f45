"""Megatron's methods that classes of this package override, and what each override relies on."""

from kvshift_megatron.upstream.seams import Seam

_ATTENTION = "megatron.core.transformer.attention.SelfAttention"
_CALLER = "megatron.core.dist_checkpointing.strategies.async_utils.PersistentAsyncCaller"
_DISTRIBUTED = "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer"
_BUILDERS = "megatron.training.models"


def of_attention() -> list[Seam]:
    """Return the methods that KVShiftSelfAttention overrides."""
    return [
        Seam(
            f"{_ATTENTION}.__init__",
            "The taps are registered after the attention's own parameters.",
            takes="config submodules layer_number *",
            uses=("linear_qkv", "q_layernorm", "k_layernorm"),
        ),
        Seam(
            f"{_ATTENTION}.forward",
            "It gets keys and values from the method that shifts them, and rotates them after it.",
            takes="hidden_states attention_mask * rotary_pos_emb * packed_seq_params *",
            uses=("get_query_key_value_tensors", "apply_rotary_pos_emb", "core_attention"),
        ),
        Seam(
            f"{_ATTENTION}.get_query_key_value_tensors",
            "It returns keys and values after the norm of keys, and before the rotation.",
            takes="hidden_states key_value_states *",
            uses=("linear_qkv", "k_layernorm"),
            lacks=("apply_rotary_pos_emb",),
        ),
        Seam(
            f"{_ATTENTION}.sharded_state_dict",
            "The taps are saved as parts of global tensors.",
            takes="prefix sharded_offsets metadata",
        ),
    ]


def of_builders() -> list[Seam]:
    """Return the methods that this package's model builders override."""
    return [
        Seam(
            f"{_BUILDERS}.gpt.GPTModelBuilder.build_model",
            "It makes the layers of the functions that are replaced around it.",
            takes="pg_collection pre_process post_process vp_stage",
            uses=("mtp_block_spec",),
            releases=">=0.19",
        ),
        Seam(
            f"{_BUILDERS}.hybrid.HybridModelBuilder.__init__",
            "It gets the configuration of the taps.",
            takes="model_config",
            releases=">=0.19",
        ),
        Seam(
            f"{_BUILDERS}.hybrid.HybridModelBuilder.build_model",
            "It builds the stack that the configuration names.",
            takes="pg_collection pre_process post_process vp_stage",
            uses=("hybrid_stack_spec",),
            releases=">=0.19",
        ),
    ]


def of_cpu_layer() -> list[Seam]:
    """Return the methods that the CPU layer's classes override."""
    return [
        Seam(
            f"{_DISTRIBUTED}._set_main_param_and_optimizer_states",
            "The step of torch's Adam is left out of it.",
            takes="model_param tensors",
        ),
        Seam(f"{_DISTRIBUTED}.load_state_dict", "Steps become tensors of their own after it."),
        Seam(f"{_DISTRIBUTED}.state_dict", "Moments are made before it."),
        Seam(f"{_CALLER}._get_process", "The process is forked.", takes="rank mp_mode *"),
        Seam(f"{_CALLER}.schedule_async_call", "Tensors are copied first.", takes="async_req"),
    ]
