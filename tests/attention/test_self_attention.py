"""KVShiftSelfAttention on one rank, against vanilla attention with keys and values shifted here."""

from functools import partial
from inspect import signature

import pytest
import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.attention import SelfAttention
from megatron.core.transformer.spec_utils import build_module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec
from kvshift_megatron.ops import shift_ref
from kvshift_megatron.taps import initial_values, tap_names
from tests.attention.dense_layer import DenseLayer
from tests.support.compare import assert_close_rel
from tests.support.single_process import (
    gpt_model,
    gradients,
    randomize_taps,
    seed_everything,
    transformer_config,
)

pytestmark = pytest.mark.usefixtures("megatron_rank")

GROUPS, TOKENS, BATCH, VOCABULARY = 2, 11, 2, 64
CONFIGURATIONS = {
    "free": KVShiftConfig(),
    "window 3": KVShiftConfig(window=3),
    "window 4": KVShiftConfig(window=4),
    "gate": KVShiftConfig(variant="gate"),
    "clamp": KVShiftConfig(variant="clamp"),
    "clamp, window 4": KVShiftConfig(variant="clamp", window=4, init="identity"),
    "keys": KVShiftConfig(shift_values=False),
    "values, window 3": KVShiftConfig(shift_keys=False, window=3),
    "gate, values": KVShiftConfig(variant="gate", shift_keys=False),
}
each_configuration = pytest.mark.parametrize(
    "kv_shift", CONFIGURATIONS.values(), ids=list(CONFIGURATIONS)
)


def build_attention(kv_shift, config=None, layer_number=1):
    """Build an attention with random weights, taps and norms; None for a vanilla one."""
    config = transformer_config() if config is None else config
    if kv_shift is None:
        spec = vanilla_layer_spec(config)
    else:
        spec = kv_shift_layer_spec(config, kv_shift=kv_shift)
    attention = build_module(
        spec.layer_specs[0].submodules.self_attention, config=config, layer_number=layer_number
    )
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, parameter in attention.named_parameters():
            if not name.startswith(("alpha_", "beta_")):
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.4)
    randomize_taps(attention)
    return attention


def baseline_of(attention, config=None):
    """Return vanilla attention with the same weights."""
    baseline = build_attention(None, config)
    taps = {name for names in tap_names(attention.kv_shift).values() for name in names}
    report = baseline.load_state_dict(attention.state_dict(), strict=False)
    assert not report.missing_keys and set(report.unexpected_keys) == taps
    return baseline


def taps_by_hand(attention, kind):
    """Return taps [window, ng] from the parameters, or None for a kind that does not shift."""
    config = attention.kv_shift
    if not (config.shift_keys if kind == "alpha" else config.shift_values):
        return None
    if config.variant == "gate":
        gate = torch.sigmoid(getattr(attention, f"{kind}_logit").float())
        return torch.stack((gate, 1 - gate))
    taps = torch.stack([getattr(attention, f"{kind}_{j + 1}") for j in range(config.window)])
    if config.variant == "clamp":
        # The derivative is 1 outside too.
        return taps.float() - (taps.float() - taps.float().clamp(0, 1)).detach()
    return taps.float()


def shift_by_hand(attention, kind, x):
    taps = taps_by_hand(attention, kind)
    return x if taps is None else shift_ref(x, taps)


def hidden_states(dtype=torch.float32, requires_grad=False):
    generator = torch.Generator().manual_seed(4)
    x = torch.randn(TOKENS, BATCH, 32, generator=generator).to(dtype)
    return x.requires_grad_(requires_grad)


@each_configuration
def test_equals_the_vanilla_attention_with_shifted_keys_and_values(kv_shift):
    attention = build_attention(kv_shift)
    baseline = baseline_of(attention)
    plain = baseline.get_query_key_value_tensors

    def shifted(*args, **kwargs):
        query, key, value = plain(*args, **kwargs)
        key = shift_by_hand(attention, "alpha", key)
        return query, key, shift_by_hand(attention, "beta", value)

    baseline.get_query_key_value_tensors = shifted
    results = []
    for module in (attention, baseline):
        attention.zero_grad()
        x = hidden_states(requires_grad=True)
        output, _ = module(x, attention_mask=None)
        output.square().sum().backward()
        taps = [
            getattr(attention, name).grad.clone()
            for names in tap_names(kv_shift).values()
            for name in names
        ]
        results.append((output, x.grad, module.linear_qkv.weight.grad.clone(), *taps))
    for number, (actual, expected) in enumerate(zip(*results, strict=True)):
        assert expected.any()
        assert_close_rel(f"result {number}", actual, expected)
    # The taps change the output at all.
    del baseline.get_query_key_value_tensors
    with pytest.raises(AssertionError, match="output"):
        assert_close_rel("output", results[0][0], baseline(hidden_states(), attention_mask=None)[0])


