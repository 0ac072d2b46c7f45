"""The induction generator against the paper's walk and rule, and the flaw in its printed code."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from examples.induction.data import (
    NO_REPEAT,
    InductionSequences,
    draw_tokens,
    first_repeat,
    first_repeats,
    follow_successors,
    generate,
)

PLACEHOLDER = -1

seeds = st.integers(0, 2**64 - 1)
starts = st.integers(0, 2**42)
lengths = st.integers(1, 80)
vocabularies = st.integers(1, 600)


def faults(tokens: np.ndarray, vocab_size: int) -> list[str]:
    """Return what breaks the rule of Appendix D in one sequence; nothing for a right one."""
    found, successor = [], {}
    for i, token in enumerate(tokens.tolist()):
        if not 0 <= token < vocab_size:
            found.append(f"position {i} holds {token}, outside [0, {vocab_size})")
        if i:
            before = int(tokens[i - 1])
            if successor.setdefault(before, token) != token:
                found.append(f"position {i}: {before} is followed by {token}, not its successor")
    return found


def walk(draws: np.ndarray, vocab_size: int, corrected: bool) -> np.ndarray:
    """Follow Appendix D token by token, taking `draws[i]` if position i is free.

    Uncorrected, the branch for a drawn token that was seen before records nothing, as printed.
    """
    successor = [PLACEHOLDER] * vocab_size
    seen, sequence, closed = set(), [], False
    for i, draw in enumerate(draws.tolist()):
        if closed:
            sequence.append(successor[sequence[-1]])
            continue
        repeated = draw in seen
        if i and (corrected or not repeated):
            successor[sequence[-1]] = draw
        sequence.append(draw)
        seen.add(draw)
        closed = repeated
    return np.array(sequence)


def brute_first_repeat(tokens: np.ndarray) -> int:
    """Compute `first_repeat` by its definition."""
    values = tokens.tolist()
    return next((i for i in range(len(values) - 1) if values[i] in values[:i]), NO_REPEAT)


@settings(deadline=None)
@given(seeds, starts, lengths, vocabularies)
def test_every_repeated_token_is_followed_by_its_recorded_successor(seed, start, length, vocab):
    block = generate(seed, start, 8, length, vocab)
    assert block.dtype == np.int64 and block.shape == (8, length + 1)
    for tokens in block:
        assert faults(tokens, vocab) == []


@settings(deadline=None)
@given(seeds, starts, lengths, vocabularies)
def test_the_block_is_the_corrected_walk(seed, start, length, vocab):
    draws = draw_tokens(seed, start, 8, length + 1, vocab)
    expected = [walk(row, vocab, corrected=True) for row in draws]
    np.testing.assert_array_equal(follow_successors(draws), expected)


def test_the_printed_generator_is_caught():
    draws = draw_tokens(3, 0, 200, 65, 512)
    assert all(faults(walk(row, 512, corrected=True), 512) == [] for row in draws)
    printed = [walk(row, 512, corrected=False) for row in draws]
    caught = [faults(tokens, 512) != [] for tokens in printed]
    placeholder = [PLACEHOLDER in tokens for tokens in printed]
    assert sum(placeholder) > 100
    assert caught == placeholder


def test_a_wrong_successor_is_caught():
    tokens = generate(3, 0, 1, 64, 512)[0].copy()
    position = first_repeat(tokens) + 1
    tokens[position] = (tokens[position] + 1) % 512
    assert faults(tokens, 512)


@settings(deadline=None)
@given(seeds, starts, st.integers(1, 20), st.integers(0, 19), lengths, vocabularies)
def test_a_sequence_depends_only_on_seed_and_index(seed, start, count, row, length, vocab):
    row %= count
    alone = generate(seed, start + row, 1, length, vocab)[0]
    np.testing.assert_array_equal(generate(seed, start, count, length, vocab)[row], alone)


@settings(deadline=None, max_examples=25)
@given(seeds, st.lists(st.integers(0, 2000), min_size=1, max_size=8))
def test_random_access_gives_the_same_sequences(seed, indices):
    sequences = InductionSequences(seed, 16, 32)
    for index in indices:
        tokens, repeat = sequences[index]
        np.testing.assert_array_equal(tokens, generate(seed, index, 1, 16, 32)[0])
        assert repeat == brute_first_repeat(tokens)


@settings(deadline=None)
@given(st.lists(st.integers(0, 30), min_size=2, max_size=40))
def test_first_repeat_equals_its_definition(values):
    tokens = np.array(values)
    assert first_repeat(tokens) == brute_first_repeat(tokens)
    (r,), (p,) = first_repeats(tokens[None])
    if r != NO_REPEAT:
        assert p < r and tokens[p] == tokens[r]


def test_a_known_sequence():
    draws = np.array([[7, 3, 9, 4, 1, 9, 5, 5, 2, 8, 6]])
    np.testing.assert_array_equal(follow_successors(draws), [[7, 3, 9, 4, 1, 9, 4, 1, 9, 4, 1]])
    assert first_repeat(draws[0]) == 5
    assert first_repeat(np.array([1, 2, 3, 2])) == NO_REPEAT, "nothing follows the last token"


def test_seeds_differ_and_draws_are_uniform():
    first, second = (draw_tokens(seed, 0, 2000, 65, 512) for seed in (1, 2))
    assert (first == second).mean() < 0.01
    counts = np.bincount(first.ravel(), minlength=512)
    expected = first.size / 512
    chi_square = ((counts - expected) ** 2 / expected).sum()
    assert abs(chi_square - 511) < 6 * (2 * 511) ** 0.5


@pytest.mark.parametrize(
    ("arguments", "field"),
    [
        ((-1, 0, 1, 8, 8), "seed"),
        ((2**64, 0, 1, 8, 8), "seed"),
        ((1, -1, 1, 8, 8), "start"),
        ((1, 0, 0, 8, 8), "count"),
        ((1, 0, 1, 0, 8), "seq_length"),
        ((1, 0, 1, 8, 0), "vocab_size"),
    ],
)
def test_bad_arguments_name_the_field(arguments, field):
    with pytest.raises(ValueError, match=field):
        generate(*arguments)
