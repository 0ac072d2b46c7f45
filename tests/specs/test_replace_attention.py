"""Conversion of hybrid, heterogeneous and MTP specs: what shifts, what stays, what is refused."""

import copy
import json
from dataclasses import fields

import pytest
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.models.gpt.heterogeneous.heterogeneous_layer_specs import (
    get_gpt_heterogeneous_layer_spec,
)
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.ssm.gated_delta_net import GatedDeltaNet
from megatron.core.ssm.mamba_layer import MambaLayer
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.heterogeneous.heterogeneous_config import (
    HeterogeneousTransformerConfig,
)
from megatron.core.transformer.heterogeneous.linear_replacements import (
    ColumnParallelLinearGathered,
)
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.spec_utils import ModuleSpec, build_module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.model import assert_kv_shift
from kvshift_megatron.gpt_specs import convert_specs
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from kvshift_megatron.specs.replace_attention import RefusedAttention, with_kv_shift
from tests.specs.hybrid_specs import STACK, buildable, stock
from tests.support.gpt_with_mtp import gpt_with_mtp
from tests.support.single_process import gpt_model, transformer_config

KV_SHIFT = KVShiftConfig(window=3, seed=5)
# Kind of layer -> class that its refusal names. The stack of 0.17 has neither DSA nor MLA.
REFUSED = {"dsa_layer": None, "mla_layer": "MLASelfAttention"}
KINDS_REFUSED = [kind for kind in REFUSED if hasattr(getattr(stock, STACK).submodules, kind)]


@pytest.fixture
def stack(monkeypatch):
    """Replace Megatron's module global by a stack that can be built."""
    monkeypatch.setattr(stock, STACK, buildable(getattr(stock, STACK)))
    return getattr(stock, STACK)


def build_layer(spec):
    return build_module(
        spec,
        config=transformer_config(),
        layer_number=1,
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )


def test_the_attention_of_a_hybrid_stack_shifts(megatron_rank, stack):
    converted = with_kv_shift(stack, KV_SHIFT)
    spec = converted.submodules.attention_layer.submodules.self_attention
    assert spec.module is KVShiftSelfAttention
    assert spec.submodules == stack.submodules.attention_layer.submodules.self_attention.submodules
    layer = build_layer(converted.submodules.attention_layer)
    assert isinstance(layer.self_attention, KVShiftSelfAttention)
    assert layer.self_attention.kv_shift == KV_SHIFT


WITHOUT_KEYS = ["mamba_layer", "gdn_layer", "mlp_layer", "moe_layer", "mtp_block_spec"]


@pytest.mark.parametrize("kind", WITHOUT_KEYS)
def test_layers_without_attention_stay(stack, kind):
    converted = getattr(with_kv_shift(stack).submodules, kind)
    before = getattr(stack.submodules, kind)
    assert converted is not before
    # Compared as text: a partial equals only itself.
    assert repr(converted) == repr(before)


def test_kinds_of_a_hybrid_stack_are_all_known(stack):
    """Fail if a new release adds a kind of layer, which must then be looked at."""
    kinds = {field.name for field in fields(stack.submodules)}
    assert kinds == {"attention_layer", *WITHOUT_KEYS, *KINDS_REFUSED}
    assert stack.submodules.mamba_layer.module is MambaLayer


@pytest.mark.parametrize("kind", KINDS_REFUSED)
def test_layers_of_a_hybrid_stack_that_cannot_shift_cannot_be_built(megatron_rank, stack, kind):
    before = getattr(stack.submodules, kind).submodules.self_attention.module
    layer = getattr(with_kv_shift(stack).submodules, kind)
    assert layer.submodules.self_attention.module is RefusedAttention
    assert REFUSED[kind] in (None, before.__name__)
    with pytest.raises(ValueError, match=f"asks for a layer with {before.__name__},.*attention"):
        build_layer(layer)