@pytest.mark.parametrize("gate", [False, True], ids=["plain", "output gate"])
@pytest.mark.parametrize("kv_shift", [KVShiftConfig(), KVShiftConfig(window=3, shift_keys=False)])
def test_the_shift_comes_after_the_norm_of_the_keys_and_before_rope(kv_shift, gate):
    config = transformer_config(qk_layernorm=True, attention_output_gate=gate)
    attention = build_attention(kv_shift, config)
    baseline = baseline_of(attention, config)
    x = hidden_states()
    arguments = {"output_gate": True} if gate else {}
    actual = attention.get_query_key_value_tensors(x, None, **arguments)
    expected = list(baseline.get_query_key_value_tensors(x, None, **arguments))
    assert len(actual) == len(expected) == 3 + gate
    expected[1] = shift_by_hand(attention, "alpha", expected[1])
    expected[2] = shift_by_hand(attention, "beta", expected[2])
    for ours, theirs in zip(actual, expected):
        assert torch.equal(ours, theirs)

    # The core attention gets all this rotated.
    seen = []
    attention.core_attention.register_forward_pre_hook(lambda _, inputs: seen.extend(inputs[:3]))
    rotary = angles(config.kv_channels)
    # Megatron would compile its own, which takes seconds and a C++ compiler.
    attention._apply_output_gate = lambda context, gate: context * gate.sigmoid().view_as(context)
    output, _ = attention(x, attention_mask=None, rotary_pos_emb=rotary)
    assert output.shape == x.shape
    rotate = DenseLayer(4, GROUPS, config.kv_channels).rotate
    for name, got, before in zip(("query", "key"), seen, expected):
        expected_rotated = torch.stack(
            [rotate(before[:, :, n].double()) for n in range(before.size(2))], dim=2
        )
        assert_close_rel(name, got, expected_rotated)
    assert torch.equal(seen[2], expected[2])


def angles(head_size):
    half = torch.arange(TOKENS)[:, None] * 1e5 ** (-torch.arange(0, head_size, 2) / head_size)
    return torch.cat((half, half), dim=-1)[:, None, None, :]


def train(spec, state=None, **fields):
    """Return (model, (loss, gradients)) of one step of a small GPT."""
    model = gpt_model(transformer_config(**fields), spec, vocab_size=VOCABULARY)
    if state is not None:
        report = model.load_state_dict(state, strict=False)
        assert all(".alpha_" in key or ".beta_" in key for key in report.unexpected_keys)
        assert not report.missing_keys
    return model, step(model)


def step(model):
    """Return (loss, gradients) on fixed tokens with a fixed RNG state."""
    seed_everything()
    tokens = torch.randint(0, VOCABULARY, (BATCH, TOKENS))
    labels = tokens.roll(-1, dims=1)
    position_ids = torch.arange(TOKENS).expand(BATCH, -1)
    loss = model(tokens, position_ids, None, labels=labels).mean()
    loss.backward()
    return loss.detach(), gradients(model)


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [2, 4])
def test_identity_taps_are_vanilla_attention(window, groups):
    config = transformer_config(num_query_groups=groups)
    kv_shift = KVShiftConfig(init="identity", window=window)
    model, (loss, grads) = train(
        kv_shift_layer_spec(config, kv_shift=kv_shift), num_query_groups=groups
    )
    state = model.state_dict()
    taps = [name for name in grads if ".alpha_" in name or ".beta_" in name]
    assert len(taps) == 2 * 2 * window
    assert all(grads[name].any() for name in taps)  # they learn from the start

    _, (baseline_loss, baseline_grads) = train(
        vanilla_layer_spec(config), state, num_query_groups=groups
    )
    assert torch.equal(loss, baseline_loss)
    assert set(grads) - set(taps) == set(baseline_grads)
    for name, grad in baseline_grads.items():
        assert grad.any()
        assert torch.equal(grads[name], grad), name

    stock = get_gpt_layer_local_spec(normalization="RMSNorm")
    _, (stock_loss, stock_grads) = train(stock, state, num_query_groups=groups)
    assert_close_rel("loss", loss, stock_loss)
    assert set(stock_grads) == set(baseline_grads)
    for name, grad in stock_grads.items():
        assert_close_rel(name, grads[name], grad)

    randomize_taps(model)
    model.zero_grad()
    with pytest.raises(AssertionError, match="loss"):
        assert_close_rel("loss", step(model)[0], stock_loss)


