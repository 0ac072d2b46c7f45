"""Megatron's hybrid builder (0.19) with KV-shifting attention in every attention layer."""

from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.hybrid.hybrid_model import HybridModel
from megatron.training.models.hybrid import HybridModelBuilder, HybridModelConfig

from kvshift_megatron.attention.self_attention import KVShiftSelfAttention
from kvshift_megatron.checks.attention_places import attention_places
from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.hybrid_specs import hybrid_stack
from kvshift_megatron.specs.te_free.norm import SequenceParallelNorm
from kvshift_megatron.upstream import builder_table
from kvshift_megatron.upstream.substitutions import Applied


@dataclass(kw_only=True)
class KVShiftHybridModelConfig(HybridModelConfig):
    """Megatron's HybridModelConfig with the configuration of the taps.

    Args:
        kv_shift: The taps of every attention layer; None builds the baseline model.
    """

    builder: ClassVar[str] = "kvshift_megatron.training.hybrid_builder.KVShiftHybridModelBuilder"
    kv_shift: KVShiftConfig | None = None


class KVShiftHybridModelBuilder(HybridModelBuilder):
    """Megatron's builder, with its stack spec converted, or a TE-free one in its place."""

    def __init__(self, model_config: KVShiftHybridModelConfig):
        super().__init__(model_config)
        self._config = model_config

    def build_model(self, *args: Any, **kwargs: Any) -> HybridModel:
        """Build as HybridModelBuilder does.

        Raises:
            ValueError: KV shifting cannot honour a setting; the message names it.
        """
        config = self._config
        config.hybrid_stack_spec = hybrid_stack(config, config.kv_shift)
        is_local = config.transformer.transformer_impl == "local"
        rows = builder_table.local_final_norm(SequenceParallelNorm) if is_local else []
        with Applied(rows):
            model = super().build_model(*args, **kwargs)
        for place in attention_places(model):
            # Each depth of multi-token prediction numbers its layers from 1.
            if place.is_mtp and isinstance(place.module, KVShiftSelfAttention):
                place.module.draw_taps_of(place.number)
        return model