def test_converting_does_not_change_the_module_global(stack):
    before, text = copy.deepcopy(stack), repr(stack)
    with_kv_shift(stack)
    assert getattr(stock, STACK) is stack
    assert repr(stack) == text
    assert stack.submodules.attention_layer == before.submodules.attention_layer
    assert stack.submodules.attention_layer.submodules.self_attention.module is SelfAttention


def test_a_change_of_the_module_global_does_not_reach_the_copy(stack):
    converted = with_kv_shift(stack)
    text = repr(converted)
    attention = stack.submodules.attention_layer.submodules.self_attention
    attention.params["attn_mask_type"] = "changed"
    attention.submodules.core_attention = IdentityOp
    stack.submodules.attention_layer.submodules.self_attention = ModuleSpec(IdentityOp)
    stack.submodules.mamba_layer = ModuleSpec(IdentityOp)
    assert repr(converted) == text


def test_a_stack_does_not_undo_the_refusal_of_another_spec(stack):
    with pytest.raises(ValueError, match="the spec holds MLASelfAttention"):
        with_kv_shift([ModuleSpec(MLASelfAttention), stack])


def test_a_hybrid_stack_without_an_attention_that_can_shift_is_refused(stack):
    stack.submodules.attention_layer = ModuleSpec(IdentityOp)
    with pytest.raises(ValueError, match="holds no SelfAttention"):
        with_kv_shift(stack)


BLOCKS = [
    {"attention": {"num_query_groups": 2}, "mlp": {"ffn_hidden_size": 48}},
    {
        "attention": {"no_op": True, "num_query_groups": None},
        "mlp": {"replace_with_linear": True, "ffn_hidden_size": None},
    },
    {"attention": {"num_query_groups": 4}, "mlp": {"no_op": True, "ffn_hidden_size": None}},
    {
        "attention": {"replace_with_linear": True, "num_query_groups": None},
        "mlp": {"ffn_hidden_size": 32},
    },
]


def heterogeneous_config():
    plain = transformer_config(num_layers=len(BLOCKS))
    values = {field.name: getattr(plain, field.name) for field in fields(plain) if field.init}
    return HeterogeneousTransformerConfig(
        **values, heterogeneous_layers_config_encoded_json=json.dumps({"block_configs": BLOCKS})
    )


def test_exactly_the_attention_of_a_heterogeneous_model_shifts(megatron_rank):
    config = heterogeneous_config()
    spec = get_gpt_heterogeneous_layer_spec(config, use_te=False)
    modules = [
        layer.submodules.self_attention.module
        for layer in with_kv_shift(spec, KV_SHIFT).layer_specs
    ]
    shifting, linear = KVShiftSelfAttention, ColumnParallelLinearGathered
    assert modules == [shifting, IdentityOp, shifting, linear]


def test_a_heterogeneous_model_has_as_many_taps_as_each_layer_has_groups(megatron_rank):
    config = heterogeneous_config()
    model = gpt_model(config, with_kv_shift(get_gpt_heterogeneous_layer_spec(config), KV_SHIFT))
    attentions = [layer.self_attention for layer in model.decoder.layers]
    assert [attentions[i].alpha_1.numel() for i in (0, 2)] == [2, 4]
    assert assert_kv_shift(model, KV_SHIFT) == (
        f"attention: KV shifting ({KV_SHIFT.describe()}) in layers 1, 3; 36 taps"
    )


def test_the_package_converts_a_heterogeneous_spec_by_itself(megatron_rank):
    config = heterogeneous_config()
    spec = get_gpt_heterogeneous_layer_spec(config)
    converted, _ = convert_specs(spec, None, config, KV_SHIFT)
    assert_kv_shift(gpt_model(config, converted), KV_SHIFT)


def test_the_spec_callable_builds_a_heterogeneous_model(megatron_rank):
    layers = kv_shift_layer_spec(heterogeneous_config()).layer_specs
    modules = [layer.submodules.self_attention.module for layer in layers]
    shifting, linear = KVShiftSelfAttention, ColumnParallelLinearGathered
    assert modules == [shifting, IdentityOp, shifting, linear]


