"""Decoding in steps gives the same logits as one pass, whatever happens to the cache."""

import copy

import pytest
import torch
from transformers import DynamicCache, StaticCache

from kvshift_megatron.hf import modeling_kvshift
from tests.hf.models import VARIANTS, agrees, full_logits, named, tiny_model, tokens
from tests.hf.releases import has_release, since

KINDS = ["dynamic", "dynamic without a configuration", "static"]


def new_cache(kind: str, model, length: int = 24):
    if kind == "static":
        return StaticCache(config=model.config, max_cache_len=length)
    return DynamicCache(config=model.config) if kind == "dynamic" else DynamicCache()


def masked(mask, size):
    positions = (mask.long().cumsum(-1) - 1).clamp(min=0)
    return {"attention_mask": mask, "position_ids": positions[:, -size:]}


@torch.no_grad()
def in_steps(model, ids, sizes, cache, mask=None, past=0):
    """Return the logits of `ids` fed in chunks; the mask covers the cache's tokens and these.

    With a mask, positions do not count padding, as in generate.
    """
    logits = []
    for size in sizes:
        seen = ids[:, :size]
        ids, past = ids[:, size:], past + size
        kwargs = {} if mask is None else masked(mask[:, :past], size)
        logits.append(model(seen, past_key_values=cache, **kwargs).logits)
    assert ids.shape[1] == 0
    return torch.cat(logits, 1)


@pytest.mark.parametrize("options", VARIANTS, ids=named)
@pytest.mark.parametrize("kind", KINDS)
def test_in_steps(options, kind):
    model, ids = tiny_model(**options), tokens(2, 11)
    expected = full_logits(model, ids)
    for sizes in ([1] * 11, [3, 1, 4, 2, 1], [8, 3]):
        assert agrees(in_steps(model, ids, sizes, new_cache(kind, model)), expected), sizes


