"""Checkpoints to be damaged, each test its own copy."""

import shutil
from pathlib import Path

import pytest

from tests.training.faults.folders_of_steps import save_all


@pytest.fixture(scope="module")
def saved(tmp_path_factory, _process_group):
    folder = tmp_path_factory.mktemp("saved")
    save_all(folder)
    return folder


@pytest.fixture
def root(tmp_path, saved, megatron_rank):
    return Path(shutil.copytree(saved, tmp_path / "run"))
