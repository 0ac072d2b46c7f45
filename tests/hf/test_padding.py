"""Padding never reaches a real token, and packed sequences do not reach each other."""

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvshift_megatron.hf import modeling_kvshift
from kvshift_megatron.hf.plan_kvshift import make_plan
from tests.hf.models import VARIANTS, agrees, full_logits, named, tiny_model, tokens
from tests.hf.test_decoding import in_steps, masked

# Padding on the left, on the right, none, on both sides, and holes within every window.
MASK = torch.tensor(
    [
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1],
        [1, 1, 1, 1, 1, 1, 0, 0, 0, 0],
        [1, 1, 1, 1, 1, 1, 1, 1, 1, 1],
        [0, 1, 1, 1, 1, 1, 1, 1, 0, 0],
        [1, 0, 1, 1, 0, 0, 1, 0, 0, 1],
    ]
)


def alone(model, ids):
    """Return the logits of every row without its padding, at the places of its tokens."""
    logits = torch.zeros(*ids.shape, model.config.vocab_size)
    for row, mask in enumerate(MASK.bool()):
        logits[row, mask] = full_logits(model, ids[row : row + 1, mask])[0]
    return logits


def at_real_tokens(logits):
    return logits[MASK.bool()]


@pytest.mark.parametrize("options", VARIANTS, ids=named)
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_padded_rows_agree_with_single_sequences(options, attention):
    model, ids = tiny_model(**options, attn_implementation=attention), tokens(5, 10)
    expected = at_real_tokens(alone(model, ids))
    for mask in (MASK, MASK.bool(), MASK.float()):
        assert agrees(at_real_tokens(full_logits(model, ids, **masked(mask, 10))), expected)
    for cache in (DynamicCache(), StaticCache(config=model.config, max_cache_len=12)):
        got = in_steps(model, ids, [1, 3, 1, 1, 2, 1, 1], cache, MASK)
        assert agrees(at_real_tokens(got), expected)


def test_padding_may_hold_anything():
    model, ids = tiny_model(kv_shift_window=4), tokens(5, 10)
    with torch.no_grad():
        embedded = model.model.embed_tokens(ids)
        embedded[~MASK.bool()] = 1e30
        got = model(inputs_embeds=embedded, use_cache=False, **masked(MASK, 10)).logits
    assert agrees(at_real_tokens(got), at_real_tokens(alone(model, ids)))


def test_a_leak_is_noticed(monkeypatch):
    model, ids = tiny_model(), tokens(5, 10)
    expected = alone(model, ids)
    monkeypatch.setattr(
        modeling_kvshift,
        "make_plan",
        lambda config, inputs, mask, *rest: make_plan(config, inputs, torch.ones_like(mask), *rest),
    )
    got = full_logits(model, ids, **masked(MASK, 10))
    assert agrees(got[2], expected[2])
    for row in (0, 3, 4):
        real = MASK[row].bool()
        assert not agrees(got[row, real], expected[row, real], 1e-3)


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_packed_sequences_agree_with_single_ones(attention):
    model = tiny_model(kv_shift_window=4, attn_implementation=attention)
    ids = tokens(1, 12)
    lengths = [1, 5, 2, 4]
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    expected = torch.cat([full_logits(model, part) for part in ids.split(lengths, 1)], 1)
    assert agrees(full_logits(model, ids, position_ids=positions), expected)
    ends = torch.tensor([0, *lengths]).cumsum(0)
    got = full_logits(model, ids, position_ids=positions, cu_seq_lens_q=ends, cu_seq_lens_k=ends)
    assert agrees(got, expected)
    # A shift across the boundaries would be noticed.
    assert not agrees(full_logits(model, ids), expected, 1e-3)


def test_a_turn_padded_on_the_left():
    model, ids, turn = tiny_model(kv_shift_window=3), tokens(2, 5), tokens(2, 4, 8)
    mask = torch.tensor([[0, 0, 1, 1, 1, 0, 0, 1, 1], [1, 1, 1, 1, 1, 1, 1, 1, 1]])
    everything = torch.cat([ids, turn], 1)
    cache = DynamicCache()
    in_steps(model, ids, [5], cache, mask)
    got = model.generate(
        everything, attention_mask=mask, past_key_values=cache, max_new_tokens=6, do_sample=False
    )
    for row in range(2):
        single = everything[row : row + 1, mask[row].bool()]
        expected = model.generate(single, use_cache=False, max_new_tokens=6, do_sample=False)
        assert torch.equal(got[row, 9:], expected[0, -6:])
