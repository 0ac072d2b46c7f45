"""Megatron-Bridge's hybrid models: `provider.hybrid_stack_spec = kv_shift_hybrid_stack_spec`."""

from functools import partial

import pytest
from megatron.bridge.models.hybrid.hybrid_provider import HybridModelProvider
from megatron.core.transformer.enums import AttnBackend

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.model import ModelCheck
from kvshift_megatron.hybrid_specs import kv_shift_hybrid_stack_spec
from tests.support.fake_ranks import Layout, constructing_on, fake_rank
from tests.transformer_engine.against_stock import differences, tap_problems
from tests.transformer_engine.models import transformer_config

_KV_SHIFT = KVShiftConfig(seed=3)


def provider(layout, **overrides) -> HybridModelProvider:
    fields = {
        "num_layers": None,
        "hybrid_layer_pattern": "-*-*|*-*-",
        "vocab_size": 512,
        "seq_length": 64,
        "position_embedding_type": "rope",
        # Flash, the provider's default, would set the environment of all later tests.
        "attention_backend": AttnBackend.auto,
        # Off: its kernels need a GPU's libraries even to be constructed.
        "gradient_accumulation_fusion": False,
    }
    return transformer_config(layout, config_class=HybridModelProvider, **{**fields, **overrides})


def build(provider, spec=None):
    """Build Bridge's model of this rank, not wrapped, with `spec` or the provider's own."""
    provider.hybrid_stack_spec = spec
    provider.finalize()
    with constructing_on("meta"):
        (model,) = provider.provide_distributed_model(
            wrap_with_ddp=False, mixed_precision_wrapper=None, init_model_with_meta_device=True
        )
    return model


@pytest.mark.parametrize(
    ("layout", "rank", "pattern", "numbers"),
    [
        (Layout(), 0, "-*-*", [1, 2]),
        (Layout(tp=8), 7, "-*-*", [1, 2]),
        (Layout(tp=8, pp=2), 15, "-*-*|*-*-", [3, 4]),
    ],
    ids=["tp1", "tp8", "tp8-pp2"],
)
def test_a_provider_builds_its_own_model_with_taps(layout, rank, pattern, numbers):
    spec = partial(kv_shift_hybrid_stack_spec, kv_shift=_KV_SHIFT)
    with fake_rank(layout, rank):
        ours = build(provider(layout, hybrid_layer_pattern=pattern), spec)
        stock = build(provider(layout, hybrid_layer_pattern=pattern))
        assert differences(ours, stock) == []
        assert tap_problems(ours, layout.tp) == []
    shifting = [m for m in ours.modules() if isinstance(m, KVShiftSelfAttention)]
    assert {layer.kv_shift for layer in shifting} == {_KV_SHIFT}
    # Their taps are drawn by it.
    assert [layer._attention_number for layer in shifting] == numbers


def test_the_hook_of_this_package_checks_it():
    with fake_rank(Layout(), 0):
        made = provider(Layout(), hybrid_layer_pattern="*-*-")
        made.register_post_wrap_hook(ModelCheck(KVShiftConfig()))
        with pytest.raises(ValueError, match="not every attention"):
            build(made)


def test_another_stack_of_megatron_is_refused():
    made = provider(Layout(), transformer_impl="inference_optimized")
    with pytest.raises(ValueError, match=r"transformer_impl='inference_optimized'.*another hybrid"):
        kv_shift_hybrid_stack_spec(made)
