"""What Megatron-Bridge loads is compared with the model first, for training and for its weights."""

import json

import pytest

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.stored.bridge_load import settings_from_run_config
from tests.support.launch import PROJECT, torchrun

WORKER = PROJECT / "tests" / "transformer_engine" / "bridge_loads_worker.py"
ROADS = ("weights", "training")


@pytest.fixture(scope="module")
def said(tmp_path_factory) -> dict[str, str]:
    output = tmp_path_factory.mktemp("loads")
    worker = ["-m", "kvshift_megatron.cpu", str(WORKER), str(output)]
    launch = torchrun(1, worker, timeout=400)
    assert launch.returncode == 0, launch.stdout[-5000:]
    return json.loads((output / "said.json").read_text())


def test_the_same_settings_are_loaded(said):
    assert said["free, weights"] == "loaded"
    assert said["free, training"].startswith(("loaded", "past the check: "))


@pytest.mark.parametrize("road", ROADS)
@pytest.mark.parametrize(
    ("model", "theirs", "ours"),
    [
        ("clamp", "variant='free'", "variant='clamp'"),
        ("keys", "shift_values=True", "shift_values=False"),
    ],
)
def test_other_settings_are_refused_with_both_values(said, road, model, theirs, ours):
    assert f"were trained with {theirs}" in said[f"{model}, {road}"]
    assert f"would read them with {ours}: give the layer spec" in said[f"{model}, {road}"]


@pytest.mark.parametrize("road", ROADS)
def test_the_baseline_never_loads_taps(said, road):
    assert "this model would ignore its taps" in said[f"baseline, {road}"]


def test_settings_that_are_impossible_are_named(said):
    assert "states impossible settings of KV shifting" in said["impossible"]


@pytest.mark.parametrize(
    ("spec", "expected"),
    [
        (None, None),
        ({"_target_": "megatron.bridge.models.gpt_provider.default_layer_spec"}, None),
        ({"_target_": "kvshift_megatron.layer_specs.kv_shift_layer_spec"}, KVShiftConfig()),
        (
            {
                "_target_": "kvshift_megatron.layer_specs.kv_shift_layer_spec",
                "_partial_": True,
                "kv_shift": {"variant": "clamp", "init": "identity"},
            },
            KVShiftConfig(variant="clamp", init="identity"),
        ),
    ],
)
def test_what_a_configuration_states(spec, expected):
    assert settings_from_run_config({"model": {"transformer_layer_spec": spec}}, "x") == expected
