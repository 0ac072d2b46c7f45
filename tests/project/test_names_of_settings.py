"""Megatron has the names that this package asks it for but that may be missing.

A setting that a release lacks counts as off, and a keyword that a call lacks as not given. So a
name that a new release has changed would count as off too, and its refusal would silently be lost.
"""

import argparse
import dataclasses
import inspect

import pytest
from packaging.version import Version

from kvshift_megatron.attention import validation
from tests.support import releases

# Name -> the first release that has it, if not every supported one has.
BEGINS_IN = {
    "dataloader_inter_document_masking": "0.19",
    "total_real_tokens_in_batch": "0.19",
    "post_wrap_hooks": "0.19",
    "transformer": "0.19",
}
ARGUMENTS = (
    *validation._REFUSED_ARGS, "multi_latent_attention", "flash_decode",
    "experimental_attention_variant", "sft", "dataloader_inter_document_masking",
    "overlap_moe_expert_parallel_comm", "spec", "mtp_num_layers", "load", "pretrained_checkpoint",
    "ckpt_step", "dist_ckpt_strictness", "hybrid_layer_pattern", "wandb_project", "seed",
)  # fmt: skip


def config_fields() -> set[str]:
    from megatron.core.transformer.transformer_config import TransformerConfig

    return {field.name for field in dataclasses.fields(TransformerConfig)}


def arguments() -> set[str]:
    from megatron.training.arguments import add_megatron_arguments

    parser = argparse.ArgumentParser()
    add_megatron_arguments(parser)
    return set(vars(parser.parse_args([])))


def forward_keywords() -> set[str]:
    from megatron.core.transformer.attention import Attention

    return set(inspect.signature(Attention.forward).parameters)


def packed_fields() -> set[str]:
    from megatron.core.packed_seq_params import PackedSeqParams

    return {field.name for field in dataclasses.fields(PackedSeqParams)}


def log_keywords() -> set[str]:
    from megatron.training.training import training_log

    return set(inspect.signature(training_log).parameters)


def save_keywords() -> set[str]:
    from megatron.training.checkpointing import save_checkpoint

    return set(inspect.signature(save_checkpoint).parameters)


def builder_fields() -> set[str]:
    from megatron.training.models.gpt import GPTModelConfig

    return {field.name for field in dataclasses.fields(GPTModelConfig)}


# Where names are looked up -> (what Megatron has, what is asked for).
ASKED = {
    "configuration": (
        config_fields,
        (*validation._REFUSED_IN_CONFIG, "softmax_type", "mrope_section"),
    ),
    "arguments": (arguments, ARGUMENTS),
    "forward": (
        forward_keywords,
        ("packed_seq_params", "rotary_pos_emb", "inference_context", "inference_params"),
    ),
    "packed documents": (packed_fields, ("local_cp_size", "cu_seqlens_kv_padded")),
    "log": (log_keywords, ("total_real_tokens_in_batch",)),
    "save": (save_keywords, ("non_persistent_ckpt", "release")),
    "builder": (builder_fields, ("post_wrap_hooks", "transformer")),
}


def lacking(there: set[str], asked: tuple[str, ...]) -> list[str]:
    return [name for name in asked if name not in there]


@pytest.mark.parametrize("where", ASKED)
def test_the_installed_release_has_every_name_that_it_is_asked_for(where):
    found, asked = ASKED[where]
    release = Version(releases.imported_version())
    asked = tuple(name for name in asked if release >= Version(BEGINS_IN.get(name, "0")))
    if asked:
        assert lacking(found(), asked) == []


def test_a_renamed_name_is_caught():
    found, asked = ASKED["forward"]
    assert lacking(found() - {"inference_context"} | {"context"}, asked) == ["inference_context"]
