"""Theorem 2: alpha = (0, 1), beta = (1, 0) and identity projections are an induction head.

With one head, one-hot tokens and no positions the key of a token is the token before it, so that a
query attends to exactly the positions after an earlier occurrence of its own token.
"""

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from megatron.core.transformer.spec_utils import build_module

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.layer_specs import kv_shift_layer_spec
from tests.support.compare import assert_close_rel
from tests.support.single_process import transformer_config

VOCABULARY = 6
TOKENS = st.lists(st.integers(0, VOCABULARY - 1), min_size=1, max_size=14)


@pytest.fixture
def induction_head(megatron_rank):
    """Return head(tokens, alpha, beta) -> [s, VOCABULARY]."""
    config = transformer_config(
        num_attention_heads=1,
        num_query_groups=1,
        hidden_size=VOCABULARY,
        kv_channels=VOCABULARY,
        # exp(-200) is 0 in fp32: a key that does not match has no weight at all.
        softmax_scale=200.0,
    )
    spec = kv_shift_layer_spec(config, kv_shift=KVShiftConfig()).layer_specs[0]
    attention = build_module(spec.submodules.self_attention, config=config, layer_number=1)
    identity = torch.eye(VOCABULARY)
    with torch.no_grad():
        attention.linear_qkv.weight.copy_(identity.repeat(3, 1))
        attention.linear_proj.weight.copy_(identity)

    def head(tokens, alpha=(0.0, 1.0), beta=(1.0, 0.0)):
        with torch.no_grad():
            for name, tap in zip(("alpha_1", "alpha_2", "beta_1", "beta_2"), (*alpha, *beta)):
                getattr(attention, name).fill_(tap)
            output, bias = attention(identity[tokens][:, None], attention_mask=None)
        assert bias is None
        return output[:, 0]

    return head


def successors(tokens, position):
    """Return the tokens after earlier occurrences of the one at `position`."""
    return [tokens[i + 1] for i in range(position) if tokens[i] == tokens[position]]


def assert_is_induction(tokens, output):
    for position in range(len(tokens)):
        seen = successors(tokens, position)
        one_hot = torch.nn.functional.one_hot(torch.tensor(seen, dtype=torch.int64), VOCABULARY)
        if len(seen) == 1:
            assert torch.equal(output[position], one_hot[0].float()), f"position {position}"
        elif seen:
            mean = one_hot.double().mean(0)
            assert_close_rel(f"position {position}", output[position], mean)


def test_it_predicts_the_successor(induction_head):
    @given(TOKENS)
    @example([0, 1, 0])
    @example([2, 2, 2, 2])
    @example([0, 1, 2, 3, 4, 5, 0, 1, 2, 3, 4, 5])
    @settings(max_examples=60, deadline=None)
    def check(tokens):
        assert_is_induction(tokens, induction_head(tokens))

    check()


def test_a_first_repeat_is_exactly_the_successor(induction_head):
    tokens = [3, 1, 4, 0, 5, 3, 1, 4, 0, 5]
    output = induction_head(tokens)
    for position in range(5, 10):
        expected = torch.zeros(VOCABULARY)
        expected[tokens[position - 4]] = 1.0
        assert torch.equal(output[position], expected)


@pytest.mark.parametrize(
    ("alpha", "beta"),
    [
        ((1.0, 0.0), (1.0, 0.0)),  # vanilla attention
        ((1.0, 0.0), (0.0, 1.0)),
        ((0.0, 1.0), (0.0, 1.0)),
        ((0.5, 0.5), (1.0, 0.0)),
        ((0.0, 1.0), (0.5, 0.5)),
    ],
)
def test_other_taps_are_not_an_induction_head(induction_head, alpha, beta):
    tokens = [3, 1, 4, 0, 5, 3, 1, 4, 0, 5]
    with pytest.raises(AssertionError, match="position 5"):
        assert_is_induction(tokens, induction_head(tokens, alpha, beta))
