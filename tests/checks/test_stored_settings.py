"""What a checkpoint says about its taps: recorded, compared and taken, whatever built the model."""

import argparse
from argparse import Namespace
from dataclasses import fields
from itertools import product

import pytest
from megatron.core import dist_checkpointing
from megatron.training import checkpointing, global_vars

from kvshift_megatron import KVShiftConfig, static_specs
from kvshift_megatron.arguments import (
    add_baseline_arg,
    add_kv_shift_args,
    flag_of,
    kv_shift_config_from_args,
    set_field,
)
from kvshift_megatron.convert.megatron_arguments import kv_shift_from_arguments
from kvshift_megatron.gpt_specs import convert_specs
from kvshift_megatron.gpt_specs import kv_shift_config_from_args as of_a_patched_script
from kvshift_megatron.layer_specs import kv_shift_layer_spec, shifting, vanilla_layer_spec
from kvshift_megatron.stored import settings
from kvshift_megatron.stored.settings import settings_from_arguments, stored_settings
from tests.support.single_process import gpt_model, transformer_config

FREE, CLAMP = KVShiftConfig(), KVShiftConfig(variant="clamp")
KEYS_ONLY = KVShiftConfig("clamp", window=3, shift_values=False, init="identity")
OWN_SPEC = ["kvshift_megatron.layer_specs", "kv_shift_layer_spec"]
# One for every variant, window and choice of what is shifted.
ALL = [
    KVShiftConfig(variant, window, keys, values, "uniform" if variant == "gate" else "identity")
    for variant, window in [("free", 2), ("free", 4), ("clamp", 2), ("clamp", 3), ("gate", 2)]
    for keys, values in [(True, True), (True, False), (False, True)]
]


def meaning(kv_shift):
    return (kv_shift.variant, kv_shift.window, kv_shift.shift_keys, kv_shift.shift_values)


def parser():
    return add_kv_shift_args(add_baseline_arg(argparse.ArgumentParser(exit_on_error=False)))


# --- every field has a way into the arguments and back ---


def test_every_field_of_the_configuration_is_stated_and_read():
    for kv_shift in ALL:
        args = Namespace()
        for field in fields(KVShiftConfig):
            set_field(args, field.name, getattr(kv_shift, field.name))
        assert kv_shift_config_from_args(args) == kv_shift
        assert settings_from_arguments(args) == kv_shift


def test_every_field_has_a_flag_that_the_messages_name():
    known = parser().format_help()
    for kv_shift, field in product(ALL, fields(KVShiftConfig)):
        flag = flag_of(field.name, getattr(kv_shift, field.name)).split()[1]
        assert f" {flag} " in known.replace("\n", " ")


def test_a_new_field_counts_as_one_that_changes_what_taps_mean():
    """Only what is known to matter at the start alone is left out."""
    names = {field.name for field in fields(KVShiftConfig)}
    assert set(settings.MEANING) == names - {"init", "seed"}


# --- what saved arguments say ---


@pytest.mark.parametrize(
    ("saved", "kv_shift"),
    [
        ({}, None),
        ({"spec": None}, None),
        ({"spec": ["my_specs", "kv_shift_layer_spec"]}, None),
        ({"spec": ["kvshift_megatron.layer_specs", "vanilla_layer_spec"]}, None),
        # Saved before layers recorded their settings: these specs have only one.
        ({"spec": OWN_SPEC}, FREE),
        ({"spec": ("kvshift_megatron.static_specs", "te_layer_spec")}, FREE),
        # A record says more than the spec's name.
        ({"spec": OWN_SPEC, "kv_shift_variant": "clamp"}, CLAMP),
        ({"no_kv_shift": True, "kv_shift_variant": None}, None),
        ({"no_kv_shift": False, "kv_shift_variant": None}, FREE),
        ({"kv_shift_variant": "clamp", "kv_shift_mixed": True}, None),
        # How taps started does not matter, even if a command line could not say it.
        ({"kv_shift_variant": "gate", "kv_shift_init": "identity"}, KVShiftConfig("gate")),
        ({"kv_shift_variant": "clamp", "kv_shift_window": 3, "no_kv_shift_values": True},
         KEYS_ONLY),
    ],
)  # fmt: skip
def test_settings_from_saved_arguments(saved, kv_shift):
    found = settings_from_arguments(Namespace(**saved))
    assert (found and meaning(found)) == (kv_shift and meaning(kv_shift))


