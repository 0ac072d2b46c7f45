"""A folder exported with one release gives the same results in all others, without this package."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.hf import export

pytestmark = pytest.mark.slow

WAYS = 16


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """Return the folders in KVSHIFT_EXPORTED (`make test-transformers`), or export new ones."""
    directory = tmp_path_factory.mktemp("exported") / "here"
    if made := os.environ.get("KVSHIFT_EXPORTED"):
        shutil.copytree(made, directory)
    else:
        export.main(str(directory))
    return directory


def test_every_way_to_use_it(exported):
    done = export.use(exported)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    assert len(done.stdout.splitlines()) == WAYS * len(export.MODELS)


def test_another_result_is_noticed(exported, tmp_path):
    shutil.copytree(exported, tmp_path / "changed")
    expected = torch.load(tmp_path / "changed" / "expected.pt", weights_only=True)
    expected["dense"]["generated"][0, -1] += 1
    torch.save(expected, tmp_path / "changed" / "expected.pt")
    done = export.use(tmp_path / "changed")
    assert done.returncode == 1 and "AssertionError: dense: generate" in done.stderr


def test_the_example_generates_from_it(exported):
    example = Path(__file__).parents[2] / "examples" / "hugging_face" / "generate.py"
    done = subprocess.run(
        [sys.executable, example, exported / "dense"], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 8 tokens repeat what came before" in done.stdout
