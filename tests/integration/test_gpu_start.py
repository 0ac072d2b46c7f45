"""The start of a run on a GPU, as far as it can be tested without one."""

import sys

import pytest
from megatron.core.datasets import utils

from kvshift_megatron import cpu
from kvshift_megatron.training.run_config import parse_and_check
from kvshift_megatron.upstream import dataset_helpers
from tests.integration.tiny_gpt import flags

pytestmark = pytest.mark.slow


def test_a_model_that_would_stay_on_the_cpu_is_refused(monkeypatch):
    assert not cpu.is_enabled()
    monkeypatch.setattr(sys, "argv", ["pretrain", *flags(use_cpu_initialization=True)])
    with pytest.raises(ValueError, match=r"use_cpu_initialization: .* drop --use-cpu-init"):
        parse_and_check()


def test_helpers_are_compiled_only_where_they_are_missing(monkeypatch):
    compiled = []
    monkeypatch.setattr(utils, "compile_helpers", lambda: compiled.append(True))
    dataset_helpers.use_built()
    utils.compile_helpers()
    assert not compiled
    monkeypatch.setattr(dataset_helpers, "HELPERS", "megatron.core.datasets.no_such_module")
    utils.compile_helpers()
    assert compiled == [True]