@pytest.mark.parametrize(
    "saved",
    [
        {"kv_shift_variant": "fancy"},
        {"kv_shift_variant": ["clamp"]},
        {"kv_shift_variant": "free", "kv_shift_window": "3"},
        {"kv_shift_variant": "free", "no_kv_shift_keys": True, "no_kv_shift_values": True},
    ],
)
def test_impossible_settings_name_the_checkpoint(saved):
    with pytest.raises(ValueError, match="load: the checkpoint run/iter_2 states impossible"):
        stored_settings(Namespace(**saved), "run/iter_2")


# --- Megatron's arguments, a model and a checkpoint ---


@pytest.fixture
def megatron(tmp_path, monkeypatch, megatron_rank):
    """Return a function that gives Megatron new arguments, as a new process would have them."""

    def start(**values):
        given = {"load": None, "pretrained_checkpoint": None, "use_checkpoint_args": False}
        given |= {"non_persistent_ckpt_type": None, "non_persistent_global_ckpt_dir": None}
        given |= {"spec": None, "pipeline_model_parallel_size": 1, "context_parallel_size": 1}
        given |= {"exit_on_missing_checkpoint": False, "seed": 1}
        args = Namespace(**{**given, **values})
        monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", args)
        return args

    return start


def build(spec_of):
    config = transformer_config()
    return gpt_model(config, spec_of(config))


def save(args, model, root):
    """Save what Megatron's loop would: the model, and its arguments as they are."""
    directory = root / "iter_0000002"
    directory.mkdir(parents=True)
    (root / "latest_checkpointed_iteration.txt").write_text("2")
    state = {"args": args, "iteration": 2, "checkpoint_version": 3.0}
    dist_checkpointing.save({**state, "model": model.sharded_state_dict()}, str(directory))
    return root


def read_as_megatron_does(args):
    return checkpointing._load_base_checkpoint(args.load, args, rank0=True)


def with_settings(kv_shift):
    return lambda config: kv_shift_layer_spec(config, kv_shift=kv_shift)


