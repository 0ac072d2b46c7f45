"""Costs of KV shifting in a layer: operations, and bytes kept for the backward pass."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from kvshift_megatron.config import KVShiftConfig
from tests.attention.test_self_attention import baseline_of, build_attention
from tests.support.single_process import seed_everything, single_process, transformer_config

TOKENS, SAMPLES = 12, 2
# Views launch no kernel, and every output needs memory.
FREE = {"detach", "view", "select", "split_with_sizes", "unbind", "empty", "alias"}


@pytest.fixture(autouse=True)
def process():
    with single_process():
        seed_everything()
        yield


class Operations(TorchDispatchMode):
    """Count what reaches torch's dispatcher, by name."""

    def __init__(self):
        super().__init__()
        self.count = Counter()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.count[function.overloadpacket.__name__] += 1
        return function(*args, **(kwargs or {}))


def build_both(**overrides):
    config = transformer_config(**overrides)
    attention = build_attention(KVShiftConfig(), config)
    return attention, baseline_of(attention, config)


def run(attention):
    config = attention.config
    x = torch.randn(TOKENS, SAMPLES, config.hidden_size, dtype=config.params_dtype)
    angles = torch.randn(TOKENS, 1, 1, config.kv_channels)
    return attention(x.requires_grad_(), None, rotary_pos_emb=angles)[0].sum()


def operations(attention) -> Counter:
    run(attention).backward()  # so that the counted pass adds to existing gradients
    with Operations() as seen:
        run(attention).backward()
    return Counter({name: n for name, n in seen.count.items() if name not in FREE})


def saved_bytes(attention) -> int:
    """Return the size of all storages that autograd keeps, each counted once."""
    kept = {}

    def keep(tensor):
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        run(attention)
    return sum(kept.values())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_besides_the_shift_only_taps_and_their_gradients_need_operations(dtype):
    """Keys and values are neither copied nor cast nor made contiguous."""
    attention, baseline = build_both(params_dtype=dtype, bf16=dtype == torch.bfloat16)
    extra = operations(attention)
    extra.subtract(operations(baseline))
    cast = {"_to_copy": 2} if dtype == torch.bfloat16 else {}
    # Each tap's gradient is added to its existing one.
    expected = {"stack": 1, "cat": 1, "add_": 4, **cast}
    assert {name: n for name, n in extra.items() if n} == expected


def test_a_copy_of_the_keys_is_caught(monkeypatch):
    attention, baseline = build_both()
    original = attention.get_query_key_value_tensors

    def with_copy(*args, **kwargs):
        query, key, value = original(*args, **kwargs)
        return query, key.clone(), value

    monkeypatch.setattr(attention, "get_query_key_value_tensors", with_copy)
    extra = operations(attention)
    extra.subtract(operations(baseline))
    assert extra["clone"] == 1


@pytest.mark.parametrize("groups", [1, 2, 4])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_only_the_shifted_values_are_kept_besides_what_the_baseline_keeps(groups, dtype):
    attention, baseline = build_both(
        num_query_groups=groups, params_dtype=dtype, bf16=dtype == torch.bfloat16
    )
    values = TOKENS * SAMPLES * groups * attention.config.kv_channels * dtype.itemsize
    taps = 4 * groups * 4
    assert saved_bytes(attention) - saved_bytes(baseline) == values + taps


def test_keeping_the_shifted_keys_twice_is_caught(monkeypatch):
    attention, baseline = build_both()
    original = attention.get_query_key_value_tensors

    def with_more(*args, **kwargs):
        query, key, value = original(*args, **kwargs)
        return query, key * torch.ones_like(key), value

    monkeypatch.setattr(attention, "get_query_key_value_tensors", with_more)
    keys = TOKENS * SAMPLES * 2 * 8 * 4
    assert saved_bytes(attention) - saved_bytes(baseline) >= 2 * keys
