"""Small models with and without taps."""

import re

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.layer_specs import kv_shift_layer_spec, vanilla_layer_spec
from tests.support.single_process import gpt_model, transformer_config

FREE, IDENTITY = KVShiftConfig(), KVShiftConfig(init="identity")
ATTENTION = "decoder.layers.{}.self_attention."


def build(kv_shift, vocab_size=64, **overrides):
    config = transformer_config(**overrides)
    if kv_shift is None:
        return gpt_model(config, vanilla_layer_spec(config), vocab_size=vocab_size)
    spec = kv_shift_layer_spec(config, kv_shift=kv_shift)
    return gpt_model(config, spec, vocab_size=vocab_size)


def asked_for(model):
    return [key for key in model.sharded_state_dict() if re.search(r"\.(alpha|beta)_", key)]
