"""blockwise_attention against float64, and the places of tokens against Megatron's layout."""

import math
from functools import partial

import pytest
import torch
from megatron.core.models.common.embeddings.rope_utils import _get_thd_freqs_on_this_cp_rank
from torch.utils.checkpoint import checkpoint

from kvshift_megatron.specs.te_free import blockwise_attention as module
from kvshift_megatron.specs.te_free.blockwise_attention import (
    Places,
    blockwise_attention,
    places_on_rank,
)
from tests.support.compare import assert_close_rel

HEADS, HEAD_SIZE, SCALE = 4, 8, 0.3
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    monkeypatch.setattr(module, "_BLOCK", 4)


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


def draw(tokens, groups=2, batch=1, heads=HEADS, size=HEAD_SIZE):
    generator = torch.Generator().manual_seed(0)
    return [
        torch.randn(tokens, batch, n, size, generator=generator).requires_grad_()
        for n in (heads, groups, groups)
    ]


def one_document_each(lengths):
    """Return the places of whole documents, from loops."""
    document = [d for d, length in enumerate(lengths) for _ in range(length)]
    position = [p for length in lengths for p in range(length)]
    return Places(torch.tensor(document), torch.tensor(position))


def dense(query, key, value, query_places, key_places, window=None, keep=None):
    """Apply the formula in float64, with a mask from loops; `keep` multiplies probabilities."""
    allowed = torch.zeros(len(query), len(key), dtype=torch.bool)
    for i, (d, p) in enumerate(zip(query_places.document, query_places.position)):
        for j, (e, q) in enumerate(zip(key_places.document, key_places.position)):
            allowed[i, j] = d == e and 0 <= p - q <= (len(key) if window is None else window)
    repeats = query.size(2) // key.size(2)
    query, key, value = query.double(), key.double(), value.double()
    key, value = (x.repeat_interleave(repeats, dim=2) for x in (key, value))
    scores = SCALE * torch.einsum("ibnh,jbnh->bnij", query, key)
    probabilities = scores.masked_fill(~allowed, -math.inf).softmax(-1)
    if keep is not None:
        probabilities = probabilities * keep
    return torch.einsum("bnij,jbnh->ibnh", probabilities, value)


def run(tensors, attend):
    output = attend(*tensors)
    generator = torch.Generator().manual_seed(1)
    grad = torch.randn(output.shape, generator=generator, dtype=torch.float64).to(output.dtype)
    torch.rand(5)  # the generator's state changes before the backward pass
    names = ("gradient of query", "gradient of key", "gradient of value")
    return {"output": output, **dict(zip(names, torch.autograd.grad(output, tensors, grad)))}


def assert_same(actual, expected):
    for name, wanted in expected.items():
        assert_close_rel(name, actual[name], wanted)


def blockwise(places, key_places=None, dropout=0.0, window=None):
    return lambda query, key, value: blockwise_attention(
        query, key, value, places, places if key_places is None else key_places,
        scale=SCALE, dropout=dropout, window=window,
    )  # fmt: skip


@pytest.mark.parametrize("groups", [4, 2, 1])
@pytest.mark.parametrize("window", [None, 1, 2, 50])
@pytest.mark.parametrize("lengths", [[13], [5, 1, 7, 3], [1, 1, 2]], ids=str)
def test_equals_the_formula_in_value_and_gradient(lengths, window, groups):
    places, tensors = one_document_each(lengths), draw(sum(lengths), groups)
    actual = run(tensors, blockwise(places, window=window))
    expected = run(tensors, lambda q, k, v: dense(q, k, v, places, places, window=window))
    assert actual["output"].shape == tensors[0].shape
    assert_same(actual, expected)


def test_a_query_that_sees_itself_only_gives_its_value():
    query, key, value = draw(9, groups=HEADS)
    output = blockwise(one_document_each([4, 5]), window=0)(query, key, value)
    assert_close_rel("output", output, value)


def test_samples_of_a_batch_and_evaluation():
    places, tensors = one_document_each([9]), draw(9, batch=3)
    expected = dense(*tensors, places, places)
    with torch.no_grad():
        assert_close_rel("output", blockwise(places)(*tensors), expected)
    assert_close_rel("output", blockwise(places)(*tensors), expected)


def test_keys_may_come_in_any_order():
    places, (query, key, value) = one_document_each([6, 7]), draw(13)
    order = torch.randperm(13, generator=torch.Generator().manual_seed(2))
    rows = order[:6]
    actual = blockwise(places[rows], places[order])(query[rows], key[order], value[order])
    assert_close_rel("output", actual, dense(query, key, value, places, places)[rows])


def wrong_attentions(places):
    count = len(places.document)
    across = Places(torch.zeros(count).long(), torch.arange(count))
    late = Places(places.document, places.position + 1)
    return {
        "crosses documents": blockwise(across),
        "does not see itself": blockwise(places, late, window=None),
        "sees the next token": blockwise(late, places),
        "window too wide": blockwise(places, window=3),
    }


