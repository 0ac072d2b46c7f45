"""Make sequences that only induction can predict (paper, Appendix D), in whole blocks by NumPy.

The rule of the paper (arXiv 2411.19574v2, Section 4.1 and Appendix D): whenever token j equals an
earlier token i, token j + 1 equals token i + 1. Appendix D walks along a sequence with a table
`successor[token]`: while the last token is new, the next one is drawn uniformly from the
vocabulary and recorded as its successor; once the last token has a recorded successor, that
successor follows.

What a sequence looks like: the rule leaves no freedom after the first repeat. If position r is the
first to hold an earlier token, that of position p, then everything from p on has period r - p.

    draws      7 3 9 4 1 | 9 . . . . .        r = 5 is the first repeat, p = 2
    sequence   7 3 9 4 1   9 4 1 9 4 1

Up to r the tokens are independent uniform draws, so only the pair (9, 4) at p tells what follows r.
A model without induction is right with probability 1 / vocab_size by guessing blindly, about 1 / r
by copying any earlier token, and somewhat more by using the short periods.

Deviations from the code that the paper prints:
  * There, the branch that draws an already seen token does not record that token as the successor
    of the one before it (1 -> 9 above). When the cycle reaches that earlier token again, its
    successor is still the placeholder -1, which is emitted as a token. Here the successor is
    recorded in that branch too, and no placeholder exists.
  * Nothing walks the table token by token: r and p are found by sorting, and the cycle is filled by
    indexing. `tests/examples/induction/test_data.py` compares this with the walk, draw for draw.
  * Draws come from a counter-based generator, so a sequence depends only on (seed, index).

A sequence whose draws all differ has no repeat, as in the paper (1.7 % of them at length 64 and
vocabulary 512, practically none at 512 and 8000). `first_repeat` then returns -1, and the sequence
is not scored.
"""

import numpy as np

NO_REPEAT = -1
_WORDS_PER_STEP = 4  # one Philox4x64 counter step yields four 64-bit words


def draw_tokens(seed: int, start: int, count: int, length: int, vocab_size: int) -> np.ndarray:
    """Draw independent uniform tokens for the sequences start .. start + count - 1.

    Sequence i owns a fixed range of the Philox counter under key `seed`, so its draws do not depend
    on the block they are drawn in (but they do on the length).

    Args:
        seed: Key of the generator, 0 <= seed < 2**64.
        start: Index of the first sequence, >= 0.
        count: Number of sequences.
        length: Tokens per sequence.
        vocab_size: Tokens are in [0, vocab_size); at most 2**31.

    Returns:
        int64 [count, length].
    """
    steps = -(-length // _WORDS_PER_STEP)
    bits = np.random.Philox(key=seed, counter=start * steps)
    words = bits.random_raw(count * steps * _WORDS_PER_STEP).reshape(count, -1)[:, :length]
    # Multiply-shift on the upper 32 bits; its bias, vocab_size / 2**32, is far below one sample.
    return ((words >> np.uint64(32)) * np.uint64(vocab_size) >> np.uint64(32)).astype(np.int64)


def first_repeats(tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Find where each sequence first holds a token for the second time.

    Args:
        tokens: int64 [count, length], non-negative, below 2**31.

    Returns:
        (r, p), int64 [count] each: position r is the smallest with tokens[r] == tokens[p], p < r.
        Both are NO_REPEAT if all tokens differ.
    """
    count, length = tokens.shape
    if length < 2:
        return np.full(count, NO_REPEAT), np.full(count, NO_REPEAT)
    shift = length.bit_length()
    # Sorted by (token, position), a repeat comes directly after the previous occurrence.
    keys = np.sort((tokens << shift) | np.arange(length), axis=1)
    positions = keys & ((1 << shift) - 1)
    repeated = (keys[:, 1:] >> shift) == (keys[:, :-1] >> shift)
    later = np.where(repeated, positions[:, 1:], length)
    rows, where = np.arange(count), later.argmin(axis=1)
    r, p = later[rows, where], positions[rows, where]
    found = r < length
    return np.where(found, r, NO_REPEAT), np.where(found, p, NO_REPEAT)


def follow_successors(draws: np.ndarray) -> np.ndarray:
    """Replace every draw after the first repeat by the recorded successor.

    Args:
        draws: int64 [count, length], independent tokens.

    Returns:
        int64 [count, length]: the draws up to the first repeat, then the cycle it closes.
    """
    length = draws.shape[1]
    r, p = (x[:, None] for x in first_repeats(draws))
    position = np.arange(length)
    period = np.where(r == NO_REPEAT, length, r - p)
    source = np.where((r != NO_REPEAT) & (position > r), p + (position - p) % period, position)
    return np.take_along_axis(draws, source, axis=1)


def generate(seed: int, start: int, count: int, seq_length: int, vocab_size: int) -> np.ndarray:
    """Make the sequences start .. start + count - 1 of a seed.

    Args:
        seed: Seed of the data, 0 <= seed < 2**64.
        start: Index of the first sequence, >= 0.
        count: Number of sequences, >= 1.
        seq_length: Tokens that the model reads; one more is made, the last label.
        vocab_size: Size of the vocabulary, 1 <= vocab_size <= 2**31.

    Returns:
        int64 [count, seq_length + 1], every value in [0, vocab_size).

    Raises:
        ValueError: An argument is out of its range.
    """
    if not 0 <= seed < 2**64:
        raise ValueError(f"seed must be in [0, 2**64), got {seed}")
    if start < 0 or count < 1:
        raise ValueError(f"start must be >= 0 and count >= 1, got {start} and {count}")
    if seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {seq_length}")
    if not 1 <= vocab_size <= 2**31:
        raise ValueError(f"vocab_size must be in [1, 2**31], got {vocab_size}")
    return follow_successors(draw_tokens(seed, start, count, seq_length + 1, vocab_size))


def first_repeat(tokens: np.ndarray) -> int:
    """Return the position whose prediction is scored.

    Args:
        tokens: int64 [seq_length + 1].

    Returns:
        The smallest i <= seq_length - 1 such that tokens[i] occurs before i; the model reads it
        and must predict tokens[i + 1]. NO_REPEAT (-1) if there is none.
    """
    r, _ = first_repeats(np.asarray(tokens)[None, :-1])
    return int(r[0])


class InductionSequences:
    """Random access to the sequences of one seed, made one block at a time.

    A block costs little more than one sequence, and Megatron's sampler asks for neighbours, so the
    last block is kept. The content of a sequence does not depend on its block.
    """

    BLOCK = 256  # sequences

    def __init__(self, seed: int, seq_length: int, vocab_size: int) -> None:
        self.seed, self.seq_length, self.vocab_size = seed, seq_length, vocab_size
        self._block_number = -1
        self._block = generate(seed, 0, 1, seq_length, vocab_size)  # checks the arguments now
        self._repeats = np.zeros(1, dtype=np.int64)

    def __getitem__(self, index: int) -> tuple[np.ndarray, int]:
        """Return sequence `index`, int64 [seq_length + 1], and its `first_repeat`."""
        number, row = divmod(index, self.BLOCK)
        if number != self._block_number:
            self._block = generate(
                self.seed, number * self.BLOCK, self.BLOCK, self.seq_length, self.vocab_size
            )
            self._repeats, _ = first_repeats(self._block[:, :-1])
            self._block_number = number
        return self._block[row], int(self._repeats[row])
