"""A layer's spec against the configuration, whichever way the spec came in."""

import pytest
import torch
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.torch_norm import L2Norm

from kvshift_megatron import KVShiftConfig, assert_kv_shift
from kvshift_megatron.attention.spec_check import experts_asked
from kvshift_megatron.gpt_specs import convert_specs
from kvshift_megatron.layer_specs import (
    kv_shift_layer_spec,
    shifting,
    vanilla_layer_spec,
    with_kv_shift,
)
from tests.support.gpt_with_mtp import gpt_with_mtp
from tests.support.single_process import gpt_model, seed_everything, transformer_config

EXPERTS = {"num_moe_experts": 4, "moe_ffn_hidden_size": 16}


def _local(**settings):
    return get_gpt_layer_local_spec(normalization="RMSNorm", **settings)


@pytest.mark.parametrize("way", [with_kv_shift, lambda spec: shifting(spec)(_config())])
def test_a_dense_layer_under_experts_is_refused(megatron_rank, way):
    with pytest.raises(
        ValueError, match=r"num_moe_experts=4 .* experts in layer 1.* has an MLP.*--num-experts"
    ):
        gpt_model(_config(), way(_local()))


def _config(**settings):
    return transformer_config(**{**EXPERTS, **settings})


def test_experts_that_nobody_asked_for_are_refused(megatron_rank):
    with pytest.raises(ValueError, match=r"an MLP in layer 1, but its spec has experts"):
        gpt_model(transformer_config(), with_kv_shift(_local(num_experts=4)))


def test_the_pattern_of_another_model_is_refused(megatron_rank):
    made_for, config = _config(moe_layer_freq=[1, 0]), _config(moe_layer_freq=[0, 1])
    block = get_gpt_decoder_block_spec(made_for, False, normalization="RMSNorm")
    assert_kv_shift(gpt_model(made_for, with_kv_shift(block)), KVShiftConfig())
    with pytest.raises(ValueError, match=r"moe_layer_freq=\[0, 1\] ask for an MLP in layer 1"):
        gpt_model(config, with_kv_shift(block))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"num_moe_experts": None}, [{False}, {False}, {False}, {False}]),
        ({"moe_layer_freq": 1}, [{True}, {True}, {True}, {True}]),
        ({"moe_layer_freq": 3}, [{True}, {False}, {False}, {True}]),
        ({"moe_layer_freq": [0, 1, 1, 0]}, [{False}, {True}, {True}, {False}]),
        # Layer 1 may be the one of multi-token prediction, which is like the last.
        ({"moe_layer_freq": [0, 1, 0, 1], "mtp_num_layers": 1}, [{False, True}, {True}]),
    ],
)
def test_experts_by_the_pattern_of_megatron(settings, expected):
    config = _config(num_layers=4)
    for name, value in settings.items():
        setattr(config, name, value)
    assert [experts_asked(config, n + 1) for n in range(len(expected))] == expected


def test_multi_token_prediction_has_the_layer_of_the_last(megatron_rank):
    config = _config(moe_layer_freq=[0, 1], mtp_num_layers=1)
    block = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    mtp = get_gpt_mtp_block_spec(config, block, use_transformer_engine=False)
    model = gpt_with_mtp(config, *convert_specs(block, mtp, config, KVShiftConfig()))
    assert "MTP layer 1" in assert_kv_shift(model, KVShiftConfig())


def test_a_dropped_multi_token_prediction_is_noticed(megatron_rank):
    config = transformer_config(mtp_num_layers=1)
    model = gpt_model(config, with_kv_shift(_local()))
    with pytest.raises(ValueError, match=r"mtp_num_layers=1, but .* mtp_block_spec"):
        assert_kv_shift(model, KVShiftConfig())


@pytest.mark.parametrize(
    ("settings", "spec", "message"),
    [
        ({"qk_layernorm": True}, {}, "qk_layernorm is on, but .* has no norm"),
        ({"qk_l2_norm": True}, {}, "qk_l2_norm is on, but .* has no norm"),
        ({"qk_l2_norm": True}, {"qk_layernorm": True}, "qk_l2_norm is on, but .* by RMSNorm"),
        ({"qk_layernorm": True}, {"qk_l2_norm": True}, "qk_layernorm is on, but .* by L2Norm"),
        # From 0.18 on Megatron refuses these two itself.
        ({}, {"qk_layernorm": True}, "q_layernorm|neither qk_layernorm"),
        ({}, {"qk_l2_norm": True}, "q_layernorm|neither qk_layernorm"),
    ],
)
def test_another_norm_of_queries_and_keys_is_refused(megatron_rank, settings, spec, message):
    with pytest.raises(ValueError, match=message):
        gpt_model(transformer_config(**settings), with_kv_shift(_local(**spec)))


@pytest.mark.parametrize("spec", [kv_shift_layer_spec, vanilla_layer_spec])
@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_the_l2_norm_is_built_without_transformer_engine(megatron_rank, spec, experts):
    config = transformer_config(qk_l2_norm=True, **experts)
    model = gpt_model(config, spec(config))
    for layer in model.decoder.layers:
        query = layer.self_attention.get_query_key_value_tensors(torch.randn(16, 1, 32))[0]
        assert isinstance(layer.self_attention.k_layernorm, L2Norm)
        # Of length sqrt(kv_channels).
        assert torch.allclose(query.square().mean(-1), torch.ones(()), atol=0.01)


@pytest.mark.parametrize("softmax_type", ["off-by-one", "learnable"])
def test_a_softmax_with_a_sink_trains_without_transformer_engine(megatron_rank, softmax_type):
    """Against Megatron's own model; identity taps leave it as it is."""
    config = transformer_config(softmax_type=softmax_type, init_method_std=0.5)
    block = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    identity = {"init": "identity"}
    tokens = torch.arange(16)[None]
    losses = []
    for spec in (
        block,
        kv_shift_layer_spec(config, kv_shift=identity),
        kv_shift_layer_spec(config),
        kv_shift_layer_spec(transformer_config(), kv_shift=identity),
    ):
        seed_everything()
        model = gpt_model(transformer_config() if len(losses) == 3 else config, spec)
        loss = model(tokens, tokens, None, labels=tokens).mean()
        loss.backward()
        losses.append(loss.detach())
    assert torch.allclose(losses[0], losses[1], rtol=1e-6)
    assert not torch.allclose(losses[0], losses[2], rtol=1e-6)
    if softmax_type == "off-by-one":
        assert not torch.allclose(losses[0], losses[3], rtol=1e-6)


def test_a_softmax_with_a_sink_refuses_context_parallelism():
    config = transformer_config(softmax_type="learnable")
    config.context_parallel_size = 2
    with pytest.raises(ValueError, match=r"softmax_type='learnable' with context_parallel_size=2"):
        kv_shift_layer_spec(config)
