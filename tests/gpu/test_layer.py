"""A layer on a GPU, with and without Transformer Engine, against DenseLayer in float64."""

import re

import pytest
import torch
from megatron.core.models.common.embeddings.rotary_pos_embedding import RotaryEmbedding
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.spec_utils import build_module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec
from tests.attention.dense_layer import DenseLayer
from tests.support.compare import assert_close_rel, relative_error
from tests.support.single_process import SEED, gradients, randomize_taps, transformer_config

pytestmark = pytest.mark.usefixtures("nccl_rank")

HEADS, HEAD_SIZE, TOKENS, BATCH = 4, 64, 128, 2
FP32_REL = 1e-5
# In Transformer Engine norms are parts of the linear layers that follow them.
_DENSE_NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}


def build(kv_shift, groups, impl, dtype):
    """Build a layer on the GPU with weights and taps that depend on `groups` alone."""
    config = transformer_config(
        num_layers=1,
        hidden_size=HEADS * HEAD_SIZE,
        ffn_hidden_size=512,
        num_attention_heads=HEADS,
        num_query_groups=groups,
        kv_channels=HEAD_SIZE,
        transformer_impl=impl,
        use_cpu_initialization=False,
        params_dtype=dtype,
        bf16=dtype == torch.bfloat16,
    )
    if kv_shift is None:
        spec = vanilla_layer_spec(config)
    else:
        spec = kv_shift_layer_spec(config, kv_shift=kv_shift)
    layer = build_module(spec.layer_specs[0], config=config, layer_number=1).cuda()
    generator = torch.Generator().manual_seed(SEED + groups)
    with torch.no_grad():
        for name, parameter in sorted(layer.named_parameters()):
            if not re.search("alpha|beta", name):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.15)
    randomize_taps(layer)
    return layer


def run(layer, dtype, documents=None):
    """Return (results by DenseLayer's names, x, weights, output gradient), on the CPU."""
    generator = torch.Generator().manual_seed(SEED)
    shape = (TOKENS, BATCH if documents is None else 1, HEADS * HEAD_SIZE)
    x = torch.randn(shape, generator=generator).to("cuda", dtype).requires_grad_()
    grad = torch.randn(shape, generator=generator).to("cuda", dtype)
    rotary = RotaryEmbedding(HEAD_SIZE, rotary_percent=1.0, rotary_base=100_000)
    packed = {}
    if documents is not None:
        ends = torch.tensor([0, *documents], dtype=torch.int32, device="cuda").cumsum(0).int()
        packed["packed_seq_params"] = PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=max(documents),
            max_seqlen_kv=max(documents),
        )
    output, _ = layer(x, attention_mask=None, rotary_pos_emb=rotary(TOKENS), **packed)
    output.backward(grad)
    results = {"output": output.detach(), "input": x.grad, **gradients(layer)}
    weights = {name: parameter.detach() for name, parameter in layer.named_parameters()}
    return _on_cpu(results), x.detach().cpu(), _on_cpu(weights), grad.cpu()


def _on_cpu(tensors):
    return {_DENSE_NAMES.get(name, name): tensor.cpu() for name, tensor in tensors.items()}


def run_dense(dense, x, weights, grad, documents=None):
    x = x.double().requires_grad_()
    weights = {name: weight.double().requires_grad_() for name, weight in weights.items()}
    pieces = [x] if documents is None else x.split(documents)
    output = torch.cat([dense(piece, weights) for piece in pieces])
    output.backward(grad.double())
    return {"output": output.detach(), "input": x.grad} | {n: w.grad for n, w in weights.items()}


def errors(actual, expected):
    """Return every tensor's relative error; all taps of keys, or of values, count as one tensor."""
    assert actual.keys() == expected.keys()
    groups = {name: re.sub(r"(alpha|beta)_.*", r"\1", name) for name in expected}
    found = {}
    for group in set(groups.values()):
        names = [name for name in expected if groups[name] == group]
        stacks = [torch.cat([run[name].flatten() for name in names]) for run in (actual, expected)]
        found[group] = relative_error(*stacks)
    return found


CASES = {
    "GQA": (2, KVShiftConfig()),
    "MHA, window 3": (4, KVShiftConfig(window=3)),
    "MQA, gate": (1, KVShiftConfig(variant="gate")),
    "values": (2, KVShiftConfig(shift_keys=False)),
}


@pytest.mark.parametrize("impl", ["transformer_engine", "local"])
@pytest.mark.parametrize(("groups", "kv_shift"), CASES.values(), ids=CASES)
def test_fp32_output_and_every_gradient_equal_the_definition(groups, kv_shift, impl):
    layer = build(kv_shift, groups, impl, torch.float32)
    actual, *inputs = run(layer, torch.float32)
    dense = DenseLayer(HEADS, groups, HEAD_SIZE, variant=kv_shift.variant)
    found = errors(actual, run_dense(dense, *inputs))
    assert all(error <= FP32_REL for error in found.values()), found
    late = DenseLayer(HEADS, groups, HEAD_SIZE, variant=kv_shift.variant, lag=2)
    assert errors(actual, run_dense(late, *inputs))["output"] > 100 * FP32_REL


@pytest.mark.parametrize("documents", [None, [50, 1, 40, 37]], ids=["sbhd", "thd"])
def test_bf16_is_as_near_to_float64_as_the_vanilla_layer(documents):
    """Make the same comparison for both layers, with Transformer Engine's fused attention."""
    found = {}
    for name, kv_shift in {"shift": KVShiftConfig(), "vanilla": None}.items():
        layer = build(kv_shift, 2, "transformer_engine", torch.bfloat16)
        actual, *inputs = run(layer, torch.bfloat16, documents)
        dense = DenseLayer(HEADS, 2, HEAD_SIZE)
        found[name] = errors(actual, run_dense(dense, *inputs, documents))
    print({name: (error, found["vanilla"].get(name)) for name, error in found["shift"].items()})
    for name, error in found["vanilla"].items():
        # Random taps make keys and values about 1.4 times larger, and so attention sharper.
        assert found["shift"][name] <= 3 * error, (name, found)
    for taps in ("self_attention.alpha", "self_attention.beta"):
        assert found["shift"][taps] <= 3 * max(found["vanilla"].values()), found


@pytest.mark.parametrize("documents", [None, [50, 1, 40, 37]], ids=["sbhd", "thd"])
def test_identity_taps_are_bitwise_the_vanilla_layer(documents):
    identity = build(KVShiftConfig(init="identity"), 2, "transformer_engine", torch.bfloat16)
    for module in identity.modules():
        if hasattr(module, "taps"):
            module.reset_parameters()
    vanilla = build(None, 2, "transformer_engine", torch.bfloat16)
    shifting = run(identity, torch.bfloat16, documents)[0]["output"]
    assert torch.equal(shifting, run(vanilla, torch.bfloat16, documents)[0]["output"])
    other = build(KVShiftConfig(), 2, "transformer_engine", torch.bfloat16)
    assert not torch.equal(shifting, run(other, torch.bfloat16, documents)[0]["output"])


def test_one_wrong_tap_is_caught():
    layer = build(KVShiftConfig(), 2, "transformer_engine", torch.float32)
    actual, x, weights, grad = run(layer, torch.float32)
    weights["self_attention.alpha_2"] = weights["self_attention.alpha_2"].flip(0)
    with pytest.raises(AssertionError, match="output"):
        expected = run_dense(DenseLayer(HEADS, 2, HEAD_SIZE), x, weights, grad)
        assert_close_rel("output", actual["output"], expected["output"], FP32_REL)
