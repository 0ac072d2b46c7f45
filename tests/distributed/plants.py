"""Errors to plant, which the comparisons must notice."""

import contextlib
from unittest import mock

import torch

from kvshift_megatron.attention import context_parallel, self_attention
from kvshift_megatron.attention.cp_chunks import ZigzagChunks
from kvshift_megatron.attention.halo_exchange import HaloExchange
from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.ops import shift_ref
from kvshift_megatron.specs.te_free import SDPACoreAttention


def planted(error: str | None) -> contextlib.AbstractContextManager:
    """Return a context with the named error, or without any."""
    return _PLANTS[error]() if error else contextlib.nullcontext()


def _patch_taps(change):
    original = KVShiftSelfAttention.taps

    def taps(self):
        return {kind: change(self, value) for kind, value in original(self).items()}

    return mock.patch.object(KVShiftSelfAttention, "taps", taps)


def _taps_swapped():
    return _patch_taps(lambda self, taps: taps.flip(0))


def _shard_permuted():
    """Reverse the order of rank 1's groups, or of its taps if it has one group."""

    def change(self, taps):
        if self.pg_collection.tp.rank() != 1:
            return taps
        return taps.flip(1) if taps.shape[1] > 1 else taps.flip(0)

    return _patch_taps(change)


def _shift_by_two():
    def shift(x, taps):
        return shift_ref(x, torch.stack([taps[0], torch.zeros_like(taps[1]), taps[1]]))

    return mock.patch.object(
        self_attention,
        "shift_across_boundaries",
        lambda k, v, a, b, *_: (shift(k, a), shift(v, b)),
    )


@contextlib.contextmanager
def _rope_before_shift():
    """Shift after the rotation, in the core attention."""
    forward = SDPACoreAttention.forward
    taps = {}

    def keep(self, hidden_states, *args, **kwargs):
        taps.update(self.taps())
        return super(KVShiftSelfAttention, self).get_query_key_value_tensors(
            hidden_states, *args, **kwargs
        )

    def shift_late(self, query, key, value, *args, **kwargs):
        key, value = shift_ref(key, taps["alpha"]), shift_ref(value, taps["beta"])
        return forward(self, query, key, value, *args, **kwargs)

    with (
        mock.patch.object(KVShiftSelfAttention, "get_query_key_value_tensors", keep),
        mock.patch.object(SDPACoreAttention, "forward", shift_late),
    ):
        yield


def _shared_groups_not_summed():
    return mock.patch.object(
        self_attention, "copy_to_tensor_model_parallel_region", lambda x, group=None: x
    )


def _patch_exchange(name, change):
    original = getattr(HaloExchange, name)
    return mock.patch.object(HaloExchange, name, lambda *args: change(original, *args))


def _second_chunk_from_wrong_rank():
    """Give second chunks the tokens from the rank below, which belong before first chunks."""

    def finish(original, self):
        below, above = self._received
        self._received = (below, below if self._rank > 0 else above)
        return original(self)

    return _patch_exchange("finish", finish)


def _no_own_tokens_on_the_last_rank():
    def start(original, self, last_tokens):
        original(self, last_tokens)
        if self._rank == self._size - 1:
            self._received[1].zero_()

    return _patch_exchange("start", start)


def _no_backward_exchange():
    return _patch_exchange("finish_backward", lambda original, self: original(self).zero_())


def _chunks_of_the_whole_sequence():
    """Cut packed documents into chunks as if they were one document."""
    return mock.patch.object(
        context_parallel,
        "PackedZigzagChunks",
        lambda cu, tokens, ranks, back: ZigzagChunks(tokens, back, cu.device),
    )


_PLANTS = {
    "chunks_of_the_whole_sequence": _chunks_of_the_whole_sequence,
    "second_chunk_from_wrong_rank": _second_chunk_from_wrong_rank,
    "no_own_tokens_on_the_last_rank": _no_own_tokens_on_the_last_rank,
    "no_backward_exchange": _no_backward_exchange,
    "taps_swapped": _taps_swapped,
    "shard_permuted": _shard_permuted,
    "shift_by_two": _shift_by_two,
    "rope_before_shift": _rope_before_shift,
    "shared_groups_not_summed": _shared_groups_not_summed,
}
