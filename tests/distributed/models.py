"""Build one model chunk of a case: a GPT of any kind, or a hybrid stack."""

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
    get_gpt_heterogeneous_layer_spec,
)
from megatron.core.transformer.transformer_config import TransformerConfig

from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.gpt_specs import convert_specs
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec
from kvshift_megatron.specs.hybrid_pattern import attention_numbers
from kvshift_megatron.specs.te_free import SequenceParallelNorm
from kvshift_megatron.specs.te_free.hybrid_stack import local_hybrid_stack
from kvshift_megatron.upstream import builder_table
from kvshift_megatron.upstream.substitutions import Applied
from tests.distributed.cases import Case

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # before 0.18
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel

VOCAB_SIZE = 64
# A planted error of the model itself: multi-token prediction with Megatron's own spec.
MTP_NOT_CONVERTED = "mtp_spec_not_converted"


def chunk(case: Case, config: TransformerConfig, vp_stage: int | None) -> torch.nn.Module:
    """Build one chunk of this rank, with weights of Megatron's own initialization."""
    arguments = dict(
        config=config,
        vocab_size=VOCAB_SIZE,
        max_sequence_length=case.model.seq_length,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=False,
        position_embedding_type="rope",
        rotary_base=100_000,
        vp_stage=vp_stage,
    )
    if case.model.hybrid:
        return _hybrid(case, arguments)
    layer_spec, mtp_spec = _specs(case, config, vp_stage)
    return GPTModel(transformer_layer_spec=layer_spec, mtp_block_spec=mtp_spec, **arguments)


def _specs(case: Case, config: TransformerConfig, vp_stage: int | None) -> tuple:
    kv_shift, extra = case.model.kv_shift, None
    if config.mtp_num_layers or config.heterogeneous_block_specs:
        stock = _stock_specs(config, vp_stage)
        layer_spec, extra = convert_specs(*stock, config, kv_shift, vp_stage)
        if case.planted_error == MTP_NOT_CONVERTED:
            extra = convert_specs(*stock, config, None, vp_stage)[1]
    elif kv_shift is None:
        layer_spec = vanilla_layer_spec(config, vp_stage)
    else:
        layer_spec = kv_shift_layer_spec(config, vp_stage, kv_shift=kv_shift)
    return layer_spec, extra


def _stock_specs(config: TransformerConfig, vp_stage: int | None) -> tuple:
    """Return the specs that Megatron's own model builder would use."""
    if config.heterogeneous_block_specs:
        return get_gpt_heterogeneous_layer_spec(config, use_te=False, vp_stage=vp_stage), None
    block = get_gpt_decoder_block_spec(
        config, use_transformer_engine=False, normalization="RMSNorm", vp_stage=vp_stage
    )
    # A stage without decoder layers may have multi-token prediction.
    last = block if block.layer_specs else get_gpt_layer_local_spec(normalization="RMSNorm")
    return block, get_gpt_mtp_block_spec(config, last, False, vp_stage=vp_stage)


def _hybrid(case: Case, arguments: dict) -> torch.nn.Module:
    """Build attention and MLP layers: Mamba's need a GPU, and Megatron's hybrid spec needs TE."""
    config, pattern = arguments.pop("config"), ("|" if case.pp > 1 else "").join(case.model.hybrid)
    static = LayerSpec(attention_numbers=attention_numbers(pattern))
    stack = local_hybrid_stack(config)
    spec, _ = convert_specs(stack, None, config, case.model.kv_shift, static=static)
    with Applied(builder_table.local_final_norm(SequenceParallelNorm)):
        return HybridModel(config, spec, hybrid_layer_pattern=pattern, **arguments)
