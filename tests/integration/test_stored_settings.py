"""The settings that a checkpoint was trained with decide what its taps mean, in Megatron's loop."""

import pytest

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.convert.architecture import Llama3RopeScaling
from kvshift_megatron.convert.to_megatron import ToMegatron, hf_to_megatron
from tests.convert import models
from tests.convert.test_round_trips import random_folder
from tests.integration.tiny_gpt import flags
from tests.support.forked_runs import Run, run_plan

pytestmark = pytest.mark.slow

_STEPS = 2
_TAKE = {"use_checkpoint_args": True}
_CLAMP = {"kv_shift_variant": "clamp", "kv_shift_init": "identity"}
# Megatron takes these flags from a checkpoint, or this package does.
_OF_THE_MODEL = (
    *("num_layers", "hidden_size", "num_attention_heads", "group_query_attention"),
    *("num_query_groups", "seq_length", "max_position_embeddings", "position_embedding_type"),
    *("normalization", "swiglu", "disable_bias_linear", "untie_embeddings_and_output_weights"),
)
_NO_MODEL = dict.fromkeys(_OF_THE_MODEL)

_CONVERTED = models.architecture(
    vocab_size=128,
    padded_vocab_size=128,
    rotary_base=10_000.0,
    norm_epsilon=0.3,
    qk_layernorm=True,
    rope_scaling=Llama3RopeScaling(factor=4.0),
    kv_shift=KVShiftConfig("clamp", window=3, shift_values=False, init="identity"),
)
_FLAGS_OF_CONVERTED = {
    "hidden_size": 32,
    "ffn_hidden_size": 48,
    "kv_channels": 8,
    "norm_epsilon": 0.3,
    "qk_layernorm": True,
    "attention_dropout": 0.0,
    "hidden_dropout": 0.0,
    "use_rope_scaling": True,
    "rope_scaling_factor": 4.0,
    "kv_shift_variant": "clamp",
    "kv_shift_window": 3,
    "kv_shift_init": "identity",
    "no_kv_shift_values": True,
}


def _plan(root) -> dict[str, dict]:
    """Return flags by name, in the order of the runs: later runs load what earlier ones saved."""

    def save(name):
        return {"save": root / name, "save_interval": _STEPS}

    def load(name):
        return {"load": root / name}

    converted = {**load("converted"), "finetune": True}
    return {
        "clamp": {**_CLAMP, **save("of-clamp")},
        "free": save("of-free"),
        "legacy-clamp": {**_CLAMP, "ckpt_format": "torch", **save("of-legacy-clamp")},
        "baseline": {"no_kv_shift": True, **save("of-baseline")},
        # These train.
        "clamp-stated": {**_CLAMP, **load("of-clamp")},
        "clamp-taken": {**_TAKE, **_NO_MODEL, **load("of-clamp")},
        "clamp-pretrained": {**_TAKE, **_NO_MODEL, "pretrained_checkpoint": root / "of-clamp"},
        "baseline-taken": {
            **_TAKE,
            **_NO_MODEL,
            **load("of-baseline"),
            "finetune": True,
            "kv_shift_init": "identity",
        },
        "nothing-there": {**_TAKE, **load("not-there-yet")},
        "converted-stated": {**converted, **_FLAGS_OF_CONVERTED},
        # It holds no optimizer state, so any schedule will do.
        "converted-resumed": {**load("converted"), **_FLAGS_OF_CONVERTED},
        "converted-taken": {**converted, **_TAKE, **_NO_MODEL},
        # These are refused.
        "clamp-as-free": load("of-clamp"),
        "clamp-as-free-finetuned": {**load("of-clamp"), "finetune": True},
        "free-as-clamp": {**_CLAMP, **load("of-free")},
        "legacy-as-free": {"ckpt_format": "torch", **load("of-legacy-clamp")},
        "contradicted": {**_TAKE, "kv_shift_variant": "free", **load("of-clamp")},
        "taken-for-the-baseline": {**_TAKE, "no_kv_shift": True, **load("of-clamp")},
        "taken-from-nowhere": {**_TAKE, **_NO_MODEL, **load("not-there-yet")},
        "no-checkpoint-named": _TAKE,
        "no-model": _NO_MODEL,
    }


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[str, Run]:
    directory = tmp_path_factory.mktemp("stored-settings")
    random_folder(directory / "hf", _CONVERTED)
    hf_to_megatron(ToMegatron(directory / "hf", directory / "converted"))
    # The same learning-rate schedule for all, including those that resume.
    common = {"train_iters": 2 * _STEPS, "exit_interval": _STEPS, "lr": 3e-2}
    plan = {name: flags(**{**common, **given}) for name, given in _plan(directory).items()}
    return run_plan(directory, plan)


