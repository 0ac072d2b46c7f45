"""Megatron loads what the converter writes: on one rank, and in its loop at TP 2 x PP 2."""

import pytest
import torch

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert.formats.torch_dist import TorchDistReader
from kvshift_megatron.convert.to_hf import ToHF, megatron_to_hf
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_round_trips import equal, random_folder, stored
from tests.integration.tiny_gpt import flags
from tests.support.launch import ranks

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "changes",
    [
        {"add_qkv_bias": True, "tied": True},
        {"num_experts": 4, "qk_layernorm": True, "kv_shift": KVShiftConfig(window=3)},
    ],
    ids=["dense", "experts"],
)
def test_one_rank_loads_every_key_that_it_asks_for(megatron_rank, tmp_path, changes):
    from megatron.core import dist_checkpointing

    arch = models.architecture(**changes)
    random_folder(tmp_path / "hf", arch)
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron", divisible_by=64))
    model = models.random_model(arch)
    by_map, _ = models.load_by_map(tmp_path / "megatron")
    before = {name: p.clone() for name, p in model.named_parameters()}
    state = {"model": model.sharded_state_dict()}
    loaded = dist_checkpointing.load(
        state, str(tmp_path / "megatron" / "release"), strict="raise_unexpected"
    )
    model.load_state_dict(loaded["model"])
    after = dict(model.named_parameters())
    assert equal(after, dict(by_map.named_parameters()))
    assert not any(torch.equal(after[name], before[name]) for name in after)
    assert loaded["args"].num_layers == 2


def test_megatrons_loop_loads_and_saves_at_another_layout(tmp_path):
    """At learning rate 0 it saves what it loaded, so the round trip is bitwise exact."""
    arch = models.architecture(
        num_layers=2,
        hidden_size=64,
        ffn_hidden_size=128,
        kv_channels=16,
        vocab_size=128,
        padded_vocab_size=128,
        rotary_base=10_000.0,
    )
    before = random_folder(tmp_path / "hf", arch)
    hf_to_megatron(ToMegatron(tmp_path / "hf", tmp_path / "megatron"))
    command = flags(
        train_iters=1,
        lr=0.0,
        tensor_model_parallel_size=2,
        pipeline_model_parallel_size=2,
        sequence_parallel=True,
        load=tmp_path / "megatron",
        use_checkpoint_args=True,
        dist_ckpt_strictness="raise_unexpected",
        save=tmp_path / "saved",
        save_interval=1,
        # These come from the checkpoint's arguments.
        num_layers=None,
        hidden_size=None,
        num_attention_heads=None,
        max_position_embeddings=None,
    )
    launch = ranks(4, "kvshift_megatron.pretrain", command, timeout=300, TORCHDYNAMO_DISABLE="1")
    assert launch.returncode == 0, launch.stdout[-5000:]
    assert f"successfully loaded checkpoint from {tmp_path / 'megatron'}" in launch.stdout
    # Each of the four ranks has saved its part.
    reader = TorchDistReader(tmp_path / "saved")
    assert len(list(reader.path.glob("*.distcp"))) >= 4
    assert reader.arguments().tokenizer_vocab_size == 128
    megatron_to_hf(ToHF(tmp_path / "saved", tmp_path / "back"))
    assert equal(stored(tmp_path / "back"), before)
