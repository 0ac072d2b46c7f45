"""Where sequences start in a batch without padding, as attention sees it.

Attention hears of packed sequences in several ways: positions that do not increase by one, the
`cu_seq_lens_*` of flash attention, or none at all. The shift must see the same edges. A call that
leaves them open is refused, and so is one whose first token has a position above 0 and no past:
its previous token is on another rank, or in the cache of a foreign engine.

Letters in shapes: b batch, s new tokens, n packed sequences.
"""

from typing import Any

import torch
from torch import Tensor

from .compatibility_kvshift import Cache
from .configuration_kvshift import KVShiftLlamaConfig

FLASH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")

NO_PAST = (
    "a sequence in position_ids starts above 0, but the cache has no tokens to shift from: pass "
    "the whole sequence, or its past_key_values (engines with a cache of their own have no place "
    "for what it holds, nor has training with sequences split over ranks by sp_size, cp_size or "
    "ring attention); if there are no tokens before, start at 0 or pass starts_anywhere=True"
)
NOT_EVERY_JUMP = (
    "position_ids do not increase by one, but attention would not take every jump for the start of "
    "a sequence: let the positions start at 0 in each sequence, in agreement with cu_seq_lens_q"
)


class Checks:
    """What must not be so, as values on the device: read all at once, or asserted in a graph."""

    def __init__(self) -> None:
        self._wrong: list[tuple[Tensor, str]] = []

    def refuse_if(self, wrong: Tensor, message: str) -> None:
        """Note a bool tensor of any shape, of which no element may be true."""
        self._wrong.append((wrong.any(), message))

    def ask(self, question: Tensor | None = None) -> bool:
        """Raise the first message that applies; answer a yes-or-no question, without one by False.

        In a compiled graph nothing is read back: the question stays open (True), and the device
        asserts.

        Raises:
            ValueError: Something is so that must not be.
        """
        if torch.compiler.is_compiling():
            for wrong, message in self._wrong:
                torch._assert_async(~wrong, message)
            return question is not None
        flags = [wrong for wrong, _ in self._wrong] + ([] if question is None else [question.any()])
        answers = torch.stack(flags).tolist() if flags else []
        for wrong, (_, message) in zip(answers, self._wrong):
            if wrong:
                raise ValueError(message)
        return question is not None and bool(answers[-1])


def is_fresh(cache: Cache | None) -> bool:
    """Check whether there are surely no past tokens, without reading from the device.

    A static cache in use keeps its length on the device. It holds the raw keys and values, so the
    shift does not depend on the answer.
    """
    length = 0 if cache is None else cache.get_seq_length()
    return not isinstance(length, Tensor) and length == 0


def positions_from_lengths(kwargs: dict[str, Any], batch: int, length: int) -> Tensor | None:
    """Count positions from the starts in `cu_seq_lens_q` int [n + 1]; int64 [b, s], or None."""
    starts = kwargs.get("cu_seq_lens_q")
    if starts is None:
        if kwargs.get("seq_idx") is not None:
            raise ValueError(
                "seq_idx names packed sequences, but attention reads only position_ids or "
                "cu_seq_lens_q: pass one of them (DataCollatorWithFlattening does)"
            )
        return None
    place = torch.arange(batch * length, device=starts.device)
    # The last start that is not beyond the place; of empty sequences the last one.
    which = torch.searchsorted(starts.contiguous(), place.to(starts.dtype), right=True) - 1
    return (place - starts[which.clamp(min=0)]).view(batch, length)