@pytest.mark.parametrize("name", wrong_attentions(one_document_each([1])))
def test_planted_errors_are_caught(name):
    places, tensors = one_document_each([5, 6]), draw(11)
    window = 2 if "window" in name else None
    expected = run(tensors, lambda q, k, v: dense(q, k, v, places, places, window=window))
    with pytest.raises(AssertionError, match="relative error"):
        assert_same(run(tensors, wrong_attentions(places)[name]), expected)


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[16], [8, 24, 16], [0, 8, 0, 0, 8]], ids=str)
def test_places_are_megatrons_layout(lengths, ranks):
    """Megatron's own rotary embedding tells which positions of a document a rank holds."""
    seen = []
    for rank in range(ranks):
        tokens = sum(lengths) // ranks
        places = places_on_rank(cumulative(lengths), tokens, rank, ranks, CPU)
        expected = [
            (document, int(position))
            for document, length in enumerate(lengths)
            for position in _get_thd_freqs_on_this_cp_rank(
                rank, ranks, torch.empty(length // ranks), torch.arange(length)
            )
        ]
        seen += (mine := list(zip(places.document.tolist(), places.position.tolist())))
        assert mine == expected
        for document, length in enumerate(lengths):
            chunks = torch.arange(length).view(2 * ranks, -1)
            by_hand = torch.cat((chunks[rank], chunks[2 * ranks - 1 - rank]))
            if ranks > 1:
                assert [p for d, p in mine if d == document] == by_hand.tolist()
    every = [(d, p) for d, length in enumerate(lengths) for p in range(length)]
    assert sorted(seen) == every


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_one_document_needs_no_cu_seqlens(ranks):
    for rank in range(ranks):
        implied = places_on_rank(None, 16 // ranks, rank, ranks, CPU)
        given = places_on_rank(cumulative([16]), 16 // ranks, rank, ranks, CPU)
        assert torch.equal(implied.document, given.document)
        assert torch.equal(implied.position, given.position)


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_tokens_after_the_last_document_are_one_more_document(ranks):
    places = [places_on_rank(cumulative([8, 16]), 8 + 24 // ranks, r, ranks, CPU)
              for r in range(ranks)]  # fmt: skip
    after = [p[p.document == 2].position for p in places]
    assert [len(p) for p in after] == [8] * ranks
    assert len(torch.cat(after).unique()) == 8 * ranks


@pytest.mark.parametrize("ranks", [2, 4])
def test_ranks_together_are_one_attention(ranks):
    lengths = [8, 24, 16]
    whole, tensors = one_document_each(lengths), draw(48)
    places = [places_on_rank(cumulative(lengths), 48 // ranks, r, ranks, CPU) for r in range(ranks)]
    starts = cumulative(lengths).long()
    index = [starts[p.document] + p.position for p in places]
    gathered = torch.cat(index)
    key_places = Places(
        torch.cat([p.document for p in places]), torch.cat([p.position for p in places])
    )

    def attend(query, key, value):
        parts = [
            blockwise(p, key_places)(query[i], key[gathered], value[gathered])
            for p, i in zip(places, index)
        ]
        return torch.cat(parts)[gathered.argsort()]

    assert_same(run(tensors, attend), run(tensors, lambda q, k, v: dense(q, k, v, whole, whole)))


def dropped(places, tensors, seed, dropout):
    """Return output and gradients with dropout drawn from `seed`."""
    torch.manual_seed(seed)
    return run(tensors, blockwise(places, dropout=dropout))


def explicit_mask(places, query, key, seed, dropout):
    """Return what the same draw keeps: with one-hot values the output is the probabilities."""
    tokens = len(key)
    one_hot = torch.eye(tokens).view(tokens, 1, 1, tokens).expand(-1, 1, key.size(2), -1)
    torch.manual_seed(seed)
    kept = blockwise(places, dropout=dropout)(query.detach(), key.detach(), one_hot)
    return (kept.permute(1, 2, 0, 3) != 0).double() / (1 - dropout)


@pytest.mark.parametrize("groups", [4, 2])
def test_the_backward_pass_drops_what_the_forward_pass_dropped(groups, monkeypatch):
    places, tensors = one_document_each([6, 7]), draw(13, groups)
    keep = explicit_mask(places, *tensors[:2], seed=5, dropout=0.4)
    allowed = dense(*tensors[:2], torch.eye(13).view(13, 1, 1, 13).expand(-1, 1, groups, -1),
                    places, places).permute(1, 2, 0, 3) > 0  # fmt: skip
    assert 0.4 < (keep[allowed] > 0).double().mean() < 0.8
    actual = dropped(places, tensors, seed=5, dropout=0.4)
    expected = run(tensors, lambda q, k, v: dense(q, k, v, places, places, keep=keep))
    assert_same(actual, expected)
    # Planted: a recompute that draws another mask.
    redraw = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)
    monkeypatch.setattr(module, "checkpoint", lambda function, *args, **_: redraw(function, *args))
    with pytest.raises(AssertionError, match="gradient of"):
        assert_same(dropped(places, tensors, seed=5, dropout=0.4), expected)


def test_the_same_seed_drops_the_same():
    places, tensors = one_document_each([6, 7]), draw(13)
    first, again = (dropped(places, tensors, seed=3, dropout=0.3) for _ in range(2))
    assert all(torch.equal(first[name], again[name]) for name in first)
    other = dropped(places, tensors, seed=4, dropout=0.3)
    assert not torch.equal(first["output"], other["output"])


def largest_saved(places, tensors):
    sizes = [0]

    def pack(tensor):
        sizes.append(tensor.numel())
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = blockwise(places)(*tensors)
    assert len(sizes) > 1
    output.sum().backward()
    return max(sizes)


def test_no_mask_is_kept_for_the_backward_pass(monkeypatch):
    tokens = 64
    places, tensors = one_document_each([40, 24]), draw(tokens, groups=1, heads=1, size=2)
    one_block = 4 * tokens  # of a mask: 256; query, key and value have 128 elements each
    assert largest_saved(places, tensors) < one_block
    # Planted: no recompute.
    monkeypatch.setattr(module, "checkpoint", lambda function, *args, **_: function(*args))
    assert largest_saved(places, tensors) >= one_block
