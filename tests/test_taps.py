"""Names, initial values and formulas of the taps."""

import sys
from argparse import Namespace
from types import ModuleType
from typing import get_args

import pytest
import torch

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.config import Variant
from kvshift_megatron.taps import initial_values, resolve_seed, tap_names, taps_from_parameters

GROUPS = 64
WINDOWS = (2, 3, 4)
PINNED = [
    # seed 1234, layer 1, two query groups: alpha_1, alpha_2, beta_1, beta_2
    [0.32845444857416195, 0.6928302775921099],
    [0.671545551425838, 0.3071697224078901],
    [0.5082849915339157, 0.5061497526252088],
    [0.4917150084660843, 0.4938502473747912],
]


def values(seed=5, layer_number=3, groups=GROUPS, **fields):
    return initial_values(KVShiftConfig(**fields), seed, layer_number, groups)


def stacked(drawn, kind):
    return torch.stack([drawn[name] for name in sorted(drawn) if name.startswith(kind)])


@pytest.mark.parametrize(
    ("fields", "names"),
    [
        ({}, {"alpha": ("alpha_1", "alpha_2"), "beta": ("beta_1", "beta_2")}),
        ({"window": 3, "shift_values": False}, {"alpha": ("alpha_1", "alpha_2", "alpha_3")}),
        (
            {"window": 4, "shift_keys": False, "variant": "clamp", "init": "identity"},
            {"beta": ("beta_1", "beta_2", "beta_3", "beta_4")},
        ),
        ({"variant": "gate"}, {"alpha": ("alpha_logit",), "beta": ("beta_logit",)}),
        ({"variant": "gate", "shift_keys": False}, {"beta": ("beta_logit",)}),
    ],
)
def test_names(fields, names):
    config = KVShiftConfig(**fields)
    assert tap_names(config) == names
    drawn = values(**fields)
    assert list(drawn) == [name for group in names.values() for name in group]
    assert len(drawn) == config.parameters_per_group
    assert all(v.shape == (GROUPS,) and v.dtype == torch.float64 for v in drawn.values())


@pytest.mark.parametrize(
    ("window", "variant"), [*((window, "free") for window in WINDOWS), (2, "clamp")]
)
def test_uniform_taps_sum_to_one_and_all_but_the_last_are_in_zero_to_one(window, variant):
    drawn = values(window=window, variant=variant)
    for kind in ("alpha", "beta"):
        taps = stacked(drawn, kind)
        torch.testing.assert_close(taps.sum(0), torch.ones(GROUPS, dtype=torch.float64))
        first = taps[:-1]
        assert (first >= 0).all() and (first < 1).all()
        # Uniform on (0, 1): mean 1/2 within 5 standard errors, both ends reached, no duplicates.
        assert abs(first.mean() - 0.5) < 5 * (1 / 12 / first.numel()) ** 0.5
        assert first.min() < 0.1 and first.max() > 0.9
        assert first.unique().numel() == first.numel()
    assert not torch.equal(stacked(drawn, "alpha"), stacked(drawn, "beta"))


@pytest.mark.parametrize("window", WINDOWS)
def test_switching_keys_or_values_off_does_not_change_the_others_taps(window):
    both = values(window=window)
    for fields in ({"shift_values": False}, {"shift_keys": False}):
        for name, tap in values(window=window, **fields).items():
            assert torch.equal(tap, both[name])
    gate = values(variant="gate")
    for fields in ({"shift_values": False}, {"shift_keys": False}):
        for name, tap in values(variant="gate", **fields).items():
            assert torch.equal(tap, gate[name])


def test_the_variants_start_from_the_same_draw():
    free, gate, clamp = values(), values(variant="gate"), values(variant="clamp")
    for kind in ("alpha", "beta"):
        torch.testing.assert_close(torch.sigmoid(gate[f"{kind}_logit"]), free[f"{kind}_1"])
        assert torch.equal(clamp[f"{kind}_1"], free[f"{kind}_1"])


@pytest.mark.parametrize("window", WINDOWS)
def test_identity(window):
    drawn = values(window=window, init="identity")
    for kind in ("alpha", "beta"):
        taps = stacked(drawn, kind)
        assert (taps[0] == 1).all() and (taps[1:] == 0).all() and len(taps) == window


