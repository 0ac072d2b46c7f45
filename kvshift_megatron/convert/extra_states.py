"""What layers ask a checkpoint for besides their weights."""

from kvshift_megatron.checks.model_forms import Form
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.form_keys import HYBRID_ONLY, named, things


def extra_states(architecture: Architecture, form: Form = "gpt") -> list[str]:
    """Return the keys under which layers ask a checkpoint for a state besides their weights.

    Transformer Engine keeps FP8 scales there, and TE-free linear layers keep nothing, but neither
    loads without the key. Keys that no layer asks for are ignored.
    """
    keys = _gpt_extra_states(architecture)
    if form == "gpt":
        return keys
    renamed = (thing for key in keys for _, thing in things(key, None, "gpt"))
    return [*(named(thing, form, None, True).key for thing in renamed), HYBRID_ONLY]


def _gpt_extra_states(architecture: Architecture) -> list[str]:
    arch = architecture
    modules = ["self_attention.linear_qkv", "self_attention.linear_proj"]
    modules.append("self_attention.core_attention")
    if arch.qk_layernorm:
        modules += ["self_attention.q_layernorm", "self_attention.k_layernorm"]
    linears = ("linear_fc1", "linear_fc2")
    if arch.num_experts:
        modules.append("pre_mlp_layernorm")
    else:
        modules += [f"mlp.{linear}" for linear in linears]
    keys = [
        f"decoder.layers.{module}._extra_state/shard_{layer}_{arch.num_layers}"
        for layer in range(arch.num_layers)
        for module in modules
    ]
    keys += [
        f"decoder.layers.mlp.experts.experts.{linear}._extra_state/"
        f"shard_{layer}.{expert}_{arch.num_layers}.{arch.num_experts}"
        for layer in range(arch.num_layers)
        for expert in range(arch.num_experts)
        for linear in linears
    ]
    return [*keys, "decoder.final_layernorm._extra_state/shard_0_1"]
