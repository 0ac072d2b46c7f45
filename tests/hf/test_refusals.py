"""Settings and arguments that cannot be honoured are refused by name."""

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, QuantizedCache, StaticCache

from kvshift_megatron.config import KVShiftConfig
from tests.hf.models import tiny_config, tiny_model, tokens
from tests.hf.releases import has_release, since

SLIDING = {"layer_types": ["sliding_attention"] * 2, "sliding_window": 4}

BAD_CONFIGS = [
    ({"kv_shift_variant": "softmax"}, "kv_shift_variant='softmax'"),
    ({"kv_shift_window": 1}, "kv_shift_window=1"),
    ({"kv_shift_window": 5}, "kv_shift_window=5"),
    ({"kv_shift_variant": "gate", "kv_shift_window": 3}, "kv_shift_window=2 only"),
    ({"kv_shift_keys": False, "kv_shift_values": False}, "both off"),
    ({"kv_shift_cache_history": -1}, "kv_shift_cache_history=-1"),
    ({"num_key_value_heads": 3}, "num_key_value_heads=3"),
    ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "'linear'"),
    ({"num_local_experts": 1, "num_experts_per_tok": 2}, "num_local_experts=1"),
    ({"num_local_experts": 4, "mlp_bias": True}, "mlp_bias"),
    ({"pretraining_tp": 2}, "pretraining_tp=2"),
    ({"sliding_window": 64}, "sliding_window=64"),
    ({"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5"),
    ({"is_causal": False}, "is_causal=False"),
]


@pytest.mark.parametrize(
    "settings, message", BAD_CONFIGS, ids=lambda x: x if type(x) is str else ""
)
def test_configurations(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_config(**settings)


@pytest.mark.parametrize("variant", ["free", "gate", "clamp", "other"])
@pytest.mark.parametrize("window", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("keys, values", [(1, 1), (1, 0), (0, 1), (0, 0)])
def test_the_rules_are_those_of_training(variant, window, keys, values):
    def refused(build):
        try:
            build()
        except ValueError:
            return True
        return False

    names = {"variant": variant, "window": window}
    names |= {"keys": bool(keys), "values": bool(values)}
    here = refused(lambda: tiny_config(**{f"kv_shift_{k}": v for k, v in names.items()}))
    # For every init: a checkpoint may hold any taps.
    there = all(
        refused(
            lambda init=init: KVShiftConfig(
                variant=variant,
                window=window,
                shift_keys=bool(keys),
                shift_values=bool(values),
                init=init,
            )
        )
        for init in ("uniform", "identity")
    )
    assert here == there


@pytest.mark.parametrize("name", ["kv_shift_window", "kv_shift_keys", "kv_shift_cache_history"])
def test_wrong_types(name):
    with pytest.raises(Exception, match=name):
        tiny_config(**{name: "two"})


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_masks(model):
    ids = tokens(2, 5)
    for mask in (torch.ones(2, 1, 5, 5), {"full_attention": torch.ones(2, 5)}):
        with pytest.raises(ValueError, match="attention_mask must be 2-D"):
            model(ids, attention_mask=mask)
    with pytest.raises(ValueError, match="4 columns for 0 past and 5 new"):
        model(ids, attention_mask=torch.ones(2, 4))
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="1 columns for 5 past and 1 new"):
        model(ids[:, :1], past_key_values=cache, attention_mask=torch.ones(2, 1))


def test_packed_sequences_with_a_cache(model):
    positions = torch.tensor([[0, 1, 2, 0, 1]])
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(1, 5), position_ids=positions)
    with pytest.raises(ValueError, match="use_cache=False"):
        model(tokens(1, 5), cu_seq_lens_q=torch.tensor([0, 3, 5]))
    with pytest.raises(ValueError, match="every jump"):
        model(
            tokens(1, 5),
            position_ids=positions,
            cu_seq_lens_q=torch.tensor([0, 2, 5]),
            use_cache=False,
        )


def test_caches(model):
    ids = tokens(2, 5)
    llama = LlamaForCausalLM(LlamaConfig(**{**model.config.to_dict(), "model_type": "llama"}))
    for cache in (DynamicCache(), StaticCache(config=llama.config, max_cache_len=8)):
        llama(ids, past_key_values=cache)
        with pytest.raises(ValueError, match="filled without the unshifted"):
            model(ids, past_key_values=cache)
    window = LlamaConfig(**SLIDING, num_hidden_layers=2)
    with pytest.raises(ValueError, match="layers of DynamicSlidingWindowLayer"):
        model(ids, past_key_values=DynamicCache(config=window))
    if has_release("5.21"):
        with pytest.raises(ValueError, match="layers of Fp8QuantizedLayer"):
            model(ids, past_key_values=QuantizedCache("fp8", model.config))
    with pytest.raises(ValueError, match="is a tuple"):
        model(ids, past_key_values=((torch.zeros(1), torch.zeros(1)),) * 2)
    cache = DynamicCache()
    model(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="kv_shift_window=2"):
        tiny_model(kv_shift_window=3)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="1 layers, but the model has 2"):
        small = tiny_config(num_hidden_layers=1)
        model(ids, past_key_values=DynamicCache(config=small))
    with pytest.raises(ValueError, match="two names for one argument"):
        model(ids, past_key_values=cache, cache=cache)
    with pytest.raises(ValueError, match=r"crop\(-1\): a static cache"):
        cache = StaticCache(config=model.config, max_cache_len=8)
        model(ids, past_key_values=cache)
        for layer in cache.layers:
            layer.crop(-1)


def test_a_length_to_crop_to(model):
    """Check crop(3): until 5.19 it keeps 3 tokens; since 5.20 it is refused."""
    ids = tokens(2, 6)
    cache = DynamicCache()
    model(ids[:, :5], past_key_values=cache)
    if has_release("5.20"):
        with pytest.raises(ValueError, match="positive"):
            cache.crop(3)
        cache.crop(-2)
    else:
        cache.crop(3)
    assert cache.get_seq_length() == 3
    logits = model(ids[:, 3:], past_key_values=cache).logits
    assert torch.allclose(logits, model(ids, use_cache=False).logits[:, 3:], atol=1e-5)


@since("5.21", "has a quantized cache of its own")
def test_quantized_caches(model):
    with pytest.raises(ValueError, match="layers of"):
        model.generate(
            tokens(1, 4),
            max_new_tokens=2,
            cache_implementation="quantized",
            cache_config={"backend": "fp8"},
        )


def test_ways_to_generate(model):
    with pytest.raises(ValueError, match="continuous batching"):
        model.generate_batch([[3, 4, 5]], max_new_tokens=2)
    with pytest.raises(ValueError, match="is_causal=False"):
        model(tokens(1, 4), is_causal=False)
    paged = tiny_model()
    paged.config._attn_implementation = "paged|sdpa"
    with pytest.raises(ValueError, match="paged attention"):
        paged(tokens(1, 4))
    with pytest.raises(ValueError, match="both missing"):
        model()