@each_configuration
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_parameters(kv_shift, dtype):
    config = transformer_config(params_dtype=dtype)
    attention = build_attention(kv_shift, config)
    taps = {
        name: parameter
        for name, parameter in attention.named_parameters()
        if not name.startswith(("linear_",))
    }
    assert list(taps) == [name for names in tap_names(kv_shift).values() for name in names]
    assert sum(tap.numel() for tap in taps.values()) == kv_shift.parameters_per_group * GROUPS
    for name, tap in taps.items():
        assert tap.shape == (GROUPS,) and tap.dtype == dtype  # 1-D: no weight decay
        assert tap.tensor_model_parallel and tap.partition_dim == 0
        # With either Megatron would sum the gradients of different query groups.
        assert not getattr(tap, "sequence_parallel", False)
        assert not getattr(tap, "average_gradients_across_tp_domain", False)
        assert "layernorm" not in name


@pytest.mark.parametrize(
    ("layer_number", "seed", "perform"), [(1, 0, True), (2, 7, True), (3, 7, False)]
)
@each_configuration
def test_initial_taps_come_from_seed_and_layer_number(kv_shift, layer_number, seed, perform):
    kv_shift = KVShiftConfig(**{**vars(kv_shift), "seed": seed})
    config = transformer_config(num_layers=3, perform_initialization=perform)
    spec = kv_shift_layer_spec(config, kv_shift=kv_shift).layer_specs[0]
    attention = build_module(
        spec.submodules.self_attention, config=config, layer_number=layer_number
    )
    for name, value in initial_values(kv_shift, seed, layer_number, GROUPS).items():
        assert torch.equal(getattr(attention, name), value.float())


def test_the_shift_of_bf16_is_computed_in_fp32():
    attention = build_attention(KVShiftConfig(), transformer_config(params_dtype=torch.bfloat16))
    assert all(taps.dtype == torch.float32 for taps in attention.taps().values())
    x = hidden_states(torch.bfloat16)
    baseline = baseline_of(attention, transformer_config(params_dtype=torch.bfloat16))
    _, key, value = baseline.get_query_key_value_tensors(x)
    _, shifted_key, shifted_value = attention.get_query_key_value_tensors(x)
    for kind, raw, got in (("alpha", key, shifted_key), ("beta", value, shifted_value)):
        assert got.dtype == raw.dtype == torch.bfloat16
        first, second = (getattr(attention, f"{kind}_{j}").double()[:, None] for j in (1, 2))
        exact = first * raw.double()
        exact[1:] += second * raw[:-1].double()
        # A product of two bf16 numbers is exact in fp32: only the sum and the result round.
        error = (got.double() - exact).abs()
        assert (error <= exact.abs() * 2**-8 + 1e-6).all()
        in_bf16 = first.bfloat16() * raw
        in_bf16[1:] += second.bfloat16() * raw[:-1]
        assert ((in_bf16.double() - exact).abs() > exact.abs() * 2**-8 + 1e-6).any()


@each_configuration
def test_sharded_state_dict(kv_shift):
    attention = build_attention(kv_shift)
    sharded = attention.sharded_state_dict(prefix="self_attention.")
    # All of Megatron's own keys and shapes are there, unchanged.
    for key, theirs in baseline_of(attention).sharded_state_dict(prefix="self_attention.").items():
        ours = sharded.pop(key)
        assert type(ours) is type(theirs)
        if isinstance(theirs, ShardedTensor):
            assert (ours.key, ours.global_shape) == (theirs.key, theirs.global_shape)
    assert set(sharded) == {
        f"self_attention.{name}" for names in tap_names(kv_shift).values() for name in names
    }
    for key, tap in sharded.items():
        assert isinstance(tap, ShardedTensor)
        assert tap.key == key
        assert tap.global_shape == tap.local_shape == (GROUPS,)
        assert tap.global_offset == (0,)
        assert not tap.allow_shape_mismatch
        assert tap.data.data_ptr() == getattr(attention, key.rpartition(".")[2]).data_ptr()


def test_sharded_state_dict_under_a_layer_axis():
    attention = build_attention(KVShiftConfig())
    sharded = attention.sharded_state_dict("layers.", ((0, 3, 5),))
    tap = sharded["layers.alpha_1"]
    assert tap.global_shape == (5, GROUPS) and tap.global_offset == (3, 0)
    assert tap.prepend_axis_num == 1


