"""Rotating keys in the pass that shifts them: results of a layer, conditions and refusals."""

import json
import os
import subprocess
import sys

import pytest
import torch

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.attention.rope import RopeFusion
from tests.attention.test_self_attention import build_attention
from tests.support.launch import PROJECT
from tests.support.single_process import transformer_config
from tests.support.tolerances import FP32_REL

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def found():
    run = subprocess.run(
        [sys.executable, "-m", "tests.attention.rope_worker"],
        cwd=PROJECT,
        env={**os.environ, "TRITON_INTERPRET": "1", "KVSHIFT_IMPLEMENTATION": "triton"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return json.loads(run.stdout.splitlines()[-1])


@pytest.mark.parametrize("case", ["free", "window 3, interleaved", "keys", "values", "packed"])
def test_the_layer_equals_one_whose_keys_megatron_rotates(found, case):
    assert {"output", "input gradient", "linear_qkv.weight"} < found[case].keys()
    for name, error in found[case].items():
        assert error <= FP32_REL, (name, error)


def test_wrongly_rotated_keys_are_caught(found):
    assert found["planted"]["output"] > 1e-3


def config(**changes):
    made = transformer_config()
    for name, value in {"apply_rope_fusion": True, **changes}.items():
        setattr(made, name, value)
    return made


@pytest.mark.parametrize(
    ("changes", "is_spread", "named"),
    [
        ({"apply_rope_fusion": False}, False, "apply_rope_fusion"),
        ({}, True, "context parallelism"),
        ({"flash_decode": True}, False, "flash_decode"),
        ({"mrope_section": [1, 1, 2]}, False, "mrope_section"),
        ({"yarn_rotary_scaling_factor": 4.0, "yarn_mscale": 1.0}, False, "YaRN"),
    ],
)
def test_what_rules_it_out_keeps_megatrons_rotation_and_refuses_a_forced_one(
    monkeypatch, changes, is_spread, named
):
    assert RopeFusion(config(), 1, False).is_possible
    assert not RopeFusion(config(**changes), 1, is_spread).is_possible
    monkeypatch.setenv("KVSHIFT_ROPE", "fused")
    with pytest.raises(ValueError, match=rf"KVSHIFT_ROPE=fused: {named}.*auto or separate"):
        RopeFusion(config(**changes), 1, is_spread)


def test_a_choice_that_does_not_exist_is_refused(monkeypatch, megatron_rank):
    monkeypatch.setenv("KVSHIFT_ROPE", "fast")
    with pytest.raises(ValueError, match="KVSHIFT_ROPE must be one of auto, fused, separate"):
        build_attention(KVShiftConfig())


def test_on_a_cpu_megatron_rotates_and_forcing_fusion_is_refused(monkeypatch):
    angles, x = torch.randn(5, 1, 1, 8), torch.randn(5, 1, 32)
    assert RopeFusion(config(), 1, False).take(angles, x) == (None, angles)
    monkeypatch.setenv("KVSHIFT_ROPE", "fused")
    with pytest.raises(ValueError, match=r"KVSHIFT_ROPE=fused: .* not run in Triton here"):
        RopeFusion(config(), 1, False).take(angles, x)


def test_a_layer_without_rotation_has_nothing_to_fuse():
    layers = config(no_rope_freq=[1, 0])
    assert [RopeFusion(layers, layer, False).is_possible for layer in (1, 2)] == [False, True]
