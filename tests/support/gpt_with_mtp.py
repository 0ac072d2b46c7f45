"""A tiny GPTModel with multi-token prediction."""

from typing import Any

from megatron.core.models.gpt import GPTModel
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.transformer_config import TransformerConfig


def gpt_with_mtp(config: TransformerConfig, spec: Any, mtp_spec: Any) -> GPTModel:
    return GPTModel(
        config=config,
        transformer_layer_spec=spec,
        mtp_block_spec=mtp_spec,
        vocab_size=64,
        max_sequence_length=16,
        position_embedding_type="rope",
        pg_collection=ProcessGroupCollection.use_mpu_process_groups(),
    )
