"""Taps that have left [0, 1] come back under Megatron's own optimizers."""

import pytest
import torch
from megatron.core.distributed import finalize_model_grads

from kvshift_megatron import KVShiftConfig, taps
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from tests.distributed import engine
from tests.distributed.cases import Case, Model
from tests.distributed.models import VOCAB_SIZE

# What a layer is taught, and where its parameters start: one step of noise from identity taps, and
# a gate whose sigmoid is flat in fp32.
_TAUGHT = (0.6, 0.4)
_START = {"clamp": (1.02, -0.02), "gate": (18.0,)}
_LEARNING_RATE = {"clamp": 0.05, "gate": 1.2}
_BF16 = {"bf16": True}
_DISTRIBUTED = {"distributed_optimizer": True}
# Name -> (variant, KVSHIFT_IMPLEMENTATION, optimizer). An implementation sees the taps alone, and
# an optimizer their parameters alone: not every pair is needed.
_CASES = {
    "clamp": ("clamp", "auto", {}),
    "clamp, eager": ("clamp", "eager", {}),
    "clamp, fp32 copies": ("clamp", "auto", _BF16),
    "clamp, shards": ("clamp", "auto", _DISTRIBUTED),
    "clamp, shards of fp32 copies": ("clamp", "auto", _BF16 | _DISTRIBUTED),
    "gate, shards of fp32 copies": ("gate", "auto", _BF16 | _DISTRIBUTED),
}


def _attentions(chunk):
    return [m for m in chunk.modules() if isinstance(m, KVShiftSelfAttention)]


@torch.no_grad()
def _set_taps(chunk, values):
    for attention in _attentions(chunk):
        for names in taps.tap_names(attention.kv_shift).values():
            for name, value in zip(names, values, strict=True):
                getattr(attention, name).fill_(value)


def _trained(variant, steps=45, bf16=False, distributed_optimizer=False):
    """Train nothing but taps towards a model with the taught ones.

    Returns:
        (applied taps [all], first loss, last loss).
    """
    init = "identity" if variant == "clamp" else "uniform"
    kv_shift = KVShiftConfig(variant=variant, init=init)
    model = Model(variant, 2, kv_shift, transformer={"num_layers": 1}, bf16=bf16)
    case = Case(model, distributed_optimizer=distributed_optimizer)
    chunks = engine.build(case)
    for name, parameter in chunks[0].named_parameters():
        parameter.requires_grad_(taps.tap_in_key(f".{name}") is not None)
    (chunk,), optimizer = engine.prepare(case, chunks)
    tokens = torch.randint(VOCAB_SIZE, (4, 16), generator=torch.Generator().manual_seed(1))
    positions = torch.arange(16).expand_as(tokens)
    first, second = _TAUGHT
    logit = torch.logit(torch.tensor(first)).item()
    _set_taps(chunk, (logit,) if variant == "gate" else (first, second))
    taught = chunk(tokens, positions, None).detach().float()
    _set_taps(chunk, _START[variant])
    optimizer.reload_model_params()
    for group in optimizer.param_groups:
        group["lr"] = _LEARNING_RATE[variant]
        group["weight_decay"] = 0.0
        # Megatron's default; the engine's would hide a small slope.
        group["eps"] = 1e-8
    losses = []
    for _ in range(steps):
        chunk.zero_grad_buffer()
        optimizer.zero_grad()
        loss = (chunk(tokens, positions, None).float() - taught).square().mean()
        losses.append(loss.item())
        optimizer.scale_loss(loss).backward()
        finalize_model_grads([chunk])
        assert optimizer.step()[0]
    applied = [t.detach() for a in _attentions(chunk) for t in a.taps().values()]
    return torch.cat(applied, dim=1), losses[0], losses[-1]


@pytest.mark.parametrize(("variant", "implementation", "optimizer"), _CASES.values(), ids=_CASES)
def test_training_finds_taps_inside(megatron_rank, monkeypatch, variant, implementation, optimizer):
    monkeypatch.setenv("KVSHIFT_IMPLEMENTATION", implementation)
    applied, first, last = _trained(variant, **optimizer)
    expected = torch.tensor(_TAUGHT)[:, None].expand_as(applied)
    assert last < first / 20
    torch.testing.assert_close(applied, expected, rtol=0, atol=0.15)


@pytest.mark.parametrize("variant", _START)
def test_a_dead_region_is_noticed(megatron_rank, monkeypatch, variant):
    """Take torch's own derivatives for the package's."""
    monkeypatch.setattr(taps, "_with_slope", lambda value, parameters, slope: value)
    applied, first, last = _trained(variant, steps=5)
    assert last == first and torch.equal(applied[0], torch.ones(4))
