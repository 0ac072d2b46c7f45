"""Heterogeneous models, with layers of different numbers of query groups or without attention."""

import json

import pytest
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
    get_gpt_heterogeneous_layer_spec,
)
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.layer_specs import with_kv_shift
from tests.support.fake_ranks import Layout, fake_rank
from tests.transformer_engine.against_stock import differences, tap_problems
from tests.transformer_engine.models import gpt_model, transformer_config

_BLOCKS = [
    {"attention": {"num_query_groups": 8}, "mlp": {"ffn_hidden_size": 512}},
    {"attention": {"num_query_groups": 4}, "mlp": {"no_op": True, "ffn_hidden_size": None}},
    {
        "attention": {"no_op": True, "num_query_groups": None},
        "mlp": {"replace_with_linear": True, "ffn_hidden_size": None},
    },
    {
        "attention": {"replace_with_linear": True, "num_query_groups": None},
        "mlp": {"ffn_hidden_size": 256},
    },
]


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("layout", "rank"), [(Layout(), 0), (Layout(tp=8), 0), (Layout(tp=8), 7)])
def test_every_attention_shifts_with_its_own_number_of_groups(layout, rank, device):
    with fake_rank(layout, rank):
        config = transformer_config(
            layout,
            device,
            config_class=HeterogeneousTransformerConfig,
            heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": _BLOCKS}),
        )
        spec = get_gpt_heterogeneous_layer_spec(config, use_te=True)
        ours = gpt_model(config, with_kv_shift(spec), device=device)
        assert differences(ours, gpt_model(config, spec, device=device)) == []
        assert tap_problems(ours, layout.tp) == []
    groups = [
        layer.self_attention.config.num_query_groups
        for layer in ours.decoder.layers
        if isinstance(layer.self_attention, KVShiftSelfAttention)
    ]
    assert groups == [8, 4]