def test_values_depend_on_seed_and_layer_alone():
    torch.manual_seed(1)
    before = values()
    torch.manual_seed(2)
    for name, tap in values().items():
        assert torch.equal(tap, before[name])
    for other in (
        values(seed=6),
        values(layer_number=4),
        values(seed=0),
        values(seed=3, layer_number=5),
    ):
        for name, tap in other.items():
            assert not (tap == before[name]).any()


def test_the_draw_does_not_change_from_release_to_release():
    drawn = values(seed=1234, layer_number=1, groups=2)
    torch.testing.assert_close(
        torch.stack(list(drawn.values())), torch.tensor(PINNED, dtype=torch.float64)
    )


def test_free_parameters_are_the_taps_themselves():
    parameters = torch.randn(3, 5)
    assert torch.equal(taps_from_parameters(KVShiftConfig(window=3), parameters), parameters)


def test_gate_taps_sum_to_one():
    parameters = torch.randn(1, 5, requires_grad=True)
    taps = taps_from_parameters(KVShiftConfig(variant="gate"), parameters)
    expected = 1 / (1 + torch.exp(-parameters[0].detach().double()))
    torch.testing.assert_close(taps.detach().double(), torch.stack((expected, 1 - expected)))
    taps[0].sum().backward()
    assert parameters.grad.all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_clamped_taps_are_torchs_clamp_and_learn_everywhere(dtype):
    generator = torch.Generator().manual_seed(1)
    values = torch.randn(2, 999, generator=generator, dtype=dtype) * 10.0 ** torch.arange(-3, 6)[
        torch.arange(999) % 9
    ].to(dtype)
    values[:, :2] = torch.tensor([0.0, 1.0])
    parameters = values.requires_grad_()
    taps = taps_from_parameters(KVShiftConfig(variant="clamp"), parameters)
    assert torch.equal(taps, parameters.clamp(0.0, 1.0))
    weight = torch.randn(taps.shape, generator=generator, dtype=dtype)
    (taps * weight).sum().backward()
    assert torch.equal(parameters.grad, weight)


def test_a_gate_learns_at_any_logit():
    logits = torch.tensor([[-200.0, -30.0, -9.3, -9.0, 0.3, 9.0, 9.3, 30.0, 200.0]])
    logits.requires_grad_()
    taps = taps_from_parameters(KVShiftConfig(variant="gate"), logits)
    assert torch.equal(taps[0], torch.sigmoid(logits[0]))
    assert torch.equal(taps[1], 1.0 - torch.sigmoid(logits[0]))
    exact = torch.sigmoid(logits.detach().double())
    expected = (exact * torch.sigmoid(-logits.detach().double())).clamp(min=1e-4)
    for tap, sign in zip(taps, (1, -1), strict=True):
        (grad,) = torch.autograd.grad(tap.sum(), logits, retain_graph=True)
        torch.testing.assert_close(sign * grad.double(), expected, rtol=1e-3, atol=0)
    # torch's own derivative, which is 0 at a logit of 30.
    (grad,) = torch.autograd.grad(torch.sigmoid(logits).sum(), logits)
    assert not grad[0, -2]


# Parameters from which a tap must be able to come back. A new variant needs a row.
FAR_OUT = {"free": (-3.0, 3.0), "gate": (-20.0, 20.0), "clamp": (-0.5, 1.5)}


def train(taps_of, start: float, rows: int, optimizer: str) -> list[torch.Tensor]:
    """Train parameters from `start` towards taps (0.3, 0.7); return the taps before and after.

    Gradients are as small as in training, so that Adam's epsilon counts.
    """
    parameters = torch.full((rows, 4), start, requires_grad=True)
    target = torch.tensor([[0.3], [0.7]])
    adam = torch.optim.Adam([parameters], lr=0.05, betas=(0.9, 0.95), eps=1e-8)
    chosen = adam if optimizer == "adam" else torch.optim.SGD([parameters], lr=0.05)
    scale = 1e-3 if optimizer == "adam" else 1.0
    before = taps_of(parameters).detach().clone()
    for _ in range(1500):
        chosen.zero_grad()
        (scale * (taps_of(parameters) - target).square().sum()).backward()
        chosen.step()
    return [before, taps_of(parameters).detach(), target.expand(2, 4)]


