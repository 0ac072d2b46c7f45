"""Small models on layouts of up to four ranks."""

from dataclasses import dataclass

from tests.integration.tiny_gpt import flags


@dataclass(frozen=True)
class Case:
    """A run that is both planned and executed; `hybrid` is the other form of its command."""

    ranks: int
    micro_batches: int
    command: tuple[str, ...]
    hybrid: tuple[str, ...]

    @property
    def planned_ranks(self) -> list[int]:
        """The first and the last rank, which are opposite ends of every axis."""
        return sorted({0, self.ranks - 1})


def _case(ranks: int, micro_batches: int, pattern: str, **overrides) -> Case:
    # Megatron's check of results reads values back, and a dry run has no values.
    settings = {"train_iters": 3, "rerun_mode": "disabled"}
    settings |= {"hidden_dropout": 0.0, "attention_dropout": 0.0} | overrides
    hybrid = settings | dict.fromkeys(_GPT_ONLY) | {"hybrid_layer_pattern": pattern}
    if "recompute_num_layers" in hybrid:
        hybrid["recompute_num_layers"] *= 2  # a GPT layer is two layers
    return Case(ranks, micro_batches, *(tuple(flags(**form)) for form in (settings, hybrid)))


_GPT_ONLY = ("num_layers", "num_layers_per_virtual_pipeline_stage", "mtp_num_layers")


_OVERLAP = {"overlap_grad_reduce": True, "overlap_param_gather": True}
_SHARDED = {"use_distributed_optimizer": True, "bf16": True}

CASES = {
    "one-rank": _case(1, 2, "*-*-"),
    "dropout": _case(1, 2, "*-*-", hidden_dropout=0.1, attention_dropout=0.1),
    # A vocabulary and a batch that leave padding in the buffers.
    "dp2-sharded": _case(
        2, 1, "*-*-", **_SHARDED, **_OVERLAP, vocab_size=131, make_vocab_size_divisible_by=1
    ),
    "tp2-pp2": _case(
        4,
        4,
        "*-|*-",
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
        global_batch_size=8,
        bf16=True,
        untie_embeddings_and_output_weights=None,
    ),
    # One KV head for two ranks: taps are replicated, and their gradient is summed.
    "tp2-cp2": _case(
        4,
        2,
        "*-*-",
        tensor_model_parallel_size=2,
        context_parallel_size=2,
        sequence_parallel=True,
        num_query_groups=1,
        seq_length=64,
        max_position_embeddings=64,
        **_SHARDED,
    ),
    "interleaved": _case(
        4,
        4,
        "*-|*-|*-|*-",
        num_layers=4,
        pipeline_model_parallel_size=2,
        num_layers_per_virtual_pipeline_stage=1,
        global_batch_size=16,
        recompute_granularity="full",
        recompute_method="uniform",
        recompute_num_layers=1,
        **_SHARDED,
        **_OVERLAP,
    ),
    "selective": _case(
        1,
        2,
        "*-*-",
        bf16=True,
        recompute_granularity="selective",
        recompute_modules="mlp core_attn",
    ),
}

_PIPELINE = {"pipeline_model_parallel_size": 2, "bf16": True}
# Planned in both forms, and not executed.
ONLY_PLANNED = {
    "mtp": _case(2, 2, "*-|*-/*-", mtp_num_layers=1, **_PIPELINE),
    "a pattern that Megatron cuts": _case(2, 2, "*-*-", **_PIPELINE),
}
