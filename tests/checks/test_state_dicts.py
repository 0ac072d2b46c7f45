"""State dicts, which older formats and users' scripts load: taps are never lost or invented."""

import re

import pytest
import torch
from megatron.core.transformer.module import Float16Module

from kvshift_megatron.checks.checkpoint import check_checkpoint
from tests.checks.models import ATTENTION, FREE, IDENTITY, asked_for, build
from tests.support.single_process import randomize_taps, transformer_config


def taps(model):
    return {n: p for n, p in model.named_parameters() if re.search(r"\.(alpha|beta)_", n)}


def are_identity(model):
    return all(
        torch.equal(tap, torch.full_like(tap, float(name.endswith("_1"))))
        for name, tap in taps(model).items()
    )


@pytest.mark.parametrize("strict", [True, False])
def test_a_vanilla_state_dict_is_refused(megatron_rank, strict):
    vanilla, model = build(None).state_dict(), build(FREE)
    before = {name: tap.clone() for name, tap in taps(model).items()}
    with pytest.raises(ValueError, match=r"without its taps.*--kv-shift-init identity"):
        model.load_state_dict(vanilla, strict=strict)
    assert all(torch.equal(tap, before[name]) for name, tap in taps(model).items())


@pytest.mark.parametrize("strict", [True, False])
def test_identity_taps_accept_a_vanilla_state_dict(megatron_rank, strict):
    source, model = build(None), build(IDENTITY)
    randomize_taps(model)
    with pytest.raises(ValueError, match=r"without its taps, which have been trained here"):
        model.load_state_dict(source.state_dict(), strict=strict)
    assert not are_identity(model)
    for layer in model.decoder.layers:
        layer.self_attention.reset_parameters()
    result = model.load_state_dict(source.state_dict(), strict=strict)
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "_extra_state" not in key]
    assert len(taps(model)) == 8 and are_identity(model)
    # Vanilla weights with taps (1, 0) are the vanilla model.
    tokens = torch.arange(16)[None]
    assert torch.equal(model(tokens, tokens, None), source(tokens, tokens, None))


def test_other_missing_keys_are_still_reported(megatron_rank):
    state = build(None).state_dict()
    del state["output_layer.weight"]
    with pytest.raises(RuntimeError, match=r"output_layer\.weight") as caught:
        build(IDENTITY).load_state_dict(state)
    assert "alpha" not in str(caught.value)


@pytest.mark.parametrize("kv_shift", [FREE, IDENTITY], ids=["uniform", "identity"])
@pytest.mark.parametrize("missing", [["alpha_2"], ["beta_1", "beta_2"]])
def test_some_of_the_taps_alone_are_refused(megatron_rank, kv_shift, missing):
    model = build(kv_shift)
    state = model.state_dict()
    for name in missing:
        del state[ATTENTION.format(1) + name]
    with pytest.raises(ValueError, match=rf"layers\.1.*without its taps.*{missing[0]}"):
        model.load_state_dict(state, strict=False)


@pytest.mark.parametrize("kv_shift", [FREE, IDENTITY], ids=["uniform", "identity"])
def test_a_state_dict_of_adapters_passes_and_does_not_change_the_taps(megatron_rank, kv_shift):
    model = build(kv_shift)
    randomize_taps(model)
    before = {name: tap.clone() for name, tap in taps(model).items()}
    adapters = {ATTENTION.format(0) + "linear_proj.adapter.weight": torch.zeros(2)}
    for state in ({}, adapters):
        model.load_state_dict(state, strict=False)
    assert all(torch.equal(tap, before[name]) for name, tap in taps(model).items())


def test_a_state_dict_with_its_taps_is_loaded(megatron_rank):
    source = build(FREE)
    randomize_taps(source)
    for kv_shift in (FREE, IDENTITY):
        model = build(kv_shift)
        model.load_state_dict(source.state_dict())
        loaded = taps(model)
        assert all(torch.equal(tap, loaded[name]) for name, tap in taps(source).items())


@pytest.mark.parametrize("strict", [True, False])
def test_the_baseline_refuses_a_state_dict_with_taps(megatron_rank, strict):
    baseline, state = build(None), build(FREE).state_dict()
    check_checkpoint([baseline], None)
    before = {name: p.clone() for name, p in baseline.named_parameters()}
    with pytest.raises(ValueError, match=r"self_attention\.alpha_1 and 7 more.*--no-kv-shift"):
        baseline.load_state_dict(state, strict=strict)
    assert all(torch.equal(p, before[name]) for name, p in baseline.named_parameters())
    baseline.load_state_dict(build(None).state_dict())


def test_a_wrapped_baseline_refuses_it_too(megatron_rank):
    """Megatron's wrappers pass a state dict to the model inside and do not run their own hooks."""
    config = transformer_config(bf16=True, params_dtype=torch.bfloat16)
    wrapped = Float16Module(config, build(None))
    state = build(FREE).state_dict()
    check_checkpoint([wrapped], None)
    with pytest.raises(ValueError, match="--no-kv-shift"):
        wrapped.load_state_dict(state, strict=False)


# --- leaving the taps out of one load ---


@pytest.fixture
def leaving_out(megatron_rank):
    model = build(IDENTITY)
    everything = set(model.sharded_state_dict())
    for layer in model.decoder.layers:
        layer.self_attention.load_without_taps()
    assert everything - set(model.sharded_state_dict()) == set(taps(model))
    # Every call leaves them out until the load.
    assert asked_for(model) == []
    return model


def test_a_load_puts_the_taps_back(leaving_out):
    leaving_out.load_state_dict(build(None).state_dict())
    assert len(asked_for(leaving_out)) == 8


def test_a_forward_puts_the_taps_back(leaving_out):
    tokens = torch.arange(16)[None]
    leaving_out(tokens, tokens, None)
    assert len(asked_for(leaving_out)) == 8


def test_a_plain_state_dict_has_the_taps_all_along(leaving_out):
    assert set(taps(leaving_out)) <= set(leaving_out.state_dict())
