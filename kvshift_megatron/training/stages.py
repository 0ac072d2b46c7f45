"""What a pipeline stage holds and reads."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from megatron.core.transformer.transformer_config import TransformerConfig


def needs_tokens(config: "TransformerConfig", vp_stage: int | None = None) -> bool:
    """Return whether this stage reads tokens or labels: the first, the last, or one with MTP."""
    from megatron.training.utils import is_first_or_last_pipeline_stage

    return is_first_or_last_pipeline_stage(vp_stage) or has_mtp(config, vp_stage)


def has_mtp(config: "TransformerConfig", vp_stage: int | None = None) -> bool:
    """Return whether this stage holds layers of multi-token prediction (MTP)."""
    from megatron.core.transformer.multi_token_prediction import mtp_on_this_rank

    return mtp_on_this_rank(
        layout=config.pipeline_model_parallel_layout,
        mtp_num_layers=config.mtp_num_layers,
        ignore_virtual=False,
        vp_stage=vp_stage,
    )


def embedding_ranks(pp_ranks: list[int]) -> list[int]:
    """Return the ranks that hold the embedding: the first, and those with tied weights or MTP.

    Args:
        pp_ranks: Global ranks of one pipeline, first stage first.
    """
    from megatron.core.transformer.multi_token_prediction import get_mtp_ranks
    from megatron.training import get_args
    from megatron.training.arguments import core_transformer_config_from_args

    args = get_args()
    ranks = {pp_ranks[0]}
    if len(pp_ranks) > 1:
        ranks.update(get_mtp_ranks(pp_ranks, core_transformer_config_from_args(args)))
        if not args.untie_embeddings_and_output_weights:
            ranks.add(pp_ranks[-1])
    return sorted(ranks)
