"""Megatron-Bridge: `provider.transformer_layer_spec = kv_shift_layer_spec`."""

from functools import partial

import pytest
import yaml
from megatron.bridge import AutoBridge
from megatron.bridge.models.gpt_provider import GPTModelProvider
from megatron.bridge.utils.instantiate_utils import instantiate, register_allowed_target_prefix
from megatron.bridge.utils.yaml_utils import safe_yaml_representers
from megatron.core.transformer.enums import AttnBackend
from transformers import LlamaConfig, Qwen3MoeConfig

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.model import ModelCheck, assert_kv_shift
from kvshift_megatron.layer_specs import kv_shift_layer_spec, shifting
from kvshift_megatron.specs.te_free import SDPACoreAttention
from tests.support.fake_ranks import Layout, constructing_on, fake_rank
from tests.transformer_engine.against_stock import differences, tap_problems
from tests.transformer_engine.models import NUM_LAYERS, transformer_config

_EXPERTS = {"num_moe_experts": 8, "moe_ffn_hidden_size": 128, "moe_grouped_gemm": True}
KINDS = {
    "dense": {},
    "experts": _EXPERTS,
    "norm-and-gate": {"qk_layernorm": True, "attention_output_gate": True},
}


def provider(layout, **overrides) -> GPTModelProvider:
    fields = {
        "vocab_size": 512,
        "seq_length": 64,
        "position_embedding_type": "rope",
        "share_embeddings_and_output_weights": False,
        # Off: its kernels need a GPU's libraries even to be constructed.
        "gradient_accumulation_fusion": False,
    }
    return transformer_config(layout, config_class=GPTModelProvider, **{**fields, **overrides})


def build(provider, spec=None):
    """Build Bridge's model chunks of this rank, not wrapped, with `spec` or the provider's own."""
    if spec is not None:
        provider.transformer_layer_spec = spec
    provider.finalize()
    with constructing_on("meta"):
        return provider.provide_distributed_model(
            wrap_with_ddp=False, mixed_precision_wrapper=None, init_model_with_meta_device=True
        )


def shifting_layers(model):
    return [m for m in model.modules() if isinstance(m, KVShiftSelfAttention)]


@pytest.mark.parametrize(
    ("layout", "rank"),
    [(Layout(), 0), (Layout(tp=8), 7), (Layout(tp=8, pp=2), 15)],
    ids=["tp1", "tp8", "tp8-pp2"],
)
@pytest.mark.parametrize("kind", KINDS)
def test_a_provider_builds_its_own_model_with_taps(kind, layout, rank):
    with fake_rank(layout, rank):
        (ours,) = build(provider(layout, **KINDS[kind]), kv_shift_layer_spec)
        (stock,) = build(provider(layout, **KINDS[kind]))
        assert differences(ours, stock) == []
        assert tap_problems(ours, layout.tp) == []
        assert len(shifting_layers(ours)) == NUM_LAYERS // layout.pp


@pytest.mark.parametrize(
    "hf_config",
    [
        LlamaConfig(architectures=["LlamaForCausalLM"]),
        Qwen3MoeConfig(
            architectures=["Qwen3MoeForCausalLM"], num_experts=8, moe_intermediate_size=128
        ),
    ],
    ids=["llama", "qwen3-moe"],
)
def test_a_provider_made_from_a_hugging_face_configuration(hf_config):
    hf_config.update(
        {
            "hidden_size": 256,
            "intermediate_size": 512,
            "num_hidden_layers": NUM_LAYERS,
            "num_attention_heads": 16,
            "num_key_value_heads": 4,
            "head_dim": 16,
            "vocab_size": 512,
        }
    )
    layout = Layout(tp=8)

    def hf_provider():
        made = AutoBridge.from_hf_config(hf_config).to_megatron_provider(load_weights=False)
        made.tensor_model_parallel_size, made.sequence_parallel = layout.tp, True
        made.gradient_accumulation_fusion = made.perform_initialization = False
        # Megatron's default dispatcher makes a tensor on the GPU when it is constructed.
        made.moe_token_dispatcher_type = "allgather"
        return made

    with fake_rank(layout, 7):
        (ours,) = build(hf_provider(), kv_shift_layer_spec)
        (stock,) = build(hf_provider())
        assert differences(ours, stock) == []
        assert tap_problems(ours, layout.tp) == []
        assert len(shifting_layers(ours)) == NUM_LAYERS


def test_chosen_taps_reach_every_virtual_stage():
    layout, kv_shift = Layout(tp=8, pp=2, vp=2), KVShiftConfig(window=3, init="identity")
    with fake_rank(layout, 15):
        chunks = build(provider(layout), partial(kv_shift_layer_spec, kv_shift=kv_shift))
    assert [[m.kv_shift for m in shifting_layers(chunk)] for chunk in chunks] == [
        [kv_shift],
        [kv_shift],
    ]
    assert [[m.layer_number for m in shifting_layers(chunk)] for chunk in chunks] == [[2], [4]]


