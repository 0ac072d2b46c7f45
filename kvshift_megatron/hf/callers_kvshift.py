"""Callers that keep a sequence's tokens where the model cannot reach them.

A token needs the unshifted keys and values of the tokens before it. An engine with a store of its
own has only shifted ones, and a rank with a part of a sequence has none for the first token of its
part. Both name themselves by the attention implementation; documents_kvshift.py finds the others by
their positions.
"""

from .compatibility_kvshift import shards_sequences
from .configuration_kvshift import KVShiftLlamaConfig

SHARDED = (
    "{} splits each sequence over ranks, and KV shifting in Transformers has no exchange of the "
    "tokens before a shard: leave it out (kvshift_megatron.pretrain has context parallelism)"
)


def check_attention(config: KVShiftLlamaConfig) -> None:
    """Check that attention is computed here, over the keys and values that this model shifts.

    Other names than the library's belong to engines that keep keys and values in a store of their
    own, such as vLLM ("vllm") and SGLang, or to its continuous batching ("paged|...").

    Raises:
        ValueError: It is not; the message names the implementation.
    """
    name = str(config._attn_implementation)
    if name.startswith("paged"):
        raise ValueError(
            "paged attention (continuous batching) has no place for the unshifted keys and "
            "values that KV shifting needs: use generate() with a dynamic or static cache"
        )
    if name not in ("eager", "sdpa") and "flash" not in name and "flex" not in name:
        raise ValueError(
            f"attn_implementation={name!r} may keep keys and values in a store where the unshifted "
            "ones, which KV shifting needs while decoding, have no place (engines such as vLLM and "
            "SGLang do): use eager, sdpa, flex_attention or a flash attention, and generate()"
        )
    if name != "eager" and shards_sequences(name):
        raise ValueError(SHARDED.format("sp_size above 1 (Ulysses sequence parallelism)"))


__all__ = ["SHARDED", "check_attention"]