def test_sharded_state_dict_of_a_model_names_every_layers_taps():
    config = transformer_config()
    model = gpt_model(config, kv_shift_layer_spec(config))
    sharded = model.sharded_state_dict()
    taps = {
        (tap.key, tap.global_shape, tap.global_offset)
        for name, tap in sharded.items()
        if ".alpha_" in name or ".beta_" in name
    }
    assert len(taps) == 4 * config.num_layers
    for _, global_shape, _ in taps:
        assert global_shape in ((config.num_layers, GROUPS), (GROUPS,))


@pytest.mark.parametrize(
    ("call", "named"),
    [
        (
            {"packed_seq_params": PackedSeqParams(qkv_format="thd", local_cp_size=1)},
            "local_cp_size",
        ),
        ({"inference_context": object()}, "inference_context"),
        ({"inference_params": object()}, "inference_context"),
    ],
)
def test_an_unsupported_call_is_refused(call, named):
    attention = build_attention(KVShiftConfig())
    with pytest.raises(ValueError, match=named):
        attention(hidden_states(), attention_mask=None, **call)


def test_a_context_parallel_group_of_the_batch_is_refused_in_a_whole_model():
    config = transformer_config()
    model = gpt_model(config, kv_shift_layer_spec(config))
    tokens = torch.zeros(1, TOKENS, dtype=torch.int64)
    lengths = torch.tensor([0, 4, TOKENS], dtype=torch.int32)
    packed = PackedSeqParams(
        qkv_format="thd",
        cu_seqlens_q=lengths,
        cu_seqlens_kv=lengths,
        max_seqlen_q=7,
        max_seqlen_kv=7,
        local_cp_size=1,
    )
    with pytest.raises(ValueError, match=r"local_cp_size.*--hybrid-context-parallel"):
        model(tokens, torch.arange(TOKENS)[None], None, packed_seq_params=packed)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("fused_single_qkv_rope", True),
        ("flash_decode", True),
        ("multi_latent_attention", True),
        ("experimental_attention_variant", "dsa"),
        ("tensor_model_parallel_size", 3),
    ],
)
def test_an_unsupported_configuration_is_refused_at_construction(name, value):
    config = transformer_config()
    spec = kv_shift_layer_spec(config).layer_specs[0].submodules.self_attention
    setattr(config, name, value)
    with pytest.raises(ValueError, match=name):
        build_module(spec, config=config, layer_number=1)


def test_an_unsplit_projection_is_refused():
    attention = build_attention(KVShiftConfig())
    with pytest.raises(ValueError, match="fused_single_qkv_rope"):
        attention.get_query_key_value_tensors(hidden_states(), split_qkv=False)