@pytest.mark.parametrize("end", [0, 1])
@pytest.mark.parametrize(
    ("variant", "optimizer"),
    # SGD has no scale of its own: it climbs a sigmoid's slope in its time, not in a test's.
    [*((variant, "adam") for variant in get_args(Variant)), ("free", "sgd"), ("clamp", "sgd")],
)
def test_no_variant_has_a_region_that_a_tap_cannot_leave(variant, end, optimizer):
    kv_shift = KVShiftConfig(variant=variant)
    rows = kv_shift.parameters_per_group // 2
    start = FAR_OUT[variant][end]
    before, after, target = train(
        lambda parameters: taps_from_parameters(kv_shift, parameters), start, rows, optimizer
    )
    assert not torch.allclose(before, target, atol=0.2)
    torch.testing.assert_close(after, target, rtol=0, atol=0.05)


@pytest.mark.parametrize("end", [0, 1])
def test_a_dead_region_is_noticed(end):
    """Train torch's own clamp and sigmoid: neither comes back."""
    for taps_of, start, rows in (
        (lambda p: p.clamp(0.0, 1.0), FAR_OUT["clamp"][end], 2),
        (lambda p: torch.stack((p[0].sigmoid(), 1 - p[0].sigmoid())), FAR_OUT["gate"][end], 1),
    ):
        before, after, _ = train(taps_of, start, rows, "adam")
        assert torch.allclose(before, after, atol=1e-3)


@pytest.mark.parametrize("variant", get_args(Variant))
def test_a_gradient_does_not_depend_on_how_the_batch_is_cut(variant):
    """Parts of a batch, on ranks or one after the other, may pull a tap in opposite directions."""
    kv_shift = KVShiftConfig(variant=variant)
    rows = kv_shift.parameters_per_group // 2
    parts = torch.randn(8, 2, 5, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    for start in (*FAR_OUT[variant], 0.5):

        def gradient(weight, start=start):
            parameters = torch.full((rows, 5), start, dtype=torch.float64, requires_grad=True)
            (taps_from_parameters(kv_shift, parameters) * weight).sum().backward()
            return parameters.grad

        torch.testing.assert_close(sum(map(gradient, parts)), gradient(parts.sum(0)))
        if variant == "clamp" and start != 0.5:
            # The planted error: let only those pass that point inwards.
            outwards = 1 if start < 0 else -1
            inwards = sum((outwards * gradient(p)).clamp(max=0) * outwards for p in parts)
            at_once = (outwards * gradient(parts.sum(0))).clamp(max=0) * outwards
            assert not torch.allclose(inwards, at_once)


@pytest.fixture
def training_args(monkeypatch):
    """Return a function that sets Megatron's parsed arguments; None for "not parsed yet"."""

    def set_args(args):
        module = ModuleType("megatron.training.global_vars")
        module.get_args = lambda: args
        monkeypatch.setitem(sys.modules, module.__name__, module)

    return set_args


def test_seed_of_the_configuration_comes_first(training_args):
    training_args(Namespace(seed=99))
    assert resolve_seed(KVShiftConfig(seed=7)) == 7
    assert resolve_seed(KVShiftConfig(seed=0)) == 0


def test_seed_of_megatron_comes_second(training_args):
    training_args(Namespace(seed=99))
    assert resolve_seed(KVShiftConfig()) == 99
    training_args(Namespace(seed=0))
    assert resolve_seed(KVShiftConfig()) == 0


def test_seed_is_megatrons_default_otherwise(training_args, monkeypatch):
    for args in (None, Namespace(), Namespace(seed=None)):
        training_args(args)
        assert resolve_seed(KVShiftConfig()) == 1234
    monkeypatch.delitem(sys.modules, "megatron.training.global_vars")
    torch.manual_seed(5)
    assert resolve_seed(KVShiftConfig()) == 1234
