"""Attention implementations, gradient checkpointing and compilation give the same values."""

import pytest
import torch

from kvshift_megatron.hf.plan_kvshift import make_plan
from tests.hf import flash
from tests.hf.models import VARIANTS, agrees, full_logits, named, tiny_model, tokens
from tests.hf.test_decoding import in_steps, new_cache

pytestmark = pytest.mark.slow


@pytest.fixture
def on_flash():
    """Register the stand-in for flash attention."""
    with flash.registered() as name:
        yield name


@pytest.mark.parametrize("options", VARIANTS, ids=named)
def test_flash_attention_is_called_with_shifted_keys(options, on_flash):
    model, ids = tiny_model(**options, attn_implementation="eager"), tokens(3, 8)
    mask = torch.ones_like(ids)
    mask[0, :3] = 0
    mask[1, 6:] = 0
    real = mask.bool()
    plain, padded = full_logits(model, ids), full_logits(model, ids, attention_mask=mask)
    model.config._attn_implementation = on_flash
    assert agrees(full_logits(model, ids), plain)
    assert agrees(full_logits(model, ids, attention_mask=mask)[real], padded[real])
    assert flash.SEEN[0][0] is None and flash.SEEN[-1][0] == (3, 8)
    # The library's arguments are passed on, but ours is not.
    assert "position_ids" in flash.SEEN[0][1] and "plan" not in flash.SEEN[0][1]
    assert agrees(in_steps(model, ids, [3, 1, 4], new_cache("dynamic", model)), plain)


def test_flash_attention_and_packed_sequences(on_flash):
    model = tiny_model(kv_shift_window=4, attn_implementation="eager")
    ids = tokens(1, 9)
    positions = torch.tensor([[0, 1, 2, 0, 1, 0, 1, 2, 3]])
    alone = make_plan(model.config, ids, None, positions, None, {})
    model.config._attn_implementation = on_flash
    with_empty_cache = make_plan(
        model.config, ids, None, positions, new_cache("dynamic", model), {}
    )
    assert torch.equal(alone.earlier, with_empty_cache.earlier)
    assert with_empty_cache.last.tolist() == [[9, 10, 11]]
    for wrong, how in (
        ({"position_ids": positions + torch.tensor([0, 0, 0, 1, 1, 0, 0, 0, 0])}, "above 0"),
        ({"position_ids": positions, "cu_seq_lens_q": torch.tensor([0, 4, 9])}, "every jump"),
    ):
        with pytest.raises(ValueError, match=how):
            full_logits(model, ids, **wrong)
    with pytest.raises(ValueError, match="one row"):
        full_logits(model, ids.repeat(2, 1), position_ids=positions.repeat(2, 1))


@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing(reentrant):
    model, ids = tiny_model(kv_shift_window=3), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    gradients = []
    for on in (False, True):
        model.zero_grad()
        model.train()
        if on:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        loss = model(ids, attention_mask=mask, labels=ids).loss
        loss.backward()
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters()})
    for name, expected in gradients[0].items():
        assert expected.abs().max() > 0, name
        assert agrees(gradients[1][name], expected, 1e-6), name


def test_gradient_checkpointing_never_drops_tokens_silently():
    model, ids = tiny_model(), tokens(1, 4)
    cache = new_cache("dynamic", model)
    model(ids, past_key_values=cache)
    model.train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    with pytest.raises(ValueError, match="past_key_values holds tokens"):
        model(ids, past_key_values=cache)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 8


def test_eager_returns_weights_and_hidden_states():
    model, ids = tiny_model(attn_implementation="eager"), tokens(2, 5)
    out = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert [w.shape for w in out.attentions] == [(2, 4, 5, 5)] * 2


def test_compiles_into_one_graph():
    model, ids = tiny_model(kv_shift_window=3), tokens(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for kwargs in ({}, {"attention_mask": mask}):
        got = compiled(ids, use_cache=False, **kwargs).logits
        expected = full_logits(model, ids, **kwargs)
        real = mask.bool() if kwargs else torch.ones_like(mask).bool()
        assert agrees(got[real], expected[real])
    # A decoding step of generate with a static cache.
    cache = new_cache("static", model, 8)
    in_steps(model, ids[:, :4], [4], cache)
    steps = [compiled(ids[:, i : i + 1], past_key_values=cache).logits for i in (4, 5)]
    assert agrees(torch.cat(steps, 1), full_logits(model, ids)[:, 4:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype):
    model, ids = tiny_model(kv_shift_window=3), tokens(2, 7)
    expected = full_logits(model, ids)
    model = model.to(dtype)
    got = full_logits(model, ids)
    assert got.dtype == dtype and agrees(got, expected, 0.1)
    cached = in_steps(model, ids, [4, 1, 2], new_cache("dynamic", model))
    assert agrees(cached, got, 0.05)