@pytest.mark.parametrize("is_alone", [True, False], ids=["alone", "with a layer that shifts"])
def test_linear_attention_in_a_plain_layer_is_refused_by_name(is_alone):
    spec = get_gpt_layer_local_spec()
    spec.submodules.self_attention = ModuleSpec(GatedDeltaNet)
    specs = [spec] if is_alone else [get_gpt_layer_local_spec(), spec]
    with pytest.raises(ValueError, match="the spec holds GatedDeltaNet, which"):
        with_kv_shift(specs)


def test_every_refused_class_is_named_once():
    linear = get_gpt_layer_local_spec()
    linear.submodules.self_attention = ModuleSpec(GatedDeltaNet)
    latent = get_gpt_layer_local_spec(multi_latent_attention=True)
    with pytest.raises(ValueError, match="holds GatedDeltaNet, MLASelfAttention, which"):
        with_kv_shift([latent, linear, get_gpt_layer_local_spec(), copy.deepcopy(latent)])


def mtp_and_layers(**overrides):
    config = transformer_config(mtp_num_layers=2, num_layers=3, **overrides)
    layers = get_gpt_decoder_block_spec(config, False, normalization="RMSNorm")
    return config, layers, get_gpt_mtp_block_spec(config, layers, use_transformer_engine=False)


MOE = {"num_moe_experts": 2, "moe_layer_freq": [0, 1, 1], "moe_ffn_hidden_size": 48}


def mtp_attentions(mtp):
    return [
        layer.submodules.mtp_model_layer.submodules.self_attention.module
        for layer in mtp.layer_specs
    ]


@pytest.mark.parametrize("overrides", [{}, MOE], ids=["dense", "moe"])
def test_an_mtp_spec_of_stock_layers_shifts(megatron_rank, overrides):
    _, layers, mtp = mtp_and_layers(**overrides)
    assert mtp_attentions(mtp) == [SelfAttention] * 2
    assert mtp_attentions(with_kv_shift(mtp)) == [KVShiftSelfAttention] * 2
    assert mtp_attentions(mtp) == [SelfAttention] * 2
    assert layers.layer_specs[-1].submodules.self_attention.module is SelfAttention


@pytest.mark.parametrize("overrides", [{}, MOE], ids=["dense", "moe"])
def test_both_specs_are_converted_and_built(megatron_rank, overrides):
    config, layers, mtp = mtp_and_layers(**overrides)
    new_layers, new_mtp = convert_specs(layers, mtp, config, KV_SHIFT)
    model = gpt_with_mtp(config, new_layers, new_mtp)
    kind = f"KV shifting ({KV_SHIFT.describe()})"
    assert assert_kv_shift(model, KV_SHIFT) == (
        f"attention: {kind} in layers 1-3; {kind} in MTP layers 1-2; 60 taps"
    )
    # One stock spec of the two is enough for a refusal.
    vanilla_mtp = convert_specs(None, mtp, config, None)[1]
    with pytest.raises(ValueError, match=r"vanilla \(SelfAttention\) in MTP layers 1-2"):
        assert_kv_shift(gpt_with_mtp(config, new_layers, vanilla_mtp))


def test_missing_and_empty_specs_stay_as_they_are(megatron_rank):
    config, layers, mtp = mtp_and_layers()
    assert convert_specs(None, None, config, KV_SHIFT) == (None, None)
    assert convert_specs(layers, None, config, KV_SHIFT)[1] is None
    empty = copy.deepcopy(layers)
    empty.layer_specs = []
    assert convert_specs(empty, None, config, KV_SHIFT)[0].layer_specs == []
    assert mtp_attentions(convert_specs(empty, mtp, config, KV_SHIFT)[1]) == (
        [KVShiftSelfAttention] * 2
    )
