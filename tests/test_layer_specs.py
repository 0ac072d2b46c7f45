"""Conversion of every spec that Megatron builds, and refusals."""

import sys
from argparse import Namespace
from dataclasses import fields, is_dataclass
from functools import partial
from types import ModuleType

import pytest
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_decoder_block_spec,
    get_gpt_layer_local_spec,
    get_gpt_mtp_block_spec,
)
from megatron.core.transformer.attention import (
    CrossAttention,
    SelfAttention,
    SelfAttentionSubmodules,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.enums import AttnMaskType
from megatron.core.transformer.spec_utils import ModuleSpec, import_module
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_layer import TransformerLayer

from kvshift_megatron import KVShiftConfig, layer_specs
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.attention.spec_check import LayerSpec
from kvshift_megatron.layer_specs import (
    kv_shift_layer_spec,
    shifting,
    vanilla_layer_spec,
    with_kv_shift,
)
from kvshift_megatron.specs.te_free import SDPACoreAttention, SequenceParallelNorm
from tests.support import releases
from tests.support.single_process import gpt_model, transformer_config

KV_SHIFT = KVShiftConfig(window=3, seed=5)

pytestmark = pytest.mark.usefixtures("megatron_rank")


def nodes(spec):
    """Return every (path, node), depth first; a shared node once for each of its paths."""
    found = [((), spec)]
    if isinstance(spec, ModuleSpec):
        children = {"module": spec.module, "params": spec.params, "submodules": spec.submodules}
    elif is_dataclass(spec) and not isinstance(spec, type):
        children = {field.name: getattr(spec, field.name) for field in fields(spec)}
    elif isinstance(spec, list | tuple):
        children = dict(enumerate(spec))
    elif isinstance(spec, dict):
        children = spec
    elif isinstance(spec, partial):
        children = {"func": spec.func, "args": spec.args, "keywords": spec.keywords}
    else:
        children = {}
    for name, child in children.items():
        found += [((name, *path), node) for path, node in nodes(child)]
    return found


def attentions(spec):
    return [
        node
        for _, node in nodes(spec)
        if isinstance(node, ModuleSpec) and isinstance(node.submodules, SelfAttentionSubmodules)
    ]


def layer_spec():
    return get_gpt_layer_local_spec(normalization="RMSNorm")


def block_spec():
    return get_gpt_decoder_block_spec(transformer_config(num_layers=3), False)


def moe_block_spec():
    config = transformer_config(
        num_layers=4, num_moe_experts=2, moe_layer_freq=[0, 1, 0, 1], moe_ffn_hidden_size=48
    )
    return get_gpt_decoder_block_spec(config, use_transformer_engine=False)


def mtp_block_spec():
    return get_gpt_mtp_block_spec(transformer_config(mtp_num_layers=2), block_spec(), False)


@pytest.mark.parametrize(
    ("build", "count"),
    [(layer_spec, 1), (block_spec, 3), (moe_block_spec, 4), (mtp_block_spec, 2)],
)
def test_every_self_attention_is_replaced_and_the_spec_unchanged(build, count):
    spec = build()
    before = nodes(spec)
    converted = with_kv_shift(spec, KV_SHIFT)

    after = nodes(spec)
    assert [path for path, _ in after] == [path for path, _ in before]
    assert all(new is old for (_, new), (_, old) in zip(after, before, strict=True))

    old, new = attentions(spec), attentions(converted)
    assert len(old) == len(new) == count
    assert {node.module for node in old} == {SelfAttention}
    for node, original in zip(new, old, strict=True):
        assert node.module is KVShiftSelfAttention
        has_experts = node.params["layer_spec"].has_experts
        assert has_experts in (False, build is moe_block_spec)
        assert node.params == {
            "attn_mask_type": AttnMaskType.causal,
            "kv_shift": KV_SHIFT,
            "layer_spec": LayerSpec(has_experts),
        }
        assert node.submodules == original.submodules
        assert original.params == {"attn_mask_type": AttnMaskType.causal}

    # The copy shares as many nodes as the spec did.
    ids = {id(node) for _, node in nodes(converted) if node in new}
    assert len(ids) == len({id(node) for _, node in before if node in old})


def test_nothing_but_the_attention_differs():
    spec = moe_block_spec()
    converted = with_kv_shift(spec, KV_SHIFT)
    plain = dict(nodes(spec))
    different = {
        path
        for path, node in nodes(converted)
        if isinstance(node, type) and plain.get(path) is not node
    }
    assert different == {
        ("layer_specs", layer, "submodules", "self_attention", "module") for layer in range(4)
    }
    assert len({id(layer) for layer in converted.layer_specs}) == 2


def test_a_list_of_specs_is_converted():
    layer = layer_spec()
    first, second = with_kv_shift([layer, layer], KV_SHIFT)
    assert first is second is not layer
    assert first.submodules.self_attention.module is KVShiftSelfAttention


def test_multi_head_latent_attention_is_refused_by_name():
    spec = get_gpt_layer_local_spec(multi_latent_attention=True)
    with pytest.raises(ValueError, match="MLASelfAttention"):
        with_kv_shift(spec)
    with pytest.raises(ValueError, match="MLASelfAttention"):
        with_kv_shift([layer_spec(), spec])


def test_a_subclass_that_would_stay_vanilla_is_refused_by_name():
    class TheirSelfAttention(SelfAttention):
        pass

    spec = layer_spec()
    spec.submodules.self_attention.module = TheirSelfAttention
    with pytest.raises(ValueError, match="TheirSelfAttention"):
        with_kv_shift([spec, layer_spec()])


def test_cross_attention_may_stay():
    spec = layer_spec()
    spec.submodules.cross_attention = ModuleSpec(CrossAttention)
    converted = with_kv_shift(spec)
    assert converted.submodules.cross_attention.module is CrossAttention
    assert converted.submodules.self_attention.module is KVShiftSelfAttention


@pytest.mark.parametrize(
    "spec",
    [
        ModuleSpec(TransformerLayer),
        TransformerBlockSubmodules(layer_specs=[]),
        [],
        None,
        get_gpt_layer_local_spec().submodules.mlp,
    ],
)
def test_a_spec_without_attention_is_refused(spec):
    with pytest.raises(ValueError, match="holds no SelfAttention"):
        with_kv_shift(spec)


def test_converting_twice_is_refused():
    converted = with_kv_shift(block_spec())
    with pytest.raises(ValueError, match="already"):
        with_kv_shift(converted)


def gpt_model_config(transformer):
    """Return Megatron's GPTModelConfig, which proxies its transformer's fields."""
    from megatron.training.models.gpt import GPTModelConfig

    return GPTModelConfig(transformer=transformer, vocab_size=64, seq_length=16)


@pytest.mark.parametrize("normalization", ["RMSNorm", "LayerNorm"])
@pytest.mark.parametrize("wrap", [lambda config: config, gpt_model_config], ids=["core", "gpt"])
def test_local_parts(wrap, normalization):
    config = transformer_config(num_layers=3, normalization=normalization, qk_layernorm=True)
    for build, attention in (
        (partial(kv_shift_layer_spec, kv_shift=KV_SHIFT), KVShiftSelfAttention),
        (vanilla_layer_spec, SelfAttention),
    ):
        spec = build(wrap(config))
        assert isinstance(spec, TransformerBlockSubmodules)
        assert len(spec.layer_specs) == 3
        assert spec.layer_norm is SequenceParallelNorm
        for layer in (layer.submodules for layer in spec.layer_specs):
            assert layer.input_layernorm is layer.pre_mlp_layernorm is SequenceParallelNorm
            assert layer.self_attention.module is attention
            parts = layer.self_attention.submodules
            assert parts.core_attention is SDPACoreAttention
            assert parts.q_layernorm is parts.k_layernorm is SequenceParallelNorm
        everything = [node for _, node in nodes(spec)]
        assert WrappedTorchNorm not in everything and DotProductAttention not in everything
    assert spec.layer_specs[0].submodules.self_attention.params == {
        "attn_mask_type": AttnMaskType.causal
    }


def test_a_model_built_from_the_spec_shifts_in_every_layer():
    config = transformer_config(num_layers=3)
    model = gpt_model(config, kv_shift_layer_spec(config, kv_shift=KV_SHIFT))
    layers = [layer.self_attention for layer in model.decoder.layers]
    assert [type(layer) for layer in layers] == [KVShiftSelfAttention] * 3
    assert all(layer.kv_shift is KV_SHIFT or layer.kv_shift == KV_SHIFT for layer in layers)
    assert all(layer.attn_mask_type is AttnMaskType.causal for layer in layers)
    assert len({layer.alpha_1[0].item() for layer in layers}) == 3


def test_moe_layers_are_built_and_shift():
    config = transformer_config(
        num_moe_experts=2, moe_layer_freq=[0, 1], moe_ffn_hidden_size=48, num_layers=2
    )
    model = gpt_model(config, kv_shift_layer_spec(config))
    assert all(
        isinstance(layer.self_attention, KVShiftSelfAttention) for layer in model.decoder.layers
    )
    assert [type(layer.mlp).__name__ for layer in model.decoder.layers] == ["MLP", "MoELayer"]


def test_an_impossible_model_is_refused_before_anything_is_built():
    config = transformer_config()
    config.fused_single_qkv_rope = True
    with pytest.raises(ValueError, match="fused_single_qkv_rope"):
        kv_shift_layer_spec(config)
    with pytest.raises(ValueError, match="fused_single_qkv_rope"):
        kv_shift_layer_spec(gpt_model_config(config))
    vanilla_layer_spec(config)  # the baseline model has no such limit


def test_training_arguments_are_checked_if_they_are_set(monkeypatch):
    module = ModuleType("megatron.training.global_vars")
    args = Namespace(reset_attention_mask=True, context_parallel_size=1)
    module.get_args = lambda: args
    monkeypatch.setitem(sys.modules, module.__name__, module)
    with pytest.raises(ValueError, match="reset_attention_mask"):
        kv_shift_layer_spec(transformer_config())
    args.reset_attention_mask = False
    kv_shift_layer_spec(transformer_config())


@pytest.mark.parametrize(
    "blocked", ["kvshift_megatron.gpt_specs", "megatron.core.models.gpt.gpt_layer_specs"]
)
def test_an_import_error_is_not_one_that_megatron_swallows(monkeypatch, blocked):
    """Before 0.20 Megatron turns an ImportError into None, which means a vanilla model."""
    path = ("kvshift_megatron.layer_specs", "kv_shift_layer_spec")
    assert callable(import_module(path))
    monkeypatch.delitem(sys.modules, path[0])
    monkeypatch.setitem(sys.modules, blocked, None)  # importing it now fails
    with pytest.raises(RuntimeError, match=blocked) as caught:
        import_module(path)
    assert isinstance(caught.value.__cause__, ImportError)
    # This is what the ImportError itself would have led to.
    if releases.failed_import_stops():
        with pytest.raises(ImportError, match=blocked):
            import_module((blocked, "anything"))
    else:
        assert import_module((blocked, "anything")) is None


@pytest.mark.parametrize("kind", ["callable", "callable with stage", "static"])
def test_shifting_converts_the_layers_of_another_spec(kind):
    config, stages = transformer_config(), []

    def with_stage(config, vp_stage=None):
        stages.append(vp_stage)
        return block_spec()

    spec = {
        "callable": lambda config: block_spec(),
        "callable with stage": with_stage,
        "static": layer_spec(),
    }[kind]
    made = shifting(spec, {"window": 3})(config, vp_stage=1)
    model = gpt_model(config, made)
    assert all(layer.self_attention.kv_shift.window == 3 for layer in model.decoder.layers)
    assert stages == ([1] if kind == "callable with stage" else [])


def test_multi_token_prediction_alone_on_a_stage_is_refused(monkeypatch):
    monkeypatch.setattr(layer_specs, "get_mtp_num_layers_to_build", lambda *_: 1)
    empty = TransformerBlockSubmodules(layer_specs=[], layer_norm=WrappedTorchNorm)
    with pytest.raises(ValueError, match=r"mtp_num_layers=1.*keep a decoder layer"):
        shifting(lambda config: empty)(transformer_config(mtp_num_layers=1))
    assert shifting(lambda config: empty)(transformer_config()).layer_specs == []
