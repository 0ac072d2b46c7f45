"""Packed documents on context-parallel ranks give what each document gives alone."""

import pytest

from tests.distributed.packed import SEEDS, document_lengths
from tests.distributed.properties import PACKED
from tests.distributed.test_layouts import taps_joined
from tests.support.compare import assert_close_rel

pytestmark = pytest.mark.slow

_CASES = [(world, case) for world in (2, 4) for case in PACKED[world]]


def cases(planted: bool):
    return pytest.mark.parametrize(
        ("world_size", "case"),
        [
            pytest.param(world, case, id=f"{world}-{case.name}")
            for world, case in _CASES
            if bool(case.planted_error) == planted
        ],
    )


def compare_seeds(actual: dict, expected: dict, window: int) -> None:
    for seed in SEEDS:
        got, want = taps_joined(actual[seed]), taps_joined(expected[seed])
        assert got.keys() == want.keys()
        for name in want:
            # At another tensor-parallel size ranks hold other slices of the weights.
            if got[name].shape == want[name].shape:
                drawn = f"seed {seed}, documents {document_lengths(seed, window)}"
                assert_close_rel(f"{drawn}: {name}", got[name], want[name])


def compare(results, world_size, case) -> None:
    alone = results(1, f"property:packed-{case.model.name}-tp1")
    packed = results(world_size, f"property:packed-{case.name}")
    compare_seeds(packed, alone, case.model.kv_shift.window)


@cases(planted=False)
def test_each_document_gives_what_it_gives_alone(results, world_size, case):
    compare(results, world_size, case)


@cases(planted=True)
def test_planted_error_is_noticed(results, world_size, case):
    with pytest.raises(AssertionError, match="seed"):
        compare(results, world_size, case)


def test_the_seeds_draw_different_documents():
    drawn = [tuple(document_lengths(seed, 2)) for seed in SEEDS]
    assert len(set(drawn)) > len(SEEDS) // 2
    assert any(len(lengths) > 1 for lengths in drawn)
