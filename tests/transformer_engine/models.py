"""Small models with Transformer Engine layers, of any spec."""

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig

from tests.support.fake_ranks import Layout, constructing_on

NUM_LAYERS = 4
_HIDDEN = 256
_VOCABULARY = 512
_SEQUENCE = 64


def transformer_config(
    layout: Layout, device: str = "meta", config_class: type = TransformerConfig, **overrides: Any
) -> TransformerConfig:
    """Configure a bf16 GPT with Transformer Engine layers, RMSNorm and SwiGLU, sized for TP 8.

    Args:
        layout: Gives the degrees of parallelism; sequence parallelism is on with TP.
        device: "meta" or "cpu".
        config_class: TransformerConfig or a subclass.
        **overrides: Fields of `config_class`.
    """
    fields = {
        "num_layers": NUM_LAYERS,
        "hidden_size": _HIDDEN,
        "ffn_hidden_size": 512,
        "num_attention_heads": 16,
        "num_query_groups": 8,
        "kv_channels": 16,
        "normalization": "RMSNorm",
        "gated_linear_unit": True,
        "activation_func": torch.nn.functional.silu,
        "add_bias_linear": False,
        "bf16": True,
        "params_dtype": torch.bfloat16,
        "pipeline_dtype": torch.bfloat16,
        "tensor_model_parallel_size": layout.tp,
        "pipeline_model_parallel_size": layout.pp,
        "virtual_pipeline_model_parallel_size": layout.vp,
        "sequence_parallel": layout.tp > 1,
        "transformer_impl": "transformer_engine",
        "perform_initialization": False,
        "init_model_with_meta_device": device == "meta",
        "use_cpu_initialization": device == "cpu",
    }
    return config_class(**{**fields, **overrides})


def gpt_model(
    config: TransformerConfig,
    spec: Any,
    mtp_spec: Any = None,
    *,
    device: str = "meta",
    vp_stage: int | None = None,
) -> GPTModel:
    """Build this rank's part of a GPTModel with RoPE."""
    with constructing_on(device):
        return GPTModel(
            config=config,
            transformer_layer_spec=spec,
            mtp_block_spec=mtp_spec,
            vocab_size=_VOCABULARY,
            max_sequence_length=_SEQUENCE,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=False,
            vp_stage=vp_stage,
            **_pipeline_ends(vp_stage),
        )


def hybrid_model(
    config: TransformerConfig, spec: Any, pattern: str, *, device: str = "meta"
) -> HybridModel:
    """Build a HybridModel with the layers of `pattern` (* attention, - MLP, E experts)."""
    with constructing_on(device):
        return HybridModel(
            config=config,
            hybrid_stack_spec=spec,
            hybrid_layer_pattern=pattern,
            vocab_size=_VOCABULARY,
            max_sequence_length=_SEQUENCE,
            position_embedding_type="rope",
            **_pipeline_ends(),
        )


def _pipeline_ends(vp_stage: int | None = None) -> dict[str, Any]:
    return {
        "pre_process": parallel_state.is_pipeline_first_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        "post_process": parallel_state.is_pipeline_last_stage(
            ignore_virtual=vp_stage is None, vp_stage=vp_stage
        ),
        "pg_collection": ProcessGroupCollection.use_mpu_process_groups(),
    }