# Ways of building a model with given taps: by name.
WAYS = {
    "callable": with_settings,
    "shifting": lambda kv_shift: shifting(vanilla_layer_spec, kv_shift),
    "patched": lambda kv_shift: (
        lambda config: convert_specs(vanilla_layer_spec(config), None, config, kv_shift)[0]
    ),
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kv_shift", [FREE, CLAMP, KEYS_ONLY], ids=lambda k: k.describe())
def test_whatever_builds_the_model_a_checkpoint_says_what_its_taps_mean(
    megatron, tmp_path, way, kv_shift
):
    args = megatron()
    root = save(args, build(WAYS[way](kv_shift)), tmp_path / "run")
    saved = dist_checkpointing.load_common_state_dict(str(root / "iter_0000002"))["args"]
    assert meaning(settings_from_arguments(saved)) == meaning(kv_shift)
    # The same is loaded, and others are not.
    args = megatron(load=str(root))
    build(WAYS[way](kv_shift))
    assert read_as_megatron_does(args)[0]["iteration"] == 2
    other = KVShiftConfig(variant="gate")
    args = megatron(load=str(root))
    build(WAYS[way](other))
    with pytest.raises(ValueError) as caught:
        read_as_megatron_does(args)
    for part in (f"variant='{kv_shift.variant}'", "variant='gate'", str(root), "--kv-shift-var"):
        assert part in str(caught.value)


def test_a_static_spec_does_not_load_what_it_cannot_express(megatron, tmp_path):
    """Stock scripts call none of this package's functions after the import of the spec."""
    root = save(megatron(), build(with_settings(CLAMP)), tmp_path / "run")
    args = megatron(load=str(root))
    build(lambda config: static_specs.local_layer_spec)
    with pytest.raises(ValueError, match=r"variant='clamp'.*variant='free'.*static --spec has"):
        read_as_megatron_does(args)


def test_layers_of_several_kinds_are_not_compared(megatron, tmp_path):
    def mixed(config):
        block = kv_shift_layer_spec(config, kv_shift=FREE)
        block.layer_specs[1].submodules.self_attention.params["kv_shift"] = CLAMP
        return block

    args = megatron()
    root = save(args, build(mixed), tmp_path / "run")
    assert args.kv_shift_mixed
    args = megatron(load=str(root))
    build(mixed)
    assert read_as_megatron_does(args)[0]["iteration"] == 2


@pytest.mark.parametrize("spec_of", [vanilla_layer_spec, with_settings(CLAMP)])
def test_vanilla_on_either_side_is_left_to_the_comparison_of_taps(megatron, tmp_path, spec_of):
    root = save(megatron(no_kv_shift=True), build(vanilla_layer_spec), tmp_path / "run")
    args = megatron(load=str(root))
    build(spec_of)
    assert read_as_megatron_does(args)[0]["iteration"] == 2


# --- --use-checkpoint-args ---


def taken(root, **given):
    words = parser().parse_args([])
    return Namespace(**{**vars(words), "use_checkpoint_args": True, "load": str(root), **given})


@pytest.mark.parametrize("kv_shift", ALL, ids=lambda k: k.describe())
def test_a_spec_and_a_patch_take_the_settings_of_the_checkpoint(megatron, tmp_path, kv_shift):
    root = save(megatron(), build(with_settings(kv_shift)), tmp_path / "run")
    megatron(load=str(root), use_checkpoint_args=True)
    model = build(kv_shift_layer_spec)
    assert model.decoder.layers[0].self_attention.kv_shift == kv_shift
    args = megatron(**vars(taken(root)))
    assert of_a_patched_script(args) == kv_shift
    # Also if asked again, once the layers have recorded theirs.
    build(with_settings(kv_shift))
    assert of_a_patched_script(args) == kv_shift
    # Without the flag nothing is taken.
    assert meaning(of_a_patched_script(megatron(**vars(taken(root, use_checkpoint_args=False)))))


def test_a_flag_may_repeat_the_checkpoint_but_not_contradict_it(megatron, tmp_path):
    root = save(megatron(), build(with_settings(KEYS_ONLY)), tmp_path / "run")
    same = {"kv_shift_window": 3, "no_kv_shift_values": True, "kv_shift_seed": 7}
    found = of_a_patched_script(megatron(**vars(taken(root, **same))))
    assert (meaning(found), found.seed) == (meaning(KEYS_ONLY), 7)
    for given, parts in [
        ({"kv_shift_variant": "free"}, ["variant='clamp'", "variant='free'"]),
        ({"kv_shift_window": 2}, ["window=3", "window=2", "set --kv-shift-window 3"]),
        ({"no_kv_shift_keys": True}, ["shift_keys=True", "drop --no-kv-shift-keys"]),
        ({"no_kv_shift": True}, ["no_kv_shift: ", "clamp, window 3, keys"]),
    ]:
        with pytest.raises(ValueError) as caught:
            of_a_patched_script(megatron(**vars(taken(root, **given))))
        for part in [str(root), *parts]:
            assert part in str(caught.value)


def test_without_a_checkpoint_the_flags_and_defaults_hold(megatron, tmp_path):
    args = megatron(**vars(taken(tmp_path / "new", kv_shift_window=3)))
    assert of_a_patched_script(args) == KVShiftConfig(window=3)
    megatron(load=str(tmp_path / "new"), use_checkpoint_args=True)
    assert build(kv_shift_layer_spec).decoder.layers[0].self_attention.kv_shift == FREE


def test_a_checkpoint_that_cannot_be_read_is_named(megatron, tmp_path):
    root = save(megatron(), build(with_settings(CLAMP)), tmp_path / "run")
    (root / "iter_0000002" / ".metadata").write_bytes(b"")
    with pytest.raises(ValueError, match=r"^load: the arguments .* in .*run cannot be read"):
        of_a_patched_script(megatron(**vars(taken(root))))


# --- the converter ---


def test_the_converter_follows_the_record():
    names = {"alpha_1", "alpha_2", "beta_1", "beta_2"}
    recorded = Namespace(kv_shift_variant="clamp")
    found = kv_shift_from_arguments(recorded, names, None, "run")
    assert meaning(found) == meaning(CLAMP)
    assert meaning(kv_shift_from_arguments(recorded, names, "clamp", "run")) == meaning(CLAMP)
    with pytest.raises(ValueError, match=r"'clamp', and --kv-shift-variant says 'free': drop"):
        kv_shift_from_arguments(recorded, names, "free", "run")
    # A checkpoint of a stock script, from before layers recorded their settings.
    found = kv_shift_from_arguments(Namespace(spec=OWN_SPEC), names, None, "run")
    assert meaning(found) == meaning(FREE)
    with pytest.raises(ValueError, match="not say what its taps mean"):
        kv_shift_from_arguments(Namespace(kv_shift_mixed=True), names, None, "run")
    recorded = Namespace(kv_shift_variant="free", kv_shift_window=3)
    with pytest.raises(ValueError, match=r"alpha_2, beta_1.* free, window 3"):
        kv_shift_from_arguments(recorded, names, None, "run")
