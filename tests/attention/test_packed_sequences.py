"""Attention and model on packed documents, which give what each gives alone."""

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import build_module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention import context_parallel, self_attention
from kvshift_megatron.attention.packed_sequences import physical_cu_seqlens
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from kvshift_megatron.specs.te_free import core_attention
from kvshift_megatron.specs.te_free.blockwise_attention import Places
from tests.support.compare import assert_close_rel
from tests.support.no_readback import ReadBack, no_readback
from tests.support.single_process import gpt_model, gradients, randomize_taps, transformer_config

pytestmark = pytest.mark.usefixtures("megatron_rank")

VOCABULARY = 64
LENGTHS = [5, 1, 7, 3]
CONFIGURATIONS = {
    "MHA": ({"num_query_groups": 4}, KVShiftConfig()),
    "GQA": ({"num_query_groups": 2}, KVShiftConfig(window=3)),
    "MQA": ({"num_query_groups": 1}, KVShiftConfig(window=4)),
    "qk_layernorm": ({"qk_layernorm": True}, KVShiftConfig(window=3)),
    "gate, values": ({}, KVShiftConfig(variant="gate", shift_keys=False)),
    "sliding window": ({"window_size": (2, 0)}, KVShiftConfig()),
}
each_configuration = pytest.mark.parametrize(
    ("fields", "kv_shift"), CONFIGURATIONS.values(), ids=list(CONFIGURATIONS)
)
RECOMPUTE = {
    "none": {},
    "selective": {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}


def packed_params(lengths, padded=None):
    """Return Megatron's description of documents, each followed by padding if `padded` is given."""

    def cumulative(sizes):
        return torch.tensor([0, *sizes]).cumsum(0).to(torch.int32)

    longest = max(padded or lengths)
    params = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=cumulative(lengths),
        cu_seqlens_kv=cumulative(lengths),
        max_seqlen_q=longest,
        max_seqlen_kv=longest,
    )
    if padded is not None:
        params.cu_seqlens_q_padded = cumulative(padded)
        params.cu_seqlens_kv_padded = cumulative(padded)
    return params


def randomize(module):
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    randomize_taps(module)
    return module


def build_attention(fields=None, kv_shift=KVShiftConfig(window=3)):
    config = transformer_config(**(fields or {}))
    spec = kv_shift_layer_spec(config, kv_shift=kv_shift).layer_specs[0]
    return randomize(build_module(spec.submodules.self_attention, config=config, layer_number=1))


def call_attention(module, hidden, params=None):
    rotary = RotaryEmbedding(
        kv_channels=8, rotary_percent=1.0, rotary_base=100_000, use_cpu_initialization=True,
        cp_group=parallel_state.get_context_parallel_group(),
    )  # fmt: skip
    longest = len(hidden) if params is None else params.max_seqlen_q
    output, _ = module(
        hidden,
        attention_mask=None,
        rotary_pos_emb=rotary(longest, packed_seq=params is not None),
        packed_seq_params=params,
    )
    return output


def build_model(fields=None, kv_shift=KVShiftConfig(window=3)):
    config = transformer_config(**(fields or {}))
    return randomize(gpt_model(config, kv_shift_layer_spec(config, kv_shift=kv_shift)))


def call_model(module, tokens, params=None):
    """Return logits [t, vocabulary] for tokens [t]."""
    positions = torch.arange(len(tokens))[None]
    return module(tokens[None], positions, None, packed_seq_params=params)[0]


def draw_hidden(tokens):
    return torch.randn(tokens, 1, 32, generator=torch.Generator().manual_seed(1))


def draw_tokens(tokens):
    return torch.randint(VOCABULARY, (tokens,), generator=torch.Generator().manual_seed(1))


def train(module, call, calls, grads, inputs):
    """Return outputs and the parameters' gradients, summed over `calls`."""
    module.zero_grad()
    outputs = []
    for arguments, keep, grad in zip(calls, inputs, grads):
        output = call(module, *arguments)
        output = output if keep is None else output[keep]
        output.backward(grad)
        outputs.append(output.detach())
    result = {name: grad.clone() for name, grad in gradients(module).items()}
    return {"output": torch.cat(outputs), **result}


def assert_as_alone(module, call, inputs, lengths, padded=None):
    """Compare packed documents with each alone; `inputs`: [tokens, ...], padding included."""
    whole = padded or lengths
    is_real = torch.cat([torch.arange(p) < r for r, p in zip(lengths, whole)])
    with torch.no_grad():
        shape = call(module, inputs[:1]).shape[1:]
    generator = torch.Generator().manual_seed(2)
    grad = torch.randn(sum(lengths), *shape, generator=generator)
    alone_inputs = inputs.detach().clone()
    tracked = [x for x in (inputs, alone_inputs) if x.is_floating_point()]
    for x in tracked:
        x.requires_grad_()
    starts = torch.tensor([0, *whole]).cumsum(0).tolist()
    documents = [alone_inputs[a : a + n] for a, n in zip(starts, lengths)]
    expected = train(
        module, call, [(d,) for d in documents], grad.split(lengths), [None] * len(lengths)
    )
    params = packed_params(lengths, padded)
    actual = train(module, call, [(inputs, params)], [grad], [is_real])
    if tracked:
        actual["input"], expected["input"] = inputs.grad, alone_inputs.grad
    for name, wanted in expected.items():
        assert_close_rel(name, actual[name], wanted)


@each_configuration
def test_attention(fields, kv_shift):
    module = build_attention(fields, kv_shift)
    assert_as_alone(module, call_attention, draw_hidden(sum(LENGTHS)), LENGTHS)


