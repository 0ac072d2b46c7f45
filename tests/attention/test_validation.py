"""Each refusal names the setting and the remedy."""

from argparse import Namespace

import pytest
from megatron.core.packed_seq_params import PackedSeqParams

from kvshift_megatron.attention import validation
from kvshift_megatron.attention.validation import check_args, check_transformer_config, refuse_call
from tests.support.single_process import transformer_config


def model(**fields):
    """Return what every TransformerConfig and Megatron's arguments have, with `fields`."""
    return Namespace(
        **{
            "num_query_groups": 4,
            "tensor_model_parallel_size": 1,
            "context_parallel_size": 1,
            "pipeline_model_parallel_size": 1,
            "micro_batch_size": 2,
            **fields,
        }
    )


@pytest.mark.parametrize(
    ("fields", "named", "remedy"),
    [
        (
            {"num_query_groups": 4, "tensor_model_parallel_size": 6},
            "num_query_groups=4 and tensor_model_parallel_size=6",
            "--tensor-model-parallel-size",
        ),
        (
            {"num_query_groups": 6, "tensor_model_parallel_size": 4},
            "num_query_groups=6 and tensor_model_parallel_size=4",
            "--num-query-groups",
        ),
        (
            {"multi_latent_attention": True},
            "multi_latent_attention",
            "drop --multi-latent-attention",
        ),
        ({"fused_single_qkv_rope": True}, "fused_single_qkv_rope", "drop --fused-single-qkv-rope"),
        ({"flash_decode": True}, "flash_decode", "drop --flash-decode"),
        (
            {"experimental_attention_variant": "dsa"},
            "experimental_attention_variant='dsa'",
            "drop --experimental-attention-variant",
        ),
    ],
)
def test_a_model_that_cannot_be_shifted_is_refused(fields, named, remedy):
    with pytest.raises(ValueError) as caught:
        check_transformer_config(model(**fields))
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("groups", "tp"), [(4, 1), (4, 2), (4, 4), (4, 8), (1, 8), (8, 8), (2, 6), (6, 3)]
)
def test_groups_and_ranks_that_divide_are_accepted(groups, tp):
    check_transformer_config(model(num_query_groups=groups, tensor_model_parallel_size=tp))


def test_context_parallelism_is_accepted():
    check_transformer_config(model(context_parallel_size=4))


def test_megatrons_own_configurations_are_accepted():
    check_transformer_config(transformer_config())
    check_transformer_config(transformer_config(num_query_groups=4, qk_layernorm=True))
    check_transformer_config(transformer_config(attention_output_gate=True))


@pytest.mark.parametrize(
    ("fields", "named", "remedy"),
    [
        ({"reset_attention_mask": True}, "reset_attention_mask", "drop --reset-attention-mask"),
        ({"reset_attention_mask": True}, "reset_attention_mask", "packed sequences"),
        (
            {"dataloader_inter_document_masking": True, "context_parallel_size": 2},
            "dataloader_inter_document_masking with context_parallel_size=2",
            "--context-parallel-size 1, or drop --dataloader-inter-document-masking",
        ),
        (
            {"mtp_num_layers": 1, "spec": ["module", "name"]},
            "mtp_num_layers=1 with spec",
            "drop --spec",
        ),
        (
            {"sft": True, "overlap_moe_expert_parallel_comm": True},
            "overlap_moe_expert_parallel_comm with packed documents",
            "drop --overlap-moe-expert-parallel-comm",
        ),
        (
            {"hybrid_context_parallel": True},
            "hybrid_context_parallel",
            "drop --hybrid-context-parallel",
        ),
    ],
)
def test_a_training_argument_that_cannot_be_honoured_is_refused(fields, named, remedy):
    with pytest.raises(ValueError) as caught:
        check_args(model(**fields))
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


def test_arguments_that_are_off_or_unknown_to_the_release_are_accepted():
    check_args(model())
    check_args(
        model(
            reset_attention_mask=False,
            sft=False,
            dataloader_inter_document_masking=False,
            mtp_num_layers=None,
            hybrid_context_parallel=False,
        )
    )
    check_args(model(mtp_num_layers=0, spec=["module", "name"]))
    check_args(model(mtp_num_layers=1, spec=None))
    check_args(model(overlap_moe_expert_parallel_comm=True))


@pytest.mark.parametrize(
    "fields",
    [
        {"sft": True},
        {"sft": True, "micro_batch_size": None, "pipeline_model_parallel_size": 2},
        {"sft": True, "micro_batch_size": 1, "pipeline_model_parallel_size": 2},
        {"dataloader_inter_document_masking": True},
        {"context_parallel_size": 2, "pipeline_model_parallel_size": 2},
    ],
)
def test_packed_documents_and_context_parallelism_are_accepted(fields):
    check_args(model(**fields))


@pytest.mark.parametrize("packing", ["sft", "dataloader_inter_document_masking"])
def test_packed_micro_batches_through_a_pipeline_are_refused(packing):
    args = model(**{packing: True}, pipeline_model_parallel_size=2)
    with pytest.raises(ValueError, match=r"^micro_batch_size=2 .*set --micro-batch-size 1"):
        check_args(args)


def test_sft_over_context_parallel_ranks_needs_transformer_engine(monkeypatch):
    args = model(sft=True, context_parallel_size=2)
    monkeypatch.setattr(validation, "_has_transformer_engine", lambda: False)
    with pytest.raises(ValueError, match=r"^sft with context_parallel_size=2.*-size 1"):
        check_args(args)
    monkeypatch.setattr(validation, "_has_transformer_engine", lambda: True)
    check_args(args)


@pytest.mark.parametrize(
    ("call", "named", "remedy"),
    [
        (
            {"packed_seq_params": PackedSeqParams(qkv_format="thd", local_cp_size=1)},
            "local_cp_size",
            "drop --hybrid-context-parallel",
        ),
        ({"inference_context": object()}, "inference_context", "without a context"),
        ({"inference_params": object()}, "inference_context", "without a context"),
    ],
)
def test_a_call_that_cannot_be_honoured_is_refused(call, named, remedy):
    with pytest.raises(ValueError) as caught:
        refuse_call(**call)
    assert str(caught.value).startswith(named)
    assert remedy in str(caught.value)


def test_a_plain_call_is_accepted():
    refuse_call(packed_seq_params=PackedSeqParams(qkv_format="thd"))
    refuse_call(rotary_pos_emb=object(), packed_seq_params=None, inference_context=None)
    refuse_call()
