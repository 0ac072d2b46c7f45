"""Context parallelism and packed documents through Megatron's own loop."""

import re

import pytest

from tests.integration import sft_data
from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks
from tests.support.tolerances import FP32_REL

pytestmark = pytest.mark.slow

_TIMEOUT = 300
_NO_DROPOUT = {"hidden_dropout": 0.0, "attention_dropout": 0.0}


def losses_of(nproc: int, **overrides) -> list[float]:
    """Return the losses that Megatron logs, one per step, to 7 digits."""
    # Compiling takes longer than running a few steps.
    run = ranks(
        nproc,
        "kvshift_megatron.pretrain",
        flags(**overrides),
        _TIMEOUT,
        TORCHDYNAMO_DISABLE="1",
    )
    assert run.returncode == 0, run.stdout[-5000:]
    return [float(loss) for loss in re.findall(r"\| lm loss: (\S+) \|", run.stdout)]


def test_context_parallel_run_repeats_the_losses_of_a_single_rank():
    one = losses_of(1, **_NO_DROPOUT)
    two = losses_of(2, context_parallel_size=2, **_NO_DROPOUT)
    assert len(one) == len(two) == 20
    assert two == pytest.approx(one, rel=FP32_REL)
    assert one[-1] < one[0]


@pytest.mark.parametrize(
    "layout",
    [
        {"tensor_model_parallel_size": 2, "sequence_parallel": True},
        {"pipeline_model_parallel_size": 2, "micro_batch_size": 1},
    ],
    ids=["tp2-sp", "pp2"],
)
def test_inter_document_masking_trains(layout):
    losses = losses_of(
        2,
        dataloader_inter_document_masking=True,
        train_iters=5,
        seq_length=256,
        max_position_embeddings=256,
        vocab_size=1024,
        **layout,
    )
    assert len(losses) == 5
    assert losses[-1] < losses[0]


def test_sft_trains_on_packed_conversations(tmp_path):
    tokenizer, data = sft_data.write(tmp_path)
    losses = losses_of(
        1,
        sft=True,
        mock_data=None,
        vocab_size=None,
        tokenizer_type="SFTTokenizer",
        tokenizer_model=tokenizer,
        sft_tokenizer_prompt_format="default",
        data_path=data,
        split="100,0,0",
        no_create_attention_mask_in_dataloader=True,
        train_iters=5,
        seq_length=64,
        max_position_embeddings=64,
    )
    assert len(losses) == 5
    assert losses[-1] < losses[0]