@pytest.mark.parametrize("kind", KINDS)
def test_a_lost_state_is_noticed(kind, monkeypatch):
    model, ids = tiny_model(), tokens(2, 8)
    cache = new_cache(kind, model)
    expected = full_logits(model, ids)
    in_steps(model, ids[:, :5], [5], cache)
    for layer in cache.layers:
        layer._last["value"].zero_()
    assert not agrees(in_steps(model, ids[:, 5:], [1, 1, 1], cache), expected[:, 5:], 1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_two_generations_interleaved(kind):
    model, first, second = tiny_model(kv_shift_window=3), tokens(2, 6, 1), tokens(2, 6, 2)
    caches = [new_cache(kind, model) for _ in range(2)]
    logits = [[], []]
    for i in range(6):
        for which, ids in enumerate((first, second)):
            logits[which].append(in_steps(model, ids[:, i : i + 1], [1], caches[which]))
    assert agrees(torch.cat(logits[0], 1), full_logits(model, first))
    assert agrees(torch.cat(logits[1], 1), full_logits(model, second))


@pytest.mark.parametrize("kind", KINDS)
def test_a_reordered_a_reset_and_a_copied_cache(kind):
    model, ids, more = tiny_model(kv_shift_window=4), tokens(3, 5), tokens(3, 3, 7)
    cache = new_cache(kind, model)
    in_steps(model, ids, [5], cache)
    kept = copy.deepcopy(cache)
    order = torch.tensor([2, 0, 0])
    cache.reorder_cache(order)
    expected = full_logits(model, torch.cat([ids[order], more], 1))[:, 5:]
    assert agrees(in_steps(model, more, [1, 2], cache), expected)
    expected = full_logits(model, torch.cat([ids, more], 1))[:, 5:]
    assert agrees(in_steps(model, more, [2, 1], kept), expected)
    cache.reset()
    assert agrees(in_steps(model, more, [1, 2], cache), full_logits(model, more))


def test_repeated_and_selected_rows_of_a_cache():
    model, ids, more = tiny_model(kv_shift_window=3), tokens(2, 5), tokens(4, 3, 7)
    cache = DynamicCache()
    in_steps(model, ids, [5], cache)
    cache.batch_repeat_interleave(2)
    everything = torch.cat([ids.repeat_interleave(2, 0), more], 1)
    assert agrees(in_steps(model, more, [1, 2], cache), full_logits(model, everything)[:, 5:])
    cache.batch_select_indices(torch.tensor([3, 1]))
    cache.crop(-2)
    last = tokens(2, 2, 9)
    everything = torch.cat([everything[[3, 1], :-2], last], 1)
    assert agrees(in_steps(model, last, [1, 1], cache), full_logits(model, everything)[:, 6:])


@pytest.mark.parametrize("window", [2, 4])
@pytest.mark.parametrize("masked", [False, True])
def test_cropped_anywhere(window, masked):
    model, ids, other = tiny_model(kv_shift_window=window), tokens(2, 9), tokens(2, 4, 7)
    real = torch.ones(2, 13, dtype=torch.long)
    if masked:
        real[0, :3] = 0
        real[1, 6:8] = 0
    for removed in range(10):
        cache = DynamicCache()
        in_steps(model, ids, [4, 5], cache, real if masked else None)
        # Crop in two steps. (Before 5.14, crop(0) removes everything.)
        for step in (removed // 2, removed - removed // 2):
            if step:
                cache.crop(-step)
        kept = 9 - removed
        everything = torch.cat([ids[:, :kept], other], 1)
        mask = torch.cat([real[:, :kept], real[:, 9:]], 1)
        got = in_steps(model, other, [1, 3], cache, mask if masked else None, kept)
        for row in range(2):
            keep = mask[row].bool()
            expected = full_logits(model, everything[row : row + 1, keep])[:, -4:]
            assert agrees(got[row : row + 1], expected), (removed, row)


def test_a_bounded_history():
    model = tiny_model(kv_shift_window=3, kv_shift_cache_history=2)
    ids, other = tokens(2, 12), tokens(2, 3, 7)

    def filled(recording):
        cache = DynamicCache(config=model.config)
        modeling_kvshift.take_over(cache, model.config)
        if recording:
            for layer in cache.layers:
                layer.activate_past_recording()
        in_steps(model, ids, [6] + [1] * 6, cache)
        return cache

    for removed, recording in ((1, False), (2, False), (12, False), (9, True)):
        cache = filled(recording)
        cache.crop(-removed)
        everything = torch.cat([ids[:, : 12 - removed], other], 1)
        expected = full_logits(model, everything)[:, 12 - removed :]
        assert agrees(in_steps(model, other, [1, 2], cache), expected), removed
    cache = filled(False)
    with pytest.raises(ValueError, match="kv_shift_cache_history"):
        cache.crop(-11)
    # Refused before anything was cropped.
    everything = torch.cat([ids, other], 1)
    assert agrees(in_steps(model, other, [3], cache), full_logits(model, everything)[:, 12:])


def test_a_bounded_history_is_bounded():
    model = tiny_model(kv_shift_cache_history=4)
    cache = DynamicCache(config=model.config)
    in_steps(model, tokens(1, 40), [20] + [1] * 20, cache)
    for layer in cache.layers:
        for history in layer._histories.values():
            assert len(history) <= 8
            assert history.states.untyped_storage().nbytes() <= 9 * 2 * 8 * 4


# generate


def generate(model, ids, **kwargs):
    torch.manual_seed(5)
    return model.generate(ids, max_new_tokens=9, **kwargs)


SEARCHES = [
    {"do_sample": False},
    {"do_sample": False, "num_beams": 3, "num_return_sequences": 2},
    {"do_sample": True, "top_k": 0},
    {"do_sample": True, "num_beams": 2, "top_k": 5},
]


@pytest.mark.parametrize("search", SEARCHES, ids=named)
@pytest.mark.parametrize(
    "way",
    [
        {},
        {"cache_implementation": "static"},
        pytest.param({"prefill_chunk_size": 3}, marks=since("5.4", "prepares a cache for it")),
    ],
    ids=named,
)
def test_generate_agrees_with_no_cache(search, way):
    model, ids = tiny_model(kv_shift_window=3), tokens(2, 7)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    ids[1, :4] = 0
    expected = generate(model, ids, attention_mask=mask, use_cache=False, **search)
    assert torch.equal(generate(model, ids, attention_mask=mask, **search, **way), expected)


@pytest.mark.parametrize("helper", ["a model", "the prompt"])
@pytest.mark.parametrize("sampled", [False, True])
def test_assisted_generation(helper, sampled):
    if (helper, sampled) == ("a model", True) and has_release("5.15") and not has_release("5.19"):
        # Seen in 5.15.1: 11 of 12 seeds fail with LlamaForCausalLM, too. 5.19.0 rolls back again.
        pytest.skip("Transformers leaves rejected tokens in the assistant's cache, Llama's too")
    model = tiny_model(kv_shift_window=4, kv_shift_cache_history=0)
    ids = tokens(1, 4).repeat(1, 3)
    # With the same model, every candidate is right. With another, most are wrong and cropped.
    for seed in (0, 1):
        other = tiny_model(seed, kv_shift_window=4)
        ways = {
            "a model": {"assistant_model": other},
            "the prompt": {"prompt_lookup_num_tokens": 4},
        }
        # Before 5.15, prompt lookup needs an end token; this one is never drawn.
        got = generate(model, ids, do_sample=sampled, top_k=1, eos_token_id=999, **ways[helper])
        assert torch.equal(got, generate(model, ids, use_cache=False, do_sample=False))


def test_continued_from_a_returned_cache():
    model, ids = tiny_model(kv_shift_window=3), tokens(2, 6)
    ways = [{}]
    if has_release("5.13"):
        ways.append({"cache_implementation": "static", "max_cache_len": 40})
    for way in ways:
        first = generate(model, ids, do_sample=False, return_dict_in_generate=True, **way)
        turn = torch.cat([first.sequences, tokens(2, 4, 8)], 1)
        got = generate(model, turn, do_sample=False, past_key_values=first.past_key_values)
        assert torch.equal(got, generate(model, turn, do_sample=False, use_cache=False)), way
