"""Static specs, which Megatron's --spec of 0.17 and 0.18 takes, and what they cannot see."""

import json
import re
from dataclasses import fields
from inspect import getsource, signature

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.models.gpt import gpt_layer_specs
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.spec_utils import ModuleSpec, build_module, import_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from kvshift_megatron import KVShiftConfig, assert_kv_shift, static_specs
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from kvshift_megatron.specs.te_free import SDPACoreAttention, SequenceParallelNorm
from tests.support.single_process import gpt_model, seed_everything, transformer_config

LOCAL = ["local_layer_spec", "local_qk_layernorm_layer_spec"]
NEEDING_TE = ["te_layer_spec", "te_qk_layernorm_layer_spec", "hybrid_stack_spec"]


def spec_option(name):
    """Resolve a `--spec` value as Megatron does."""
    return import_module(("kvshift_megatron.static_specs", name))


@pytest.mark.parametrize("name", LOCAL)
def test_a_static_spec_exists_at_import_as_megatron_needs_it(name):
    assert name in vars(static_specs) and name in static_specs.__doc__
    spec = spec_option(name)
    assert isinstance(spec, ModuleSpec) and spec.module is TransformerLayer
    attention = spec.submodules.self_attention
    assert attention.module is KVShiftSelfAttention
    assert attention.params["kv_shift"] == KVShiftConfig()
    assert attention.submodules.core_attention is SDPACoreAttention
    assert spec.submodules.input_layernorm is SequenceParallelNorm


@pytest.mark.parametrize("name", NEEDING_TE)
def test_specs_of_transformer_engine_can_be_built_only_with_it(megatron_rank, name):
    assert name in static_specs.__doc__
    if HAVE_TE:
        assert isinstance(spec_option(name), ModuleSpec)
        return
    # There to be found, but not to be built: Megatron takes None for a vanilla model.
    instead = "--hybrid-layer-pattern" if name.startswith("hybrid") else "local_layer_spec"
    for model in (gpt_model, lambda config, spec: build_module(spec, config=config)):
        with pytest.raises(ValueError, match=rf"{name} needs Transformer Engine.* {instead} "):
            model(transformer_config(), spec_option(name))


@pytest.mark.parametrize(("name", "qk_layernorm"), list(zip(LOCAL, (False, True))))
def test_a_model_of_a_static_spec_shifts_in_every_layer_and_runs(megatron_rank, name, qk_layernorm):
    model = gpt_model(transformer_config(qk_layernorm=qk_layernorm), spec_option(name))
    assert assert_kv_shift(model, KVShiftConfig()) == (
        "attention: KV shifting (free, window 2, keys and values) in layers 1-2; 16 taps"
    )
    for layer in model.decoder.layers:
        norm = layer.self_attention.k_layernorm
        assert isinstance(norm, torch.nn.RMSNorm) == qk_layernorm
    tokens = torch.arange(16)[None]
    loss = model(tokens, tokens, None, labels=tokens).mean()
    loss.backward()
    assert torch.isfinite(loss)
    taps = [p for n, p in model.named_parameters() if ".alpha_" in n or ".beta_" in n]
    assert len(taps) == 8 and all(tap.grad is not None for tap in taps)


# Setting -> a value that makes Megatron build another layer.
_ASKED = {
    "qk_l2_norm": True,
    "multi_latent_attention": True,
    "experimental_attention_variant": "dsa",
    "use_kitchen": True,
    "use_kitchen_attention": True,
    "num_moe_experts": 4,
    "use_te_activation_func": True,
    "use_transformer_engine_op_fuser": True,
    "use_grouped_gemm_for_dense_mlp": True,
    "transformer_impl": "inference_optimized",
    "fp8": "hybrid",
    "fp4": "e2m1",
}
_MADE_FOR_ALL = {**static_specs._SELF_ATTENTION, **static_specs._DENSE, **static_specs._LOCAL}


def heterogeneous(config):
    """Return the configuration with layers of their own."""
    block = {
        "attention": {"num_query_groups": 2, "no_op": False, "replace_with_linear": False},
        "mlp": {"ffn_hidden_size": 48, "no_op": False, "replace_with_linear": False},
    }
    encoded = json.dumps({"block_configs": [block] * config.num_layers})
    names = {f.name for f in fields(config) if f.init}
    given = {name: getattr(config, name) for name in names}
    return HeterogeneousTransformerConfig(**given, heterogeneous_layers_config_encoded_json=encoded)


@pytest.mark.parametrize("setting", [*_MADE_FOR_ALL, "qk_layernorm"])
@pytest.mark.parametrize("name", LOCAL)
def test_a_setting_that_the_spec_does_not_honour_is_refused(megatron_rank, name, setting):
    config = transformer_config(qk_layernorm="qk" in name)
    if setting == "heterogeneous_block_specs":
        config = heterogeneous(config)
    # Not in the constructor: releases refuse some values, or lack the setting.
    elif setting == "qk_layernorm":
        config.qk_layernorm = not config.qk_layernorm
    else:
        setattr(config, setting, _ASKED[setting])
    with pytest.raises(ValueError, match=setting) as caught:
        gpt_model(config, spec_option(name))
    if setting not in ("multi_latent_attention", "experimental_attention_variant"):
        # These two are refused for every spec.
        assert name in str(caught.value) and "kv_shift_layer_spec" in str(caught.value)


