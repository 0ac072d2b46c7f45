"""kvshift-cpu hands on paths and arguments as they are."""

import json
import os
import subprocess
import sys

import pytest

from tests.support.launch import PROJECT, python_path
from tests.support.odd_names import ODD

pytestmark = pytest.mark.slow

_SCRIPT = """
import json, os, sys
with open(os.path.join(sys.argv[1], "seen.json"), "w") as file:
    json.dump([__file__, *sys.argv], file)
"""


def test_every_word_arrives_as_it_was_given(tmp_path):
    folder = tmp_path / ODD
    folder.mkdir()
    script = folder / f"{ODD}.py"
    script.write_text(_SCRIPT)
    words = [str(script), str(folder), ODD, "$(touch pwned)", ""]
    environment = {k: v for k, v in os.environ.items() if k not in ("RANK", "LOCAL_RANK")}
    result = subprocess.run(
        [sys.executable, "-m", "kvshift_megatron.cpu", *words],
        cwd=folder,
        env={**environment, "PYTHONPATH": python_path()},
        capture_output=True,
        text=True,
        timeout=200,
        check=False,
    )
    assert result.returncode == 0, result.stderr
    assert json.loads((folder / "seen.json").read_text()) == [str(script), *words]
    assert not list(tmp_path.rglob("pwned")) and not (PROJECT / "pwned").exists()
