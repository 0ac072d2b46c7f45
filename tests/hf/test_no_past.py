"""A token whose previous token is elsewhere is refused: foreign engines and sharded sequences."""

import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoModel,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    LlamaForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from tests.hf import flash
from tests.hf.models import agrees, full_logits, tiny_config, tiny_model, tokens
from tests.hf.test_decoding import KINDS, in_steps, new_cache
from tests.support.no_readback import ReadBack, no_readback


@pytest.fixture(scope="module")
def model():
    return tiny_model(kv_shift_window=3)


# Engines with a store of their own


@pytest.mark.parametrize("name", ["vllm", "sglang", "tgi"])
def test_an_engine_is_refused_when_it_builds_the_model(name, model):
    """Check what vLLM and SGLang do: register a name, put it into the configuration, build."""
    AttentionInterface.register(name, lambda *args, **kwargs: pytest.fail("attention ran"))
    before = model.config._attn_implementation
    try:
        for build in (AutoModel.from_config, AutoModelForCausalLM.from_config):
            config = tiny_config()
            config._attn_implementation = name
            with pytest.raises(ValueError, match=f"attn_implementation='{name}'.*have no place"):
                build(config)
        model.config._attn_implementation = name
        with pytest.raises(ValueError, match="have no place"):
            model(tokens(1, 3))
    finally:
        AttentionInterface._global_mapping.pop(name, None)
        model.config._attn_implementation = before


@pytest.mark.parametrize(
    "name", ["eager", "sdpa", "flex_attention", flash.NAME, "kernels-community/flash-attn2"]
)
def test_the_library_s_own_implementations_are_not(name):
    model = tiny_model()
    model.config._attn_implementation = name
    model.model._refuse(None, {})


STEPS = {
    "one token": {"position_ids": torch.tensor([[4]])},
    "two tokens": {"position_ids": torch.tensor([[4, 5]])},
    "a row of two": {"position_ids": torch.tensor([[0, 1], [4, 5]])},
    "requests in one row": {"position_ids": torch.tensor([[0, 1, 2, 7, 0, 1]])},
    "a mask": {
        "position_ids": torch.tensor([[4, 5]]),
        "attention_mask": torch.ones(1, 2).long(),
    },
    "padding": {
        "position_ids": torch.tensor([[0, 4, 5]]),
        "attention_mask": torch.tensor([[0, 1, 1]]),
    },
    "places": {"cache_position": torch.tensor([4, 5])},
}


def ids_for(step: dict):
    shape = next(iter(step.values())).shape
    return tokens(*((1, *shape) if len(shape) == 1 else shape))


@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("cached", [False, True])
def test_a_step_without_its_past(step, cached, model):
    for attention in ("eager", "sdpa"):
        model.config._attn_implementation = attention
        cache = DynamicCache() if cached else None
        with pytest.raises(ValueError, match="starts above 0"):
            model(ids_for(STEPS[step]), past_key_values=cache, use_cache=cached, **STEPS[step])


def test_sequences_that_start_anywhere(model):
    """Check that a caller can say so: rotation is relative, so the values are those from 0."""
    ids, positions = tokens(2, 6), torch.arange(6)[None]
    expected = full_logits(model, ids)
    got = full_logits(model, ids, position_ids=positions + 9, starts_anywhere=True)
    assert agrees(got, expected)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]])
    padded = {"attention_mask": mask, "starts_anywhere": True}
    got = full_logits(model, ids, position_ids=positions + 9, **padded)
    assert agrees(got[0, 2:], full_logits(model, ids[:1, 2:])[0])
    packed = torch.tensor([[2, 3, 4, 2, 3, 4]])
    got = full_logits(model, ids, position_ids=packed, starts_anywhere=True)
    parts = [full_logits(model, part) for part in ids.split(3, 1)]
    assert agrees(got, torch.cat(parts, 1))
    for call in (model, model.model):
        with pytest.raises(ValueError, match="starts above 0"):
            call(ids, position_ids=packed, use_cache=False)