def _functions_of_megatron():
    functions = [
        gpt_layer_specs.get_gpt_decoder_layer_specs,
        gpt_layer_specs.get_gpt_decoder_block_spec,
    ]
    try:
        from megatron.training.models import gpt
    except ImportError:  # before 0.19
        return functions
    return [*functions, gpt.default_layer_spec, gpt._te_or_local_layer_spec]


# What else Megatron's functions read, and why a static spec honours it.
_HONOURED = {
    "num_layers": "the block repeats the layer",
    "normalization": "the norms read it themselves",
    "pipeline_model_parallel_layout": "the block reads it",
    "moe_layer_freq": "means nothing without experts",
    "moe_grouped_gemm": "means nothing without experts",
    "moe_use_legacy_grouped_gemm": "means nothing without experts",
    "kitchen_attention_backend": "means nothing without use_kitchen_attention",
    "mla_down_proj_fusion": "means nothing without multi_latent_attention",
    # Of GPTModelConfig, for ModelOpt, which restores its own layers.
    "restore_modelopt_state": "Megatron's --spec goes before it",
    "use_arbitrary_attention_mask": "means nothing without restore_modelopt_state",
    "transformer": "not a setting",
}
# Parameters of get_gpt_layer_*_spec that are not named like their setting.
_PARAMETERS = {
    "num_experts": "num_moe_experts",
    "use_te_op_fuser": "use_transformer_engine_op_fuser",
    "fp8": "fp8",
}


def test_every_setting_that_megatron_turns_into_a_spec_is_known():
    """A new release may have another; a hole in the table is noticed."""
    read = set()
    for function in _functions_of_megatron():
        read |= set(re.findall(r"\b(?:config|transformer_cfg)\.([a-z]\w+)", getsource(function)))
    for function in (
        gpt_layer_specs.get_gpt_layer_local_spec,
        gpt_layer_specs.get_gpt_layer_with_transformer_engine_spec,
        gpt_layer_specs.get_gpt_layer_with_inference_spec,
    ):
        read |= {_PARAMETERS.get(name, name) for name in signature(function).parameters}
    read -= {"args", "kwargs"}
    assert {"num_moe_experts", "qk_l2_norm", "use_kitchen"} <= read
    assert read - {"qk_layernorm"} - _MADE_FOR_ALL.keys() == _HONOURED.keys() & read


@pytest.mark.parametrize(
    "settings",
    [
        {"attention_output_gate": True},
        {"window_size": (4, 0), "window_attn_skip_freq": 2},
        {"no_rope_freq": [1, 0]},
        {"softmax_scale": 0.3},
        {"normalization": "LayerNorm"},
        {"add_qkv_bias": True},
        {"qk_layernorm": True},
    ],
    ids=lambda settings: next(iter(settings)),
)
def test_what_the_spec_honours_gives_the_model_of_the_callable(megatron_rank, settings):
    config = transformer_config(**settings)
    tokens = torch.arange(16)[None]
    losses = []
    name = "local_qk_layernorm_layer_spec" if config.qk_layernorm else "local_layer_spec"
    for spec in (spec_option(name), kv_shift_layer_spec(config), spec_option(name)):
        is_plain = len(losses) == 2
        seed_everything()
        model = gpt_model(transformer_config(qk_layernorm=config.qk_layernorm) if is_plain
                          else config, spec)  # fmt: skip
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(0.3 * torch.randn(parameter.shape))
        losses.append(model(tokens, tokens, None, labels=tokens).detach())
    assert torch.equal(losses[0], losses[1])
    if not config.qk_layernorm:
        # The setting changes something at all.
        assert not torch.equal(losses[0], losses[2])


@pytest.mark.parametrize("name", LOCAL)
def test_two_models_of_one_static_spec_share_nothing(megatron_rank, name):
    spec = spec_option(name)
    before = repr(spec)
    config = transformer_config(qk_layernorm="qk" in name)
    first, second = gpt_model(config, spec), gpt_model(config, spec)
    assert spec_option(name) is spec and repr(spec) == before
    names = dict(first.named_parameters())
    assert names.keys() == dict(second.named_parameters()).keys()
    storages = [{p.data_ptr() for p in model.parameters()} for model in (first, second)]
    assert not storages[0] & storages[1]
    tap, other = (model.decoder.layers[0].self_attention.alpha_1 for model in (first, second))
    assert torch.equal(tap, other)
    with torch.no_grad():
        tap += 1
    assert not torch.equal(tap, other)
    assert_kv_shift([second], KVShiftConfig())