def documents(
    config: KVShiftLlamaConfig,
    shape: tuple[int, int],
    position_ids: Tensor,
    cache: Cache | None,
    kwargs: dict[str, Any],
    starts_anywhere: bool,
) -> Tensor | None:
    """Return the number of each token's sequence, int64 [b, s]; None if each row is one sequence.

    Args:
        config: The model's configuration.
        shape: b, s.
        position_ids: int [1 or b, s], as attention gets them.
        cache: The tokens before the new ones.
        kwargs: Other arguments of the call, for attention.
        starts_anywhere: Sequences may start at positions above 0.

    Raises:
        ValueError: Attention and the shift would see different edges, or tokens are missing.
    """
    batch, length = shape
    fresh, compiling = is_fresh(cache), torch.compiler.is_compiling()
    if not fresh and (length == 1 or compiling):
        return None
    checks = Checks()
    # As in attention's masks, a sequence starts where positions do not increase by one.
    jumps = position_ids.diff(prepend=position_ids[:, :1] - 1) != 1
    starts = jumps.clone()
    starts[:, 0] = True
    if fresh and not starts_anywhere:
        checks.refuse_if(starts & (position_ids != 0), NO_PAST)
    flash = "flash" in str(config._attn_implementation)
    one_each_row = cache is not None and not (flash and fresh)
    if one_each_row:
        checks.refuse_if(
            jumps,
            "position_ids do not increase by one: packed sequences need use_cache=False (and no "
            "past_key_values), and padding needs an attention_mask",
        )
    given = [kwargs.get(name) for name in FLASH_ARGUMENTS]
    if flash and any(argument is None for argument in given):
        if batch > 1:
            checks.refuse_if(
                jumps,
                "position_ids hold packed sequences in a batch of several rows, but flash "
                "attention would take each row for one sequence: pack them into one row",
            )
        # Some releases look for position 0, others for the lowest one.
        lowest = position_ids.min()
        seen = (position_ids == lowest) & (lowest == 0)
        checks.refuse_if(jumps.any() & (seen != starts), NOT_EVERY_JUMP)
    _compare_lengths(checks, given, starts.expand(batch, -1), fresh, NOT_EVERY_JUMP)
    if kwargs.get("seq_idx") is not None:
        other = kwargs["seq_idx"].to(jumps.device).diff(dim=-1) != 0
        checks.refuse_if(
            other != jumps[:, 1:],
            "seq_idx names other packed sequences than position_ids: let the positions start at 0 "
            "in each sequence",
        )
    some = checks.ask(jumps)
    return jumps.cumsum(-1).expand(batch, -1) if some and not one_each_row else None


def _compare_lengths(
    checks: Checks, given: list, starts: Tensor, fresh: bool, message: str
) -> None:
    """Compare `cu_seq_lens_*`, if given, with the starts bool [b, s] that attention sees."""
    lengths, of_keys = given[:2]
    if lengths is None:
        return
    if not fresh:
        raise ValueError(
            "cu_seq_lens_q leaves out the tokens of past_key_values: packed sequences need an "
            "empty cache"
        )
    if of_keys is not None and of_keys is not lengths:
        if of_keys.shape != lengths.shape:
            raise ValueError(
                f"cu_seq_lens_k has {len(of_keys)} entries and cu_seq_lens_q {len(lengths)}: they "
                "must be the same"
            )
        checks.refuse_if(of_keys != lengths, "cu_seq_lens_k and cu_seq_lens_q must be the same")
    total = starts.numel()
    lengths = lengths.to(starts.device).long()
    checks.refuse_if(
        torch.cat([lengths.diff() < 0, lengths[:1] != 0, lengths[-1:] != total]),
        f"cu_seq_lens_q must rise from 0 to the {total} tokens of the batch",
    )
    edges = starts.new_zeros(total + 1).scatter(
        0, lengths.clamp(0, total), torch.ones_like(lengths, dtype=torch.bool)
    )
    checks.refuse_if(edges[:-1] != starts.flatten(), message)


def check_padded(
    attention_mask: Tensor,
    position_ids: Tensor | None,
    kwargs: dict[str, Any],
    starts_anywhere: bool,
) -> None:
    """Check a batch with padding and without past tokens: each row is one sequence.

    Args:
        attention_mask: [b, s], 0 for padding.
        position_ids: int [1 or b, s], as the caller gave them.
        kwargs: Other arguments of the call, for attention.
        starts_anywhere: Rows may start at positions above 0.

    Raises:
        ValueError: Tokens before the first real one are missing, or packed sequences are named.
    """
    checks = Checks()
    if attention_mask.dtype != torch.bool:
        checks.refuse_if(
            (attention_mask != 0) & (attention_mask != 1),
            "attention_mask holds other values than 0 and 1, which attention takes for 1: pack "
            "sequences by position_ids, without attention_mask",
        )
    real = attention_mask.bool()
    if position_ids is not None and not starts_anywhere:
        first = real.long().argmax(-1, keepdim=True)
        position = position_ids.to(first.device).expand(len(real), -1).gather(1, first)
        # Positions that count padding start at the place of the first token.
        checks.refuse_if(real.any(-1, True) & (position != 0) & (position != first), NO_PAST)
    starts = torch.zeros_like(real)
    starts[:, 0] = True
    lengths = [kwargs.get("cu_seq_lens_q"), None]
    _compare_lengths(
        checks,
        lengths,
        starts,
        True,
        "cu_seq_lens_q names packed sequences, but attention would not see them next to an "
        "attention_mask: leave out the attention_mask",
    )
    checks.ask()


__all__ = ["check_padded", "documents", "is_fresh", "positions_from_lengths"]