@each_configuration
def test_attention_with_padding_after_each_document(fields, kv_shift):
    padded = [8, 4, 8, 4]
    module = build_attention(fields, kv_shift)
    assert_as_alone(module, call_attention, draw_hidden(sum(padded)), LENGTHS, padded)


@pytest.mark.parametrize(
    "lengths", [[1], [6], [1, 1, 1], [0, 4, 0, 0, 3, 0], [2, 9]], ids=lambda x: str(x)
)
def test_attention_on_unusual_lengths(lengths):
    module = build_attention(kv_shift=KVShiftConfig(window=4))
    documents = [n for n in lengths if n]
    inputs, params = draw_hidden(sum(lengths)), packed_params(lengths)
    output = call_attention(module, inputs, params)
    alone = [call_attention(module, document) for document in inputs.split(documents)]
    assert_close_rel("output", output, torch.cat(alone))


@pytest.mark.parametrize("recompute", RECOMPUTE.values(), ids=list(RECOMPUTE))
@pytest.mark.parametrize("padded", [None, [8, 4, 8, 4]], ids=["dense", "padded"])
def test_model(recompute, padded):
    module = build_model(recompute)
    assert_as_alone(module, call_model, draw_tokens(sum(padded or LENGTHS)), LENGTHS, padded)


@pytest.mark.parametrize("name", ["MHA", "MQA", "qk_layernorm"])
def test_model_of_other_heads(name):
    fields, kv_shift = CONFIGURATIONS[name]
    module = build_model({**fields, **RECOMPUTE["full"]}, kv_shift)
    assert_as_alone(module, call_model, draw_tokens(sum(LENGTHS)), LENGTHS)


def test_an_unpacked_call_after_a_packed_one_is_unpacked(monkeypatch):
    module, inputs = build_attention(), draw_hidden(9)

    def unpacked():
        return *module.get_query_key_value_tensors(inputs), call_attention(module, inputs)

    def assert_unchanged():
        assert all(torch.equal(x, y) for x, y in zip(unpacked(), before))

    before = unpacked()
    call_attention(module, inputs, packed_params([4, 5]))
    assert_unchanged()

    def fails(*_, **__):
        raise RuntimeError("after the shift")

    with monkeypatch.context() as planted:
        planted.setattr(module.core_attention, "forward", fails)
        with pytest.raises(RuntimeError, match="after the shift"):
            call_attention(module, inputs, packed_params([4, 5]))
    assert_unchanged()


def test_bounds_of_documents_in_memory():
    params = packed_params([3, 1], [4, 4])
    assert physical_cu_seqlens(params).tolist() == [0, 4, 8]
    assert physical_cu_seqlens(packed_params([3, 1])).tolist() == [0, 3, 4]
    assert physical_cu_seqlens(None) is None
    assert physical_cu_seqlens(PackedSeqParams(qkv_format="sbhd")) is None


def guard(monkeypatch, owner, name, calls):
    """Make `owner.name` raise if it reads anything back."""
    original = getattr(owner, name)

    def watched(*args, **kwargs):
        calls.append(name)
        with no_readback():
            return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, watched)


def guarded_call(monkeypatch):
    module, calls = build_attention(), []
    guard(monkeypatch, module, "get_query_key_value_tensors", calls)
    guard(monkeypatch, module.core_attention, "forward", calls)
    # Megatron's own rotary embedding, between the two, does read cu_seqlens back.
    call_attention(module, draw_hidden(sum(LENGTHS)), packed_params(LENGTHS))
    assert calls == ["get_query_key_value_tensors", "forward"]


def test_nothing_is_read_back_from_the_device(monkeypatch):
    guarded_call(monkeypatch)


@pytest.mark.parametrize(
    "reading",
    [
        lambda cu: cu.tolist(),
        lambda cu: cu[-1].item(),
        lambda cu: int(cu[-1]),
        lambda cu: bool((cu > 0).any()),
        lambda cu: torch.repeat_interleave(cu.diff()),
        lambda cu: cu[cu > 0],
        lambda cu: cu.cpu(),
    ],
    ids=["tolist", "item", "int", "bool", "repeat_interleave", "mask", "cpu"],
)
def test_reading_back_is_caught(monkeypatch, reading):
    original = context_parallel.document_positions

    def planted(cu_seqlens, tokens):
        reading(cu_seqlens)
        return original(cu_seqlens, tokens)

    monkeypatch.setattr(context_parallel, "document_positions", planted)
    with pytest.raises(ReadBack):
        guarded_call(monkeypatch)


def ignore_cu_seqlens(monkeypatch):
    monkeypatch.setattr(self_attention, "physical_cu_seqlens", lambda _: None)


def shift_positions_by_one(monkeypatch):
    original = context_parallel.document_positions

    def planted(cu_seqlens, tokens):
        document, position = original(cu_seqlens, tokens)
        return document, position + 1

    monkeypatch.setattr(context_parallel, "document_positions", planted)


def attend_across_documents(monkeypatch):
    monkeypatch.setattr(
        core_attention,
        "places_on_rank",
        lambda _, tokens, *rest: Places(torch.zeros(tokens).long(), torch.arange(tokens)),
    )


@pytest.mark.parametrize(
    "plant", [ignore_cu_seqlens, shift_positions_by_one, attend_across_documents]
)
def test_planted_errors_are_caught(monkeypatch, plant):
    module = build_attention()
    plant(monkeypatch)
    with pytest.raises(AssertionError, match="output: relative error"):
        assert_as_alone(module, call_attention, draw_hidden(sum(LENGTHS)), LENGTHS)
