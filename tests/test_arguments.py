"""The `--kv-shift-*` flags."""

import argparse
import sys
from argparse import Namespace

import pytest

from kvshift_megatron import KVShiftConfig
from kvshift_megatron.arguments import (
    add_baseline_arg,
    add_kv_shift_args,
    kv_shift_config_from_args,
    megatron_args,
)


def parse(*words):
    parser = add_kv_shift_args(add_baseline_arg(argparse.ArgumentParser(exit_on_error=False)))
    return kv_shift_config_from_args(parser.parse_args(words))


@pytest.mark.parametrize(
    ("words", "config"),
    [
        ([], KVShiftConfig()),
        (["--kv-shift-variant", "gate"], KVShiftConfig(variant="gate")),
        (["--kv-shift-variant", "clamp"], KVShiftConfig(variant="clamp")),
        (["--kv-shift-window", "4"], KVShiftConfig(window=4)),
        (["--kv-shift-init", "identity"], KVShiftConfig(init="identity")),
        (["--no-kv-shift-keys"], KVShiftConfig(shift_keys=False)),
        (["--no-kv-shift-values"], KVShiftConfig(shift_values=False)),
        (["--kv-shift-seed", "7"], KVShiftConfig(seed=7)),
        (["--kv-shift-seed", "0"], KVShiftConfig(seed=0)),
        (["--no-kv-shift"], None),
        (
            [
                "--kv-shift-variant=clamp",
                "--kv-shift-window=3",
                "--kv-shift-init=identity",
                "--no-kv-shift-values",
                "--kv-shift-seed=3",
            ],
            KVShiftConfig("clamp", 3, True, False, "identity", 3),
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_become_fields(words, config):
    assert parse(*words) == config


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--kv-shift-variant", "free"], "variant"),
        (["--kv-shift-window", "2"], "window"),
        (["--kv-shift-init", "uniform"], "init"),
        (["--kv-shift-seed", "0"], "seed"),
        (["--no-kv-shift-keys"], "shift_keys"),
        (["--no-kv-shift-values"], "shift_values"),
    ],
)
def test_taps_without_kv_shifting_are_refused(words, named):
    with pytest.raises(ValueError, match=rf"--no-kv-shift .*\b{named}\b"):
        parse("--no-kv-shift", *words)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (["--kv-shift-variant", "Free"], "variant='Free'"),
        (["--kv-shift-window", "7"], "window=7"),
        (["--kv-shift-init", "ones"], "init='ones'"),
        (["--kv-shift-seed", "-1"], "seed=-1"),
        (["--no-kv-shift-keys", "--no-kv-shift-values"], "shift_keys and shift_values"),
    ],
)
def test_a_flag_fails_with_the_fields_message(words, named):
    with pytest.raises(ValueError, match=named):
        parse(*words)


def test_the_parser_is_returned_with_one_more_group():
    parser = argparse.ArgumentParser()
    assert add_kv_shift_args(parser) is parser
    assert "KV-shifting attention" in parser.format_help()


def test_megatrons_arguments_are_found_without_importing_it(monkeypatch):
    monkeypatch.delitem(sys.modules, "megatron.training.global_vars", raising=False)
    assert megatron_args() is None
    assert "megatron.training.global_vars" not in sys.modules


def test_megatrons_arguments_are_those_that_its_scripts_have_set(monkeypatch):
    from megatron.training import global_vars

    monkeypatch.setattr(global_vars, "_GLOBAL_ARGS", None)
    assert megatron_args() is None
    args = Namespace(seed=3)
    global_vars.set_args(args)
    assert megatron_args() is args