@pytest.mark.parametrize(
    "recompute",
    [
        {"recompute_granularity": "selective", "recompute_modules": ["core_attn"]},
        {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
        {
            "recompute_granularity": "full",
            "recompute_method": "block",
            "recompute_num_layers": 1,
        },
    ],
    ids=["selective", "full, uniform", "full, block"],
)
@pytest.mark.parametrize("dropout", [0.0, 0.2])
def test_recomputed_activations_give_the_same_gradients(recompute, dropout):
    fields = {"attention_dropout": dropout, "hidden_dropout": dropout}
    results = []
    for extra in ({}, recompute):
        config = transformer_config(**fields, **extra)
        seed_everything()
        model = gpt_model(config, kv_shift_layer_spec(config))
        randomize_taps(model)
        calls = []
        attention = model.decoder.layers[0].self_attention
        attention.core_attention.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        results.append((*step(model), len(calls)))
    (loss, grads, once), (other_loss, other_grads, twice) = results
    assert (once, twice) == (1, 2)  # it was indeed recomputed
    assert torch.equal(loss, other_loss)
    for name, grad in grads.items():
        assert torch.equal(grad, other_grads[name]), name


def test_taps_of_a_meta_model_are_drawn_once_it_has_storage():
    kv_shift = KVShiftConfig(window=3, seed=7)
    build = partial(build_module, layer_number=2)
    config = transformer_config()
    spec = kv_shift_layer_spec(config, kv_shift=kv_shift).layer_specs[0].submodules.self_attention
    with torch.device("meta"):
        surrounded = build(spec, config=config)
    meta_config = transformer_config(use_cpu_initialization=False, init_model_with_meta_device=True)
    configured = build(spec, config=meta_config)
    for attention in (surrounded, configured):
        taps = [name for names in tap_names(kv_shift).values() for name in names]
        assert all(getattr(attention, name).is_meta for name in taps)
        attention.to_empty(device="cpu")
        attention.reset_parameters()
        for name, value in initial_values(kv_shift, 7, 2, GROUPS).items():
            assert torch.equal(getattr(attention, name), value.float())
            assert getattr(attention, name).requires_grad


def test_taps_are_on_the_device_of_megatrons_weights():
    config = transformer_config(use_cpu_initialization=False)
    attention = build_attention(KVShiftConfig(), config)
    assert attention.alpha_1.device == attention.linear_qkv.weight.device


def test_a_token_sees_no_later_one():
    """The shift only looks back: a change at one token does not change any earlier output."""
    attention = build_attention(KVShiftConfig(window=4))
    x = hidden_states()
    output, _ = attention(x, attention_mask=None)
    for changed in range(TOKENS):
        other = x.clone()
        other[changed] += 1.0
        result, _ = attention(other, attention_mask=None)
        assert torch.equal(result[:changed], output[:changed])
        assert not torch.equal(result[changed], output[changed])


def test_samples_of_a_batch_do_not_mix():
    attention = build_attention(KVShiftConfig(window=3))
    x = hidden_states()
    output, _ = attention(x, attention_mask=None)
    for sample in range(BATCH):
        alone, _ = attention(x[:, sample : sample + 1], attention_mask=None)
        assert_close_rel(f"sample {sample}", output[:, sample : sample + 1], alone)


def test_it_is_a_self_attention():
    attention = build_attention(KVShiftConfig())
    assert isinstance(attention, KVShiftSelfAttention)
    assert attention.attention_type == "self"


def test_forward_takes_the_positional_arguments_of_megatrons():
    attention = build_attention(KVShiftConfig())
    x, rotary = hidden_states(), (angles(8), angles(8))
    expected, _ = attention(x, attention_mask=None, rotary_pos_emb=rotary)
    assert torch.equal(attention(x, None, None, None, rotary)[0], expected)
    positional = [name for name, parameter in signature(SelfAttention.forward).parameters.items()
                  if parameter.kind == parameter.POSITIONAL_OR_KEYWORD]  # fmt: skip
    # Behind them all, packed documents still reach the shift.
    edges = torch.tensor([0, 3, TOKENS], dtype=torch.int32)
    packed = PackedSeqParams("thd", edges, edges, None, None, TOKENS, TOKENS)
    values = {"packed_seq_params": packed, "rotary_pos_emb": rotary}
    given = [values.get(name) for name in positional[3:]]
    one = x[:, :1]
    expected, _ = attention(one, None, **values)
    assert torch.equal(attention(one, None, *given)[0], expected)
    assert not torch.equal(attention(one, None, rotary_pos_emb=rotary)[0], expected)
    with pytest.raises(TypeError, match="too many positional"):
        attention(one, None, *given, None)
    with pytest.raises(TypeError, match="multiple values"):
        attention(one, None, None, key_value_states=None)
    with pytest.raises(ValueError, match="inference_context"):
        attention(one, None, None, object())


def test_trained_taps_survive_a_state_dict_without_taps():
    kv_shift = KVShiftConfig(init="identity")
    model = gpt_model(transformer_config(), kv_shift_layer_spec(transformer_config(),
                      kv_shift=kv_shift), vocab_size=VOCABULARY)  # fmt: skip
    whole = model.state_dict()
    vanilla = {key: value for key, value in whole.items() if ".alpha_" not in key}
    vanilla = {key: value for key, value in vanilla.items() if ".beta_" not in key}
    # Untrained, it is the start from a vanilla model.
    assert not model.load_state_dict(vanilla).missing_keys
    randomize_taps(model)
    trained = {key: value.clone() for key, value in model.state_dict().items() if "_1" in key}
    for strict in (True, False):
        with pytest.raises(ValueError, match=r"which have been trained here.*reset_parameters"):
            model.load_state_dict(vanilla, strict=strict)
    # Parts without the attention's weights leave taps alone, and are reported as torch does.
    some = {key: value for key, value in vanilla.items() if "mlp" in key}
    assert any("alpha_1" in key for key in model.load_state_dict(some, strict=False).missing_keys)
    for key, value in trained.items():
        assert torch.equal(model.state_dict()[key], value)
    for layer in model.decoder.layers:
        layer.self_attention.reset_parameters()
    assert not model.load_state_dict(vanilla).missing_keys
