"""Megatron-Bridge's AutoBridge: Hugging Face to Megatron to Hugging Face, on two ranks.

TE-free layers are also run; Transformer Engine's layers are only built, on the CPU.
"""

import json

import pytest
from transformers import AutoModelForCausalLM

import kvshift_megatron.hf  # noqa: F401  (registers)
from tests.support.launch import torchrun
from tests.transformer_engine import bridge_worker
from tests.transformer_engine.bridge_worker import CASES


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    return tmp_path_factory.mktemp("bridge")


@pytest.fixture(scope="module")
def results(output):
    """Return the results of both ranks by case, from one launch."""
    worker = ["-m", "kvshift_megatron.cpu", bridge_worker.__file__, str(output)]
    launch = torchrun(2, worker, timeout=600)
    assert launch.returncode == 0, launch.stdout[-5000:]
    return {
        name: [json.loads((output / f"{name}.rank{rank}.json").read_text()) for rank in range(2)]
        for name in CASES
    }


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if not case.plant])
def test_every_weight_comes_back_and_the_logits_agree(results, name):
    for result in results[name]:
        assert result["missing"] == result["extra"] == result["unequal"] == []
        assert result["shifting_layers"] == 2 // CASES[name].pp
        if CASES[name].runs:
            assert result["logits"] < 1e-5


def test_a_saved_folder_is_complete(results, output):
    """It loads with its own code, and holds the original weights."""
    saved, source = output / "tap-sharded" / "saved", output / "tap-sharded"
    ours = AutoModelForCausalLM.from_pretrained(saved, trust_remote_code=True).state_dict()
    expected = AutoModelForCausalLM.from_pretrained(source).state_dict()
    assert ours.keys() == expected.keys()
    assert all(ours[name].equal(tensor) for name, tensor in expected.items())
    assert (saved / "tokenizer.json").is_file()


def test_a_planted_error_is_caught(results):
    taps = [f"model.layers.0.self_attn.alpha_{j}" for j in (1, 2)]
    for result in results["planted"]:
        assert result["unequal"] == taps
        assert result["logits"] > 1e-3
