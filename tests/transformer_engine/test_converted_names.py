"""Names that the converter writes, against those that a Transformer Engine model asks for."""

import pytest
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert.architecture import Architecture
from kvshift_megatron.convert.extra_states import extra_states
from kvshift_megatron.convert.formats.torch_dist import split_layer
from kvshift_megatron.convert.name_map import expand
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from tests.support.fake_ranks import Layout, fake_rank
from tests.transformer_engine.models import gpt_model, transformer_config


@pytest.mark.parametrize(
    "fields",
    [{}, {"qk_layernorm": True}, {"num_moe_experts": 4, "moe_grouped_gemm": True}],
    ids=["dense", "qk-layernorm", "experts"],
)
def test_every_key_and_parameter_of_a_te_model_is_known(fields):
    with fake_rank(Layout(), 0):
        config = transformer_config(Layout(), **fields)
        model = gpt_model(config, kv_shift_layer_spec(config))
        sharded = nested_values(model.sharded_state_dict())
    asked = {
        entry.unique_key if isinstance(entry, ShardedObject) else entry.key for entry in sharded
    }
    architecture = Architecture(
        config.num_layers,
        config.hidden_size,
        config.ffn_hidden_size,
        config.num_attention_heads,
        config.num_query_groups,
        config.kv_channels,
        vocab_size=64,
        padded_vocab_size=64,
        max_position_embeddings=16,
        qk_layernorm=config.qk_layernorm,
        num_experts=config.num_moe_experts or 0,
        kv_shift=KVShiftConfig(),
    )
    names = [name for row in expand("kvshift", architecture) for name in row.megatron]
    written = {split_layer(key)[1] for name in names for key in name.written}
    assert asked - written - set(extra_states(architecture)) == set()
    experts = range(architecture.num_experts or 1)
    known = {name.te.replace("{expert}", str(expert)) for name in names for expert in experts}
    assert {name for name, _ in model.named_parameters()} == known
