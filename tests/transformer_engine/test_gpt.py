"""GPT models of every kind, built from stock Megatron's spec and from the converted one."""

import pytest
import transformer_engine.pytorch
from megatron.core.extensions.transformer_engine import (
    TEDotProductAttention,
    TELayerNormColumnParallelLinear,
    TERowParallelLinear,
)
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_with_transformer_engine_spec,
    get_gpt_mtp_block_spec,
)

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.layer_specs import kv_shift_layer_spec, with_kv_shift
from tests.support.fake_ranks import Layout, fake_rank
from tests.transformer_engine.against_stock import differences, tap_problems
from tests.transformer_engine.models import NUM_LAYERS, gpt_model, transformer_config

_EXPERTS = {"num_moe_experts": 8, "moe_ffn_hidden_size": 128, "moe_router_topk": 2}
_GROUPED = {**_EXPERTS, "moe_grouped_gemm": True}
KINDS = {
    "dense": {},
    "bias-and-layernorm": {"add_bias_linear": True, "normalization": "LayerNorm"},
    "qk-layernorm": {"qk_layernorm": True},
    "output-gate": {"attention_output_gate": True},
    "grouped-experts": _GROUPED,
    "sequential-experts": _EXPERTS,
    "shared-experts": {**_GROUPED, "moe_shared_expert_intermediate_size": 128},
    "experts-in-some-layers": {**_GROUPED, "moe_layer_freq": [0, 1, 0, 1]},
}
# Layout, rank (first or last) and num_query_groups (equal to TP, fewer or more).
PLACES = {
    "tp1": (Layout(), 0, 8),
    "tp8-first": (Layout(tp=8), 0, 8),
    "tp8-last": (Layout(tp=8), 7, 8),
    "tp8-4groups-first": (Layout(tp=8), 0, 4),
    "tp8-4groups-last": (Layout(tp=8), 7, 4),
    "tp8-16groups-last": (Layout(tp=8), 7, 16),
    "tp8-pp2-first": (Layout(tp=8, pp=2), 0, 8),
    "tp8-pp2-4groups-last": (Layout(tp=8, pp=2), 15, 4),
}


def stock_spec(config):
    return get_gpt_decoder_block_spec(
        config, use_transformer_engine=True, normalization=config.normalization
    )


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_only_taps_are_added_to_stock_megatron(kind, place, device):
    layout, rank, groups = PLACES[place]
    with fake_rank(layout, rank):
        config = transformer_config(layout, device, num_query_groups=groups, **KINDS[kind])
        ours = gpt_model(config, kv_shift_layer_spec(config), device=device)
        stock = gpt_model(config, stock_spec(config), device=device)
        assert differences(ours, stock) == []
        assert tap_problems(ours, layout.tp) == []
        assert len(ours.decoder.layers) == NUM_LAYERS // layout.pp


def test_attention_is_made_of_transformer_engine_parts():
    with fake_rank(Layout(tp=8), 0):
        config = transformer_config(Layout(tp=8), qk_layernorm=True)
        model = gpt_model(config, kv_shift_layer_spec(config))
    for layer in model.decoder.layers:
        attention = layer.self_attention
        assert type(attention) is KVShiftSelfAttention
        assert type(attention.linear_qkv) is TELayerNormColumnParallelLinear
        assert type(attention.core_attention) is TEDotProductAttention
        assert type(attention.linear_proj) is TERowParallelLinear
        for norm in (attention.q_layernorm, attention.k_layernorm):
            assert isinstance(norm, transformer_engine.pytorch.RMSNorm)


def test_a_single_layer_spec_is_converted_too():
    stock = get_gpt_layer_with_transformer_engine_spec()
    with fake_rank(Layout(tp=8), 7):
        config = transformer_config(Layout(tp=8))
        ours = gpt_model(config, with_kv_shift(stock))
        assert differences(ours, gpt_model(config, stock)) == []


@pytest.mark.parametrize("kind", ["dense", "grouped-experts"])
@pytest.mark.parametrize(
    "place", ["tp1", "tp8-last", "tp8-4groups-last", "tp8-pp2-first", "tp8-pp2-4groups-last"]
)
def test_multi_token_prediction_made_from_converted_specs_shifts(kind, place):
    layout, rank, groups = PLACES[place]
    with fake_rank(layout, rank):
        config = transformer_config(
            layout, num_query_groups=groups, mtp_num_layers=2, **KINDS[kind]
        )
        spec = stock_spec(config)
        ours, stock = (
            gpt_model(config, s, get_gpt_mtp_block_spec(config, s, use_transformer_engine=True))
            for s in (with_kv_shift(spec), spec)
        )
        assert differences(ours, stock) == []
        assert tap_problems(ours, layout.tp) == []
        has_mtp = rank // layout.tp == layout.pp - 1
        shifting = [m for m in ours.modules() if isinstance(m, KVShiftSelfAttention)]
        assert len(shifting) == NUM_LAYERS // layout.pp + 2 * has_mtp
