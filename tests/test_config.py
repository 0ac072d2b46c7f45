"""KVShiftConfig: its refusals, its number of parameters and its description."""

import dataclasses
import itertools

import pytest

from kvshift_megatron import KVShiftConfig


def test_the_default_is_the_papers_definition():
    config = KVShiftConfig()
    assert dataclasses.asdict(config) == {
        "variant": "free",
        "window": 2,
        "shift_keys": True,
        "shift_values": True,
        "init": "uniform",
        "seed": None,
    }
    assert config.parameters_per_group == 4


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"variant": "sigmoid"}, "variant='sigmoid'"),
        ({"variant": None}, "variant=None"),
        ({"init": "zeros"}, "init='zeros'"),
        ({"window": 1}, "window=1"),
        ({"window": 0}, "window=0"),
        ({"window": 5}, "window=5"),
        ({"window": -2}, "window=-2"),
        ({"window": 2.0}, "window=2.0"),
        ({"window": "2"}, "window='2'"),
        ({"window": True}, "window=True"),
        ({"variant": "gate", "window": 3}, "variant='gate'"),
        ({"variant": "gate", "window": 4}, "variant='gate'"),
        ({"variant": "gate", "init": "identity"}, "init='identity'"),
        ({"variant": "clamp", "window": 3}, "init='uniform'"),
        ({"shift_keys": False, "shift_values": False}, "shift_keys and shift_values"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 1.5}, "seed=1.5"),
        ({"seed": True}, "seed=True"),
        ({"seed": "1"}, "seed='1'"),
    ],
)
def test_an_impossible_field_is_refused_by_name(fields, named):
    with pytest.raises(ValueError) as caught:
        KVShiftConfig(**fields)
    message = str(caught.value)
    assert message.startswith(named)
    assert "\n" not in message


def test_exactly_the_possible_combinations_are_accepted():
    accepted = set()
    for combination in itertools.product(
        ("free", "gate", "clamp"), (2, 3, 4), (True, False), (True, False), ("uniform", "identity")
    ):
        variant, window, keys, values, init = combination
        try:
            KVShiftConfig(variant, window, keys, values, init)
        except ValueError:
            continue
        accepted.add(combination)
    # Times 3 for keys, values or both. free: 3 windows times 2 inits; clamp: the same without
    # uniform above window 2; gate: one window and one init.
    assert len(accepted) == 3 * (3 * 2 + 4 + 1)
    assert {(window, init) for variant, window, _, _, init in accepted if variant == "gate"} == {
        (2, "uniform")
    }
    assert not any(not keys and not values for _, _, keys, values, _ in accepted)


@pytest.mark.parametrize(
    ("fields", "count", "phrase"),
    [
        ({}, 4, "free, window 2, keys and values"),
        ({"window": 3}, 6, "free, window 3, keys and values"),
        ({"window": 4, "shift_keys": False}, 4, "free, window 4, values"),
        ({"shift_values": False}, 2, "free, window 2, keys"),
        ({"variant": "gate"}, 2, "gate, window 2, keys and values"),
        ({"variant": "gate", "shift_keys": False}, 1, "gate, window 2, values"),
        (
            {"variant": "clamp", "window": 4, "init": "identity"},
            8,
            "clamp, window 4, keys and values",
        ),
    ],
)
def test_parameters_and_description(fields, count, phrase):
    config = KVShiftConfig(**fields)
    assert config.parameters_per_group == count
    assert config.describe() == phrase


@pytest.mark.parametrize(
    ("layers", "groups", "taps"),
    [(28, 16, 1792), (32, 4, 512), (32, 32, 4096), (40, 40, 6400), (48, 4, 768)],
)
def test_the_papers_models_have_as_many_taps_as_the_paper_says(layers, groups, taps):
    assert layers * groups * KVShiftConfig().parameters_per_group == taps


def test_it_can_be_shared_by_layers():
    config = KVShiftConfig(seed=7)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.window = 3
    assert config == KVShiftConfig(seed=7) and hash(config) == hash(KVShiftConfig(seed=7))