@pytest.mark.parametrize("kind", ["dense", "experts"])
def test_multi_token_prediction_shifts_too(kind):
    layout = Layout(tp=8, pp=2)
    with fake_rank(layout, 15):
        (model,) = build(provider(layout, mtp_num_layers=2, **KINDS[kind]), kv_shift_layer_spec)
        assert len(shifting_layers(model.mtp)) == 2
        assert len(shifting_layers(model.decoder)) == NUM_LAYERS // 2


def test_multi_token_prediction_alone_on_a_stage_is_not_silently_vanilla():
    """Bridge uses Megatron's own layer spec there, whatever the provider's is."""
    layout = [["embedding", *["decoder"] * NUM_LAYERS], ["mtp", "loss"]]
    # Refused by the spec function, or by the check of the built model.
    refusal = pytest.raises(ValueError, match=r"MTP|mtp_num_layers")
    with fake_rank(Layout(pp=2), 1), refusal:
        made = provider(Layout(pp=2), mtp_num_layers=1, pipeline_model_parallel_layout=layout)
        assert_kv_shift(build(made, kv_shift_layer_spec))


def test_without_transformer_engine_the_te_free_layer_is_built():
    with fake_rank(Layout(), 0):
        (model,) = build(provider(Layout(), transformer_impl="local"), kv_shift_layer_spec)
        assert len(shifting_layers(model)) == NUM_LAYERS
        assert all(type(m.core_attention) is SDPACoreAttention for m in shifting_layers(model))


@pytest.mark.parametrize("spec", [kv_shift_layer_spec, None], ids=["shifting", "vanilla"])
def test_a_hook_can_check_the_built_model(spec):
    """The hook is registered before the build: one that the spec function adds comes too late."""
    lines = []

    def check(model):
        lines.append(assert_kv_shift(model))
        return model

    with fake_rank(Layout(), 0):
        made = provider(Layout())
        made.register_post_wrap_hook(check)
        if spec is None:
            with pytest.raises(ValueError, match="not every attention"):
                build(made)
        else:
            build(made, spec)
            assert "128 taps" in lines[0]


def test_the_spec_survives_bridges_yaml():
    register_allowed_target_prefix("kvshift_megatron.")
    with safe_yaml_representers():
        text = yaml.safe_dump({"transformer_layer_spec": kv_shift_layer_spec})
    assert instantiate(yaml.safe_load(text))["transformer_layer_spec"] is kv_shift_layer_spec


def test_shifting_keeps_a_providers_own_layer_spec():
    layout = Layout(tp=8)
    settings = {"use_transformer_engine_op_fuser": True}
    with fake_rank(layout, 7):
        made = provider(layout, **settings)
        (ours,) = build(made, shifting(made.transformer_layer_spec))
        (stock,) = build(provider(layout, **settings))
        assert differences(ours, stock) == []
        assert len(shifting_layers(ours)) == NUM_LAYERS


class ProviderWithOwnSpec(GPTModelProvider):
    def own_layer_spec(config):
        raise AssertionError("not called")

    transformer_layer_spec = own_layer_spec


@pytest.mark.parametrize(
    ("config_class", "settings", "named"),
    [
        (GPTModelProvider, {"use_transformer_engine_op_fuser": True}, "op_fuser"),
        (GPTModelProvider, {"use_transformer_engine_full_layer_spec": True}, "full_layer_spec"),
        (GPTModelProvider, {"attention_backend": AttnBackend.local}, "attention_backend=local"),
        (ProviderWithOwnSpec, {}, "ProviderWithOwnSpec.transformer_layer_spec=own_layer_spec"),
    ],
)
def test_settings_that_kv_shift_layer_spec_would_ignore_are_refused(config_class, settings, named):
    with fake_rank(Layout(), 0):
        config = transformer_config(Layout(), config_class=config_class, **settings)
        with pytest.raises(ValueError, match=named):
            kv_shift_layer_spec(config)


def test_chosen_taps_survive_yaml_as_a_mapping():
    register_allowed_target_prefix("kvshift_megatron.")
    spec = partial(kv_shift_layer_spec, kv_shift={"window": 3, "init": "identity"})
    with safe_yaml_representers():
        text = yaml.safe_dump({"transformer_layer_spec": spec})
    read = instantiate(yaml.safe_load(text))["transformer_layer_spec"]
    with fake_rank(Layout(), 0):
        (model,) = build(provider(Layout()), read)
        expected = KVShiftConfig(window=3, init="identity")
        assert {layer.kv_shift for layer in shifting_layers(model)} == {expected}


def test_the_hook_of_this_package_checks_a_bridge_model():
    with fake_rank(Layout(), 0):
        made = provider(Layout())
        made.register_post_wrap_hook(ModelCheck(KVShiftConfig()))
        with pytest.raises(ValueError, match="not every attention"):
            build(made)
