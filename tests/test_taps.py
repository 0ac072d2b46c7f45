"""Names, initial values and formulas of the taps."""

import sys
from argparse import Namespace
from types import ModuleType

import pytest
import torch

from kvshift_megatron import KVShiftConfig
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


def test_clamped_taps_stay_in_zero_to_one_and_learn_at_the_ends():
    parameters = torch.tensor([[-0.5, 0.0, 0.25], [1.0, 1.5, 0.75]], requires_grad=True)
    taps = taps_from_parameters(KVShiftConfig(variant="clamp"), parameters)
    assert torch.equal(taps, torch.tensor([[0.0, 0.0, 0.25], [1.0, 1.0, 0.75]]))
    taps.sum().backward()
    # A tap exactly at an end still has a gradient; one beyond it does not.
    assert torch.equal(parameters.grad, torch.tensor([[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]))


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