def last_position(model, ids, **kwargs):
    """Generate, and return the position of the last token that the model gets."""
    seen = []
    hook = model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["position_ids"]), with_kwargs=True
    )
    model.generate(ids, **kwargs)
    hook.remove()
    return int(seen[-1].max())


def test_generating_from_any_position(model):
    ids, positions = tokens(2, 6), torch.arange(6)[None]
    kwargs = {"max_new_tokens": 4, "do_sample": False}
    shifted = {"position_ids": (positions + 9).expand(2, -1), **kwargs}
    llama = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"}))
    if last_position(llama, ids, **shifted) == 14:
        pytest.skip("this release repeats the last position that generate() got, for Llama too")
    generated = model.generate(
        ids, position_ids=(positions + 9).expand(2, -1), starts_anywhere=True, **kwargs
    )
    assert torch.equal(generated, model.generate(ids, **kwargs))


def test_positions_that_count_padding(model):
    ids, mask = tokens(1, 6), torch.tensor([[0, 0, 1, 1, 1, 1]])
    got = full_logits(model, ids, attention_mask=mask, position_ids=torch.arange(6)[None])
    assert agrees(got[:, 2:], full_logits(model, ids[:, 2:]))


# A decoding step reads nothing back


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("size", [1, 2])
def test_a_decoding_step_reads_nothing_from_the_device(kind, size, model):
    model.config._attn_implementation = "eager"
    ids, cache = tokens(2, 5), new_cache(kind, model)
    in_steps(model, ids[:, : 5 - size], [5 - size], cache)
    positions = torch.arange(5 - size, 5)[None] if size == 1 else None
    with torch.no_grad(), no_readback():
        got = model(ids[:, -size:], past_key_values=cache, position_ids=positions).logits
    assert agrees(got, full_logits(model, ids)[:, -size:])


def test_reading_would_be_noticed(model):
    with pytest.raises(ReadBack), torch.no_grad(), no_readback():
        model(tokens(1, 3), position_ids=torch.arange(3)[None], use_cache=False)


# Sequences split over ranks


def test_shards_of_every_rank(model):
    """Check the shards of Ulysses (slices) and of torch's context parallelism (head and tail)."""
    ids, positions = tokens(1, 16), torch.arange(16)[None]
    model.config._attn_implementation = "sdpa"
    slices = positions.split(8, 1)
    a, b, c, d = positions.split(4, 1)
    for shard in (slices[1], torch.cat([a, d], 1), torch.cat([b, c], 1)):
        with pytest.raises(ValueError, match="split over ranks by sp_size, cp_size"):
            full_logits(model, ids[:, shard[0]], position_ids=shard)


def test_ulysses_of_deepspeed(model):
    """Check what register_with_transformers does: its function takes the implementation's name."""

    def uattn_wrapper(*args, **kwargs):
        pytest.fail("attention ran")

    uattn_wrapper.__module__ = "deepspeed.runtime.sequence_parallel.ulysses_sp"
    before = ALL_ATTENTION_FUNCTIONS["sdpa"]
    model.config._attn_implementation = "sdpa"
    ALL_ATTENTION_FUNCTIONS["sdpa"] = uattn_wrapper
    try:
        for call in (lambda: full_logits(model, tokens(1, 4)), tiny_model):
            with pytest.raises(ValueError, match="sp_size above 1"):
                call()
    finally:
        del ALL_ATTENTION_FUNCTIONS["sdpa"]
    assert ALL_ATTENTION_FUNCTIONS["sdpa"] is before
    full_logits(model, tokens(1, 4))


def test_context_parallelism_of_accelerate():
    """Check what its hook does to each self_attn: no mask, and is_causal instead."""
    model, ids = tiny_model(), tokens(1, 4)
    full_logits(model, ids, is_causal=True)
    hooks = [
        module.register_forward_pre_hook(
            lambda _, args, kwargs: (args, kwargs | {"attention_mask": None, "is_causal": True}),
            with_kwargs=True,
        )
        for name, module in model.named_modules()
        if name.endswith("self_attn")
    ]
    assert len(hooks) == 2
    with pytest.raises(ValueError, match="cp_size above 1"):
        full_logits(model, ids)
    assert not getattr(model, "supports_context_parallel", False)