def trained(run: Run) -> list[str]:
    assert run.code == 0, run.output[-5000:]
    assert len(run.losses) == 2 * _STEPS
    return run.losses


@pytest.mark.parametrize(
    ("name", "theirs", "ours", "flag"),
    [
        ("clamp-as-free", "clamp", "free", "set --kv-shift-variant clamp"),
        ("clamp-as-free-finetuned", "clamp", "free", "set --kv-shift-variant clamp"),
        ("free-as-clamp", "free", "clamp", "set --kv-shift-variant free"),
        ("legacy-as-free", "clamp", "free", "set --kv-shift-variant clamp"),
        ("contradicted", "clamp", "free", "set --kv-shift-variant clamp"),
    ],
)
def test_another_variant_is_refused_with_both_values(runs, name, theirs, ours, flag):
    run = runs[name]
    assert run.code != 0 and not run.losses
    for part in (f"trained with variant='{theirs}'", f"variant='{ours}'", flag):
        assert part in run.output, run.output[-5000:]
    assert "successfully loaded checkpoint" not in run.output


def test_the_taps_that_differ_only_in_their_settings_train_apart(runs):
    """Without the settings the two would load each other's taps: their names are the same."""
    assert trained(runs["clamp"]) != trained(runs["free"])


def test_the_settings_come_from_the_checkpoint_if_it_is_asked(runs):
    for name in ("clamp-taken", "clamp-pretrained"):
        assert "KV shifting (clamp, window 2, keys and values)" in runs[name].output
    assert trained(runs["clamp-taken"]) == trained(runs["clamp-stated"])
    trained(runs["clamp-pretrained"])


def test_a_converted_checkpoint_trains_without_a_flag_for_the_model(runs):
    taken, stated = runs["converted-taken"], runs["converted-stated"]
    assert "KV shifting (clamp, window 3, keys)" in taken.output
    assert trained(taken) == trained(stated)


def test_a_converted_checkpoint_trains_without_finetune(runs):
    assert trained(runs["converted-resumed"]) == trained(runs["converted-stated"])


def test_taps_start_from_a_baseline_whose_arguments_are_taken(runs):
    assert "KV shifting (free, window 2, keys and values)" in runs["baseline-taken"].output
    trained(runs["baseline-taken"])


def test_the_first_start_of_a_run_that_will_resume_has_nothing_to_take(runs):
    assert trained(runs["nothing-there"]) == trained(runs["free"])


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("contradicted", ["variant='clamp'"]),
        ("taken-for-the-baseline", ["no_kv_shift: ", "clamp, window 2", "drop --no-kv-shift"]),
        ("taken-from-nowhere", ["num_attention_heads is not set", "--use-checkpoint-args"]),
        ("no-checkpoint-named", ["use_checkpoint_args: ", "add --load"]),
        ("no-model", ["num_attention_heads is not set", "give --num-attention-heads"]),
    ],
)
def test_what_can_be_known_at_the_start_is_one_sentence(runs, name, parts):
    run = runs[name]
    assert run.code == 1 and not run.losses
    assert "Traceback" not in run.output
    for part in ["kvshift_megatron: ", *parts]:
        assert part in run.output, run.output[-5000:]
