"""Megatron's GPT builder (0.19) with KV-shifting attention in every layer, MTP layers included."""

import contextlib
from dataclasses import dataclass
from typing import ClassVar
from unittest import mock

from megatron.core.models.gpt import GPTModel
from megatron.training.models import gpt
from megatron.training.models.gpt import GPTModelBuilder, GPTModelConfig

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.gpt_specs import convert_specs


@dataclass(kw_only=True)
class KVShiftGPTModelConfig(GPTModelConfig):
    """Megatron's GPTModelConfig and the taps.

    Args:
        kv_shift: the taps of every attention layer; None builds the vanilla twin.
    """

    builder: ClassVar[str] = "kvshift_megatron.training.gpt_builder.KVShiftGPTModelBuilder"
    kv_shift: KVShiftConfig | None = None


class KVShiftGPTModelBuilder(GPTModelBuilder):
    """Megatron's builder; only the specs that it arrives at are converted."""

    def build_model(self, *args, vp_stage: int | None = None, **kwargs) -> GPTModel:
        """As GPTModelBuilder.build_model.

        Raises:
            ValueError: a setting that KV shifting cannot honour; the message names it.
        """
        with self._converted_specs():
            return super().build_model(*args, vp_stage=vp_stage, **kwargs)

    @contextlib.contextmanager
    def _converted_specs(self):
        # Megatron makes the MTP spec from its own layer specs, whatever the configuration names,
        # in a function of its module: there is no other place to reach it.
        default_layer_spec, mtp_block_spec = gpt.default_layer_spec, gpt.mtp_block_spec

        def layers(config, vp_stage=None):
            spec = default_layer_spec(config, vp_stage)
            return convert_specs(spec, None, config, config.kv_shift, vp_stage)[0]

        def mtp(config, transformer_layer_spec, vp_stage=None):
            spec = mtp_block_spec(config, transformer_layer_spec, vp_stage=vp_stage)
            return convert_specs(None, spec, config, config.kv_shift, vp_stage)[1]

        with (
            mock.patch.object(gpt, "default_layer_spec", layers),
            mock.patch.object(gpt, "mtp_block_spec", mtp),
        ):
            yield
