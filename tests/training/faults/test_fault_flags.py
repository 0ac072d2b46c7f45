"""The flags for faults, their defaults, and what is refused."""

import argparse
from argparse import Namespace

import pytest

from kvshift_megatron.training.faults.fault_flags import (
    add_faults_args,
    check_faults_args,
    hang_timeout,
)


def arguments(*flags, **megatrons):
    values = {
        "distributed_timeout_minutes": 10,
        "distributed_timeout_seconds_after_init": None,
        "inprocess_restart": False,
        "fake_process_group": False,
        "save": "run",
        "ckpt_format": "torch_dist",
        "non_persistent_ckpt_type": None,
        "async_save": False,
        "async_strategy": "nvrx",
    }
    parsed = add_faults_args(argparse.ArgumentParser()).parse_args(flags)
    return Namespace(**{**values, **megatrons, **vars(parsed)})


def test_the_time_out_is_half_of_megatrons():
    assert hang_timeout(arguments()) == 300
    assert hang_timeout(arguments(distributed_timeout_minutes=30)) == 900
    assert hang_timeout(arguments(distributed_timeout_seconds_after_init=90)) == 45
    assert hang_timeout(arguments("--hang-timeout-seconds", "42")) == 42
    assert hang_timeout(arguments("--hang-timeout-seconds", "0")) == 0
    # In-process restart has its own time-outs.
    assert hang_timeout(arguments(inprocess_restart=True)) == 0
    assert hang_timeout(arguments("--hang-timeout-seconds", "42", fake_process_group=True)) == 0


@pytest.mark.parametrize(
    ("seconds", "megatrons", "words"),
    [
        ("-1", {}, "expected seconds above 0"),
        ("600", {}, "not below Megatron's time-out of a collective operation, 600 s"),
        ("580", {}, "and up to 50 s to find the rank"),
        ("60", {"distributed_timeout_seconds_after_init": 60}, "--distributed-timeout-minutes"),
        ("60", {"inprocess_restart": True}, "drop --hang-timeout-seconds"),
    ],
)
def test_an_impossible_time_out_is_refused(seconds, megatrons, words):
    with pytest.raises(ValueError, match="hang_timeout_seconds") as caught:
        check_faults_args(arguments("--hang-timeout-seconds", seconds, **megatrons))
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("megatrons", "words"),
    [
        ({"ckpt_format": "torch"}, "ckpt_format torch:"),
        ({"ckpt_format": "fsdp_dtensor"}, "ckpt_format fsdp_dtensor:"),
        ({"non_persistent_ckpt_type": "local"}, "non_persistent_ckpt_type local:"),
        ({"async_save": True}, "async_strategy nvrx:"),
        ({"save": "msc://bucket/run"}, "save msc://bucket/run:"),
    ],
)
def test_continue_is_refused_if_the_ranks_cannot_agree(megatrons, words):
    with pytest.raises(ValueError, match="on_save_failure=continue with ") as caught:
        check_faults_args(arguments("--on-save-failure", "continue", **megatrons))
    assert words in str(caught.value) and "--on-save-failure stop" in str(caught.value)
    check_faults_args(arguments(**megatrons))


def test_continue_is_possible_otherwise():
    for megatrons in ({}, {"save": None}, {"async_save": True, "async_strategy": "mcore"}):
        check_faults_args(arguments("--on-save-failure", "continue", **megatrons))
