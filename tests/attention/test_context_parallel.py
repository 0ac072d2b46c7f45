"""shift_across_boundaries: packed documents give exactly what each gives alone."""

import math
from types import SimpleNamespace

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from kvshift_megatron.attention.context_parallel import (
    context_parallel_group,
    shift_across_boundaries,
)
from kvshift_megatron.attention.cp_chunks import PackedZigzagChunks, ZigzagChunks
from kvshift_megatron.attention.packed_sequences import document_positions
from kvshift_megatron.ops import kv_shift, shift_ref
from tests.support.compare import assert_close_rel
from tests.support.no_readback import no_readback

GROUPS, KEY_SIZE, VALUE_SIZE = 2, 3, 4


class FakeGroup:
    """A process group, as far as the code needs one before it sends anything."""

    def __init__(self, size, rank=0):
        self._size, self._rank = size, rank

    def size(self):
        return self._size

    def rank(self):
        return self._rank


ALONE = FakeGroup(1)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw(tokens, window, dtype=torch.float64, seed=0):
    """Draw (key, value, alpha, beta), normal: taps leave [0, 1] and do not sum to 1."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    x = [normal(tokens, 1, GROUPS, size).to(dtype) for size in (KEY_SIZE, VALUE_SIZE)]
    taps = [normal(window, GROUPS).to(torch.promote_types(dtype, torch.float32)) for _ in "kv"]
    return [tensor.requires_grad_() for tensor in (*x, *taps)]


def run(shift, tensors, seed=1):
    """Return (outputs, gradients of key, value, alpha, beta) for a fixed output gradient."""
    outputs = shift(*tensors)
    generator = torch.Generator().manual_seed(seed)
    grads = [
        torch.randn(x.shape, generator=generator, dtype=torch.float64).to(x.dtype) for x in outputs
    ]
    return outputs, torch.autograd.grad(outputs, tensors, grads)


def one_by_one(lengths):
    """Shift each document alone; tokens after the last one count as one more document."""

    def shift(key, value, alpha, beta):
        sizes = [*lengths, len(key) - sum(lengths)]
        return tuple(
            torch.cat([shift_ref(document, taps) for document in x.split(sizes)])
            for x, taps in ((key, alpha), (value, beta))
        )

    return shift


def packed(lengths):
    return lambda *tensors: shift_across_boundaries(*tensors, cumulative(lengths), ALONE)


def assert_as_alone(shift, lengths, window, after=0, seed=0):
    tensors = draw(sum(lengths) + after, window, seed=seed)
    outputs, grads = run(shift, tensors)
    expected_outputs, expected_grads = run(one_by_one(lengths), tensors)
    for name, actual, expected in zip(("key", "value"), outputs, expected_outputs):
        assert torch.equal(actual, expected), name
    for name, actual, expected in zip(("key", "value"), grads, expected_grads):
        assert_close_rel(f"gradient of {name}", actual, expected)
    for name, actual, expected in zip(("alpha", "beta"), grads[2:], expected_grads[2:]):
        for j in range(window):
            assert_close_rel(f"gradient of {name}_{j + 1}", actual[j], expected[j])


@pytest.mark.parametrize("window", [2, 3, 4])
@given(
    lengths=st.lists(st.integers(0, 6), min_size=1, max_size=6).filter(any),
    after=st.integers(0, 4),
    seed=st.integers(0, 2**16),
)
@example(lengths=[1, 1, 1, 1], after=0, seed=0)
@example(lengths=[2, 1, 3, 2], after=3, seed=0)  # windows longer than a document
@example(lengths=[0, 0, 5, 0, 4, 0, 0], after=1, seed=0)  # cu_seqlens with equal entries
@example(lengths=[7], after=0, seed=0)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_packed_document_gives_what_it_gives_alone(window, lengths, after, seed):
    assert_as_alone(packed(lengths), lengths, window, after, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("window", [2, 3, 4])
def test_outputs_are_the_same_bits_in_every_dtype(window, dtype):
    lengths = [3, 1, 0, 5]
    tensors = draw(11, window, dtype)
    for actual, expected in zip(packed(lengths)(*tensors), one_by_one(lengths)(*tensors)):
        assert actual.dtype == dtype
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("window", [2, 4])
def test_padding_after_a_document_does_not_change_it(window):
    """With padded lengths in cu_seqlens the real tokens equal those of the unpadded document."""
    real, whole = [3, 1, 5], [4, 4, 8]
    tensors = draw(sum(whole), window)
    is_real = torch.cat([torch.arange(p) < r for r, p in zip(real, whole)])
    grads = [torch.randn(sum(real), 1, GROUPS, size).double() for size in (KEY_SIZE, VALUE_SIZE)]
    outputs = [x[is_real] for x in packed(whole)(*tensors)]
    outcome = torch.autograd.grad(outputs, tensors, grads)
    short = [x.detach()[is_real].requires_grad_() for x in tensors[:2]] + tensors[2:]
    expected_outputs = one_by_one(real)(*short)
    expected = torch.autograd.grad(expected_outputs, short, grads)
    for actual, wanted in zip(outputs, expected_outputs):
        assert torch.equal(actual, wanted)
    for name, actual, wanted in zip(("key", "value"), outcome, expected):
        assert_close_rel(f"gradient of {name}", actual[is_real], wanted)
        assert not actual[~is_real].any(), f"{name}: a gradient reaches the padding"
    for name, actual, wanted in zip(("alpha", "beta"), outcome[2:], expected[2:]):
        assert_close_rel(f"gradient of {name}", actual, wanted)


def poisoned_run(shift, tensors, where, poison):
    """Return outputs and gradients of key and value, with inputs and output gradients poisoned."""
    key, value, alpha, beta = tensors
    key, value = key.detach().clone(), value.detach().clone()
    key[where], value[where] = poison, poison
    inputs = [key.requires_grad_(), value.requires_grad_()]
    outputs = shift(*inputs, alpha, beta)
    generator = torch.Generator().manual_seed(5)
    grads = [torch.randn(x.shape, generator=generator, dtype=x.dtype) for x in outputs]
    for grad in grads:
        grad[where] = poison
    return [*outputs, *torch.autograd.grad(outputs, inputs, grads)]


def assert_poison_stays(shift, lengths, victim, window, poison, after=2):
    """Poison document number `victim`, or the tokens after the last document."""
    tokens = sum(lengths) + after
    tensors = draw(tokens, window)
    start = sum(lengths[:victim])
    where = torch.zeros(tokens, dtype=torch.bool)
    where[start : start + [*lengths, after][victim]] = True
    clean = poisoned_run(shift, tensors, slice(0, 0), 0.0)
    results = poisoned_run(shift, tensors, where, poison)
    for name, actual, expected in zip(("K", "V", "dK", "dV"), results, clean):
        assert torch.equal(actual[~where], expected[~where]), f"{name}: {poison} spread"


@pytest.mark.parametrize("poison", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("victim", range(5))
@pytest.mark.parametrize("window", [2, 4])
def test_nan_and_infinity_stay_in_their_document(window, victim, poison):
    lengths = [3, 1, 2, 4]
    assert_poison_stays(packed(lengths), lengths, victim, window, poison)


def test_positions_count_from_each_document():
    document, position = document_positions(torch.tensor([0, 3, 3, 4, 8]), 10)
    assert document.tolist() == [0, 0, 0, 2, 3, 3, 3, 3, 4, 4]
    assert position.tolist() == [0, 1, 2, 0, 0, 1, 2, 3, 0, 1]


def with_wrong_positions(error):
    """Return a shift whose positions went through `error`."""

    def shift_of(lengths):
        def shift(key, value, alpha, beta):
            position = document_positions(cumulative(lengths), len(key))[1]
            return kv_shift(key, value, alpha, beta, error(position))

        return shift

    return shift_of


def multiply_by_mask(lengths):
    def shift(key, value, alpha, beta):
        position = document_positions(cumulative(lengths), len(key))[1]
        outputs = []
        for x, taps in ((key, alpha), (value, beta)):
            out = taps[0][:, None] * x
            for j in range(1, len(taps)):
                previous = x.roll(j, 0) * (position >= j).view(-1, 1, 1, 1)
                out = out + taps[j][:, None] * previous
            outputs.append(out)
        return tuple(outputs)

    return shift


@pytest.mark.parametrize(
    "error",
    [lambda _: None, lambda p: p + 1, lambda p: p - 1, lambda p: torch.arange(len(p))],
    ids=["cu_seqlens ignored", "one too many", "one too few", "one document"],
)
def test_planted_errors_are_caught(error):
    lengths = [3, 1, 5]
    with pytest.raises(AssertionError, match="key"):
        assert_as_alone(with_wrong_positions(error)(lengths), lengths, window=3)


def test_a_mask_that_multiplies_is_caught():
    lengths = [3, 1, 2, 4]
    with pytest.raises(AssertionError, match="spread"):
        assert_poison_stays(multiply_by_mask(lengths), lengths, 1, 2, math.nan)


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize(
    ("tokens", "window"), [(2, 3), (4, 4), (7, 2)], ids=["short", "one short", "odd"]
)
def test_a_chunk_too_short_for_the_window_is_refused(tokens, window, ranks):
    with pytest.raises(ValueError, match=r"^seq_length.*--context-parallel-size") as caught:
        shift_across_boundaries(*draw(tokens, window), None, FakeGroup(ranks))
    assert f"{tokens} tokens" in str(caught.value)
    assert f"window of {window}" in str(caught.value)
    assert "--seq-length" in str(caught.value)


def test_the_shortest_possible_chunk_is_accepted():
    ZigzagChunks(6, 3, torch.device("cpu"))
    ZigzagChunks(2, 1, torch.device("cpu"))


@pytest.mark.parametrize(
    ("ranks", "lengths", "window"),
    [
        (2, [8, 6], 2),  # not a multiple of 4
        (4, [8, 12], 2),  # a multiple of 4, not of 8
        (2, [8, 4], 3),  # chunks of 2 and 1, looking back 2
        (4, [16], 4),  # chunks of 2, looking back 3
    ],
)
def test_documents_that_cannot_be_cut_are_refused(ranks, lengths, window):
    with pytest.raises(RuntimeError, match=rf"cu_seqlens.*multiple of {2 * ranks}"):
        shift_across_boundaries(
            *draw(sum(lengths) // ranks, window), cumulative(lengths), FakeGroup(ranks)
        )


@pytest.mark.parametrize(
    ("ranks", "lengths", "back"), [(2, [8, 4, 0], 1), (4, [0, 24, 24], 3), (2, [8, 16], 2)]
)
def test_documents_that_can_be_cut_are_accepted_without_reading_them_back(ranks, lengths, back):
    cu_seqlens, tokens = cumulative(lengths), sum(lengths) // ranks
    with no_readback():
        PackedZigzagChunks(cu_seqlens, tokens, ranks, back)


def test_the_configuration_not_the_group_decides_about_context_parallelism():
    """The group may exist for another model of the run, such as an encoder."""
    groups = SimpleNamespace(cp=object())
    assert context_parallel_group(SimpleNamespace(context_parallel_size=1), groups) is None
    assert context_parallel_group(SimpleNamespace(context_parallel_size=2), groups) is groups.cp
