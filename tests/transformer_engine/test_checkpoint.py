"""The taps that all ranks together save, and the initial taps of each rank."""

import numpy as np
import pytest
import torch

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from tests.support.fake_ranks import Layout, fake_rank
from tests.transformer_engine.against_stock import is_tap, saved_taps
from tests.transformer_engine.models import NUM_LAYERS, gpt_model, transformer_config

TAPS = ("alpha_1", "alpha_2", "beta_1", "beta_2")


def chunks(layout, rank, device="meta", **overrides):
    """Build the virtual pipeline chunks of one rank's model."""
    with fake_rank(layout, rank):
        config = transformer_config(layout, device, **overrides)
        for vp_stage in range(layout.vp) if layout.vp else [None]:
            yield gpt_model(
                config, kv_shift_layer_spec(config, vp_stage), device=device, vp_stage=vp_stage
            )


def times_saved(layout, **overrides):
    """Return, by checkpoint key, how many ranks save each element of the taps."""
    counts = {}
    for rank in range(layout.world):
        for model in chunks(layout, rank, **overrides):
            for key, global_shape, offset, local_shape in saved_taps(model):
                count = counts.setdefault(key, np.zeros(global_shape, dtype=int))
                assert count.shape == global_shape
                count[tuple(slice(o, o + n) for o, n in zip(offset, local_shape))] += 1
    return counts


@pytest.mark.parametrize("groups", [4, 8, 16])
@pytest.mark.parametrize(
    "layout",
    [Layout(tp=8), Layout(tp=8, dp=2), Layout(tp=8, pp=2), Layout(tp=8, pp=2, vp=2)],
    ids=["tp8", "tp8-dp2", "tp8-pp2", "tp8-pp2-vp2"],
)
def test_every_tap_is_saved_exactly_once(layout, groups):
    counts = times_saved(layout, num_query_groups=groups)
    assert sorted(counts) == [f"decoder.layers.self_attention.{name}" for name in TAPS]
    for count in counts.values():
        assert count.shape == (NUM_LAYERS, groups)
        assert (count == 1).all()


def test_layers_that_differ_save_their_taps_separately():
    experts = {"num_moe_experts": 8, "moe_grouped_gemm": True, "moe_layer_freq": [0, 1, 0, 1]}
    counts = times_saved(Layout(tp=8), **experts)
    assert sorted(counts) == [
        f"decoder.layers.{layer}.self_attention.{name}" for layer in range(4) for name in TAPS
    ]
    for count in counts.values():
        assert count.shape == (8,)
        assert (count == 1).all()


def test_taps_saved_by_one_rank_for_all_are_caught(monkeypatch):
    """The comparison above must catch Megatron's default for a module's own parameters."""
    monkeypatch.delattr(KVShiftSelfAttention, "sharded_state_dict")
    counts = times_saved(Layout(tp=8))
    assert all(count.shape != (NUM_LAYERS, 8) for count in counts.values())


@pytest.mark.parametrize("groups", [4, 8, 16])
def test_every_rank_starts_with_its_part_of_the_same_taps(groups):
    def taps(layout, rank):
        (model,) = chunks(layout, rank, "cpu", num_query_groups=groups)
        return {name: p.detach() for name, p in model.named_parameters() if is_tap(name)}

    whole = taps(Layout(), 0)
    parts = [taps(Layout(tp=8), rank) for rank in range(8)]
    assert len(whole) == NUM_LAYERS * len(TAPS)
    for name, expected in whole.items():
        held = [part[name] for part in parts]
        if groups >= 8:
            assert torch.equal(torch.cat(held), expected)
        else:
            assert all(torch.equal(tap, expected) for tap in held)
