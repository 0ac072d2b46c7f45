"""Hybrid models, for which a pattern picks layers from a stack of kinds.

Mamba layers cannot be built here, even on the meta device: the package of their kernels is missing.
"""

import pytest
from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec
from megatron.core.ssm.mamba_layer import MambaLayer

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.layer_specs import with_kv_shift
from tests.support.fake_ranks import Layout, fake_rank
from tests.transformer_engine.against_stock import differences, tap_problems
from tests.transformer_engine.models import hybrid_model, transformer_config

_EXPERTS = {"num_moe_experts": 8, "moe_ffn_hidden_size": 128, "moe_grouped_gemm": True}
# Pattern -> attention layers, configuration.
PATTERNS = {
    "*-*-": (2, {}),
    "*-*E": (2, _EXPERTS),
    "*-*-/*-/*-": (4, {"mtp_num_layers": 2}),
}


@pytest.mark.parametrize("device", ["meta", "cpu"])
@pytest.mark.parametrize(("layout", "rank"), [(Layout(), 0), (Layout(tp=8), 0), (Layout(tp=8), 7)])
@pytest.mark.parametrize("pattern", PATTERNS)
def test_attention_layers_of_a_pattern_shift(pattern, layout, rank, device):
    attentions, overrides = PATTERNS[pattern]
    with fake_rank(layout, rank):
        config = transformer_config(layout, device, **overrides)
        ours = hybrid_model(config, with_kv_shift(hybrid_stack_spec), pattern, device=device)
        stock = hybrid_model(config, hybrid_stack_spec, pattern, device=device)
        assert differences(ours, stock) == []
        assert tap_problems(ours, layout.tp) == []
    assert sum(isinstance(m, KVShiftSelfAttention) for m in ours.modules()) == attentions


@pytest.mark.parametrize("pattern", ["+-+-", "D-D-"])
def test_a_pattern_with_an_attention_that_cannot_shift_is_refused(pattern):
    with fake_rank(Layout(), 0):
        config = transformer_config(Layout())
        spec = with_kv_shift(hybrid_stack_spec)
        with pytest.raises(ValueError, match="no per-head keys and values to shift"):
            hybrid_model(config, spec, pattern)


def test_layers_without_attention_keep_their_spec():
    converted = with_kv_shift(hybrid_stack_spec).submodules
    assert converted.mamba_layer.module is MambaLayer
    assert converted.mamba_layer == hybrid_stack_spec.submodules.mamba_layer
    assert converted.mlp_layer.module is hybrid_stack_spec.submodules.mlp_layer.module
