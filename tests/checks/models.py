"""Small models with and without taps, of both forms."""

import re

from megatron.core.process_groups_config import ProcessGroupCollection

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec
from kvshift_megatron.specs.hybrid_pattern import attention_numbers, num_layers
from kvshift_megatron.specs.replace_attention import with_kv_shift
from kvshift_megatron.specs.te_free.hybrid_stack import local_hybrid_stack
from kvshift_megatron.specs.te_free.norm import SequenceParallelNorm
from kvshift_megatron.upstream import builder_table
from kvshift_megatron.upstream.substitutions import Applied
from tests.support.single_process import gpt_model, transformer_config

try:
    from megatron.core.models.hybrid.hybrid_model import HybridModel
except ImportError:  # before 0.18
    from megatron.core.models.mamba.mamba_model import MambaModel as HybridModel

FREE, IDENTITY = KVShiftConfig(), KVShiftConfig(init="identity")
ATTENTION = "decoder.layers.{}.self_attention."


def build(kv_shift, vocab_size=64, **overrides):
    config = transformer_config(**overrides)
    if kv_shift is None:
        return gpt_model(config, vanilla_layer_spec(config), vocab_size=vocab_size)
    spec = kv_shift_layer_spec(config, kv_shift=kv_shift)
    return gpt_model(config, spec, vocab_size=vocab_size)


def asked_for(model):
    return [key for key in model.sharded_state_dict() if re.search(r"\.(alpha|beta)_", key)]


def build_hybrid(kv_shift, pattern="*-*-", vocab_size=64, **overrides):
    """Build the hybrid model of a pattern; `*-` per layer is the model that `build` returns."""
    config = transformer_config(num_layers=num_layers(pattern), **overrides)
    stack = local_hybrid_stack(config)
    if kv_shift is not None:
        numbers = LayerSpec(attention_numbers=attention_numbers(pattern))
        stack = with_kv_shift(stack, kv_shift, numbers)
    with Applied(builder_table.local_final_norm(SequenceParallelNorm)):
        return HybridModel(
            config,
            stack,  # its keyword depends on the release
            vocab_size=vocab_size,
            max_sequence_length=16,
            hybrid_layer_pattern=pattern,
            parallel_output=True,
            share_embeddings_and_output_weights=False,
            position_embedding_type="rope",
            rotary_base=100_000,
            pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
        )
