"""Static specs, which Megatron's --spec of 0.17 and 0.18 takes, and what they cannot see."""

import pytest
import torch
from megatron.core.extensions.transformer_engine import HAVE_TE
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.transformer_layer import TransformerLayer

from kvshift_megatron import KVShiftConfig, assert_kv_shift, static_specs
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.specs.te_free import SDPACoreAttention, SequenceParallelNorm
from tests.support.single_process import gpt_model, transformer_config

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
def test_specs_of_transformer_engine_exist_only_with_it(name):
    assert name in static_specs.__doc__
    if HAVE_TE:
        assert isinstance(spec_option(name), ModuleSpec)
    else:
        # An error, not None, which would mean a vanilla model.
        with pytest.raises(KeyError, match=name):
            spec_option(name)


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


def test_a_missing_qk_layernorm_is_refused(megatron_rank):
    config = transformer_config(qk_layernorm=True)
    with pytest.raises(ValueError, match=r"qk_layernorm is on.*static_specs has both.*or drop"):
        gpt_model(config, static_specs.local_layer_spec)


def test_a_norm_that_was_not_asked_for_is_not_built_unless_megatron_does(megatron_rank):
    """From 0.18 on Megatron refuses it; 0.17 follows the spec."""
    config = transformer_config(qk_layernorm=False)
    try:
        model = gpt_model(config, static_specs.local_qk_layernorm_layer_spec)
    except ValueError as error:
        assert "q_layernorm" in str(error)
    else:
        assert isinstance(model.decoder.layers[0].self_attention.q_layernorm, torch.nn.RMSNorm)


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
