"""Megatron's GPT builder (0.19) with KV-shifting attention in every layer, MTP layers included."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, ClassVar

from megatron.core.models.gpt import GPTModel
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.gpt_specs import convert_specs
from kvshift_megatron.upstream import builder_table
from kvshift_megatron.upstream.substitutions import Applied


@dataclass(kw_only=True)
class KVShiftGPTModelConfig(GPTModelConfig):
    """Megatron's GPTModelConfig with the configuration of the taps.

    Args:
        kv_shift: The taps of every attention layer; None builds the baseline model.
    """

    builder: ClassVar[str] = "kvshift_megatron.training.gpt_builder.KVShiftGPTModelBuilder"
    kv_shift: KVShiftConfig | None = None


class KVShiftGPTModelBuilder(GPTModelBuilder):
    """Megatron's builder, with its layer specs converted."""

    def build_model(self, *args: Any, vp_stage: int | None = None, **kwargs: Any) -> GPTModel:
        """Build as GPTModelBuilder does.

        Raises:
            ValueError: KV shifting cannot honour a setting; the message names it.
        """
        with Applied(builder_table.converted_specs(layers=_converted_layers, mtp=_converted_mtp)):
            return super().build_model(*args, vp_stage=vp_stage, **kwargs)


def _converted_layers(original: Callable) -> Callable:
    """Wrap Megatron's `default_layer_spec` to convert the layers."""

    def layers(config: KVShiftGPTModelConfig, vp_stage: int | None = None) -> Any:
        spec = original(config, vp_stage)
        return convert_specs(spec, None, config, config.kv_shift, vp_stage)[0]

    return layers


def _converted_mtp(original: Callable) -> Callable:
    """Wrap Megatron's `mtp_block_spec` to convert the layers."""

    def mtp(
        config: KVShiftGPTModelConfig, transformer_layer_spec: Any, vp_stage: int | None = None
    ) -> Any:
        spec = original(config, transformer_layer_spec, vp_stage=vp_stage)
        return convert_specs(None, spec, config, config.kv_shift, vp_stage)[1]

    return mtp
