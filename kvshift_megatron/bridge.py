"""Register KV-shifting models with Megatron-Bridge's AutoBridge, by importing this module once.

    import kvshift_megatron.bridge
    from megatron.bridge import AutoBridge

    bridge = AutoBridge.from_hf_pretrained(folder)         # written by kvshift-convert
    model = bridge.to_megatron_model(wrap_with_ddp=False)  # raises unless every layer shifts
    bridge.save_hf_pretrained(model, other_folder)

Weight names and transforms come from `convert.name_map`. Needs megatron-bridge 0.6.
"""

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
from megatron.bridge.models.conversion.mapping_registry import MegatronMappingRegistry
from megatron.bridge.models.conversion.model_bridge import MegatronModelBridge
from megatron.bridge.models.conversion.param_mapping import (
    AutoMapping,
    FusedExpertMapping,
    FusedGatedExpertMapping,
    GatedMLPMapping,
    MegatronParamMapping,
    QKVMapping,
)
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.core.models.gpt import GPTModel

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.model import ModelCheck
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.from_hf_config import architecture_from_config
from kvshift_megatron.convert.name_map import Row, rows
from kvshift_megatron.convert.transforms import GateAndUp, SeparateQKV
from kvshift_megatron.hf.configuration_kvshift import KVShiftLlamaConfig
from kvshift_megatron.layer_specs import kv_shift_layer_spec


class TapMapping(AutoMapping):
    """One tap [num_query_groups]: sharded over tensor-parallel ranks, or replicated on them."""

    def _detect_parallelism_type(self, module: KVShiftSelfAttention) -> str:
        # Bridge decides by the kind of module, but an attention holds parameters of both kinds.
        return "column" if module.taps_are_sharded else "replicated"

    def _get_or_create_mapping(self, parallelism_type: str) -> MegatronParamMapping:
        mapping = super()._get_or_create_mapping(parallelism_type)
        # Bridge takes a number at the end of a sharded parameter's name for an expert's number.
        mapping._normalize_expert_param_name = lambda name: name
        return mapping


@MegatronModelBridge.register_bridge(
    source="KVShiftLlamaForCausalLM", target=GPTModel, model_type=KVShiftLlamaConfig.model_type
)
class KVShiftLlamaBridge(MegatronModelBridge):
    """KVShiftLlamaForCausalLM <-> Megatron's GPTModel with KV-shifting attention in every layer."""

    # The model's code, saved with the folder.
    ADDITIONAL_FILE_PATTERNS = ("*_kvshift.py",)

    def provider_bridge(self, hf_pretrained: Any) -> GPTModelProvider:
        """Return the provider for a configuration; it checks every layer of the model it builds.

        Raises:
            ValueError: Megatron cannot express a field of the configuration.
        """
        architecture = self._architecture(hf_pretrained.config)
        assert architecture.kv_shift is not None  # this layout always has taps
        provider = super().provider_bridge(hf_pretrained)
        provider.normalization = "RMSNorm"
        provider.gated_linear_unit = True
        provider.add_bias_linear = architecture.add_bias_linear
        provider.add_qkv_bias = architecture.add_qkv_bias
        provider.qk_layernorm = architecture.qk_layernorm
        provider.hidden_dropout = 0.0
        provider.num_moe_experts = architecture.num_experts or None
        if architecture.num_experts:
            provider.moe_router_topk = architecture.moe_router_topk
            provider.moe_ffn_hidden_size = architecture.ffn_hidden_size
            provider.moe_grouped_gemm = True
        if architecture.rope_scaling:
            provider.rope_scaling = True
            provider.rope_scaling_factor = architecture.rope_scaling.factor
        # A partial with plain values: Bridge can write it to its YAML file.
        provider.transformer_layer_spec = partial(
            kv_shift_layer_spec, kv_shift=asdict(architecture.kv_shift)
        )
        provider.register_post_wrap_hook(ModelCheck(architecture.kv_shift))
        return provider

    def mapping_registry(self) -> MegatronMappingRegistry:
        """Return Bridge's mappings, one for every row and layer kind of the name map."""
        architecture = self._architecture(self.hf_config)
        return MegatronMappingRegistry(
            *(
                _mapping(row, megatron)
                for row in rows("kvshift", architecture)
                for megatron in dict.fromkeys((row.megatron[0].te, row.megatron[0].local))
            )
        )

    def _architecture(self, config: KVShiftLlamaConfig) -> Architecture:
        file = Path(config.name_or_path or ".") / "config.json"
        dtype = self.dtype_from_hf(config, default=torch.float32)
        return architecture_from_config(config.to_dict(), file, dtype)


def _mapping(row: Row, megatron: str) -> MegatronParamMapping:
    """Return Bridge's mapping for a row, under one of its names in Megatron."""
    megatron = megatron.replace("{layer}", "*").replace("{expert}", "*")
    hf = [name.replace("{layer}", "*") for name in row.hf]
    axes = row.megatron[0].axes
    if isinstance(row.transform, SeparateQKV):
        return QKVMapping(megatron, *hf)
    if isinstance(row.transform, GateAndUp):
        return GatedMLPMapping(megatron, *hf)
    if axes == ("groups",):
        return TapMapping(megatron, *hf)
    if axes[0] == "experts" and len(axes) == 3:
        gated = "2ffn" in axes
        return (FusedGatedExpertMapping if gated else FusedExpertMapping)(megatron, *hf)
    return AutoMapping(megatron, *hf)
