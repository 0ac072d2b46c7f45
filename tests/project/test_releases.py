"""The release matrix: the tests that it leaves out exist, and a wrong release stops it."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.support import releases
from tests.support.launch import PROJECT

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    "start", [*releases.NOT_IN_MATRIX, *releases.BEGINS_IN, *releases.ALSO_NEXT]
)
def test_the_tables_name_tests_that_exist(start):
    path, _, test = start.partition("::")
    files = sorted(PROJECT.glob(f"{path}*"))
    assert files
    assert f"def {test.partition('[')[0]}" in files[0].read_text() if test else True


@pytest.mark.parametrize(
    ("version", "runs"),
    [("0.17.1", False), ("0.18.2", False), ("0.19.0", True), ("0.19.2", True), ("0.20.0rc1", True)],
)
def test_a_feature_is_tested_from_its_first_release_on(version, runs):
    test = "tests/test_layer_specs.py::test_local_parts[gpt-RMSNorm]"
    why = releases.why_not_in_release(test, version)
    assert runs if why is None else "0.19" in why and "GPTModelConfig" in why
    assert releases.why_not_in_release(test.replace("gpt", "core"), version) is None


def test_the_entry_point_is_not_in_the_matrix():
    assert "0.19" in releases.why_not_in_matrix("tests/integration/test_training_loop.py::test_x")
    assert releases.why_not_in_matrix("tests/distributed/test_layouts.py::test_x") is None


def test_a_checkout_also_runs_tests_of_the_entry_point():
    for start in releases.ALSO_NEXT:
        assert releases.why_not_in_matrix(f"{start}::test_x")
        assert releases.why_not_in_matrix(f"{start}::test_x", next_one=True) is None
    assert releases.why_not_in_matrix("tests/slurm/test_x.py::test_x", next_one=True)
    assert releases.checkout("0.19.2") is None
    assert releases.checkout("/sources/Megatron-LM") == Path("/sources/Megatron-LM").resolve()


@pytest.mark.parametrize("wanted", ["0.1.0", "/sources/Megatron-LM"])
def test_another_release_than_asked_for_stops_the_run(wanted):
    """Nothing may pass on a wrong release, for example if PYTHONPATH is lost on the way."""
    run = subprocess.run(
        [sys.executable, "-m", "pytest", f"--megatron={wanted}", "--co", "-q", "tests/ops"],
        cwd=PROJECT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert run.returncode == pytest.ExitCode.USAGE_ERROR
    imported = releases.imported_version()
    assert f"--megatron {wanted}: Python imports release {imported}" in run.stderr


@pytest.mark.parametrize(
    ("has", "sentence"),
    [
        (None, "MEGATRON_PATH is not set: add MEGATRON_PATH=FOLDER, a checkout of Megatron-LM"),
        ([], "holds no megatron/core/package_info.py: name the top folder of a checkout"),
        (["core/package_info.py"], "holds no megatron/training/__init__.py: name the top folder"),
    ],
    ids=["nothing", "an empty folder", "half a checkout"],
)
def test_make_test_next_names_what_is_no_checkout(tmp_path, has, sentence):
    for file in has or ():
        path = tmp_path / "megatron" / file
        path.parent.mkdir(parents=True)
        path.touch()
    named = "" if has is None else str(tmp_path)
    run = subprocess.run(
        ["bash", "tools/test_next.sh", str(tmp_path / "venv"), named, "-q"],
        cwd=PROJECT, capture_output=True, text=True, timeout=60,
    )  # fmt: skip
    assert run.returncode == 2
    (said,) = run.stderr.splitlines()
    assert said.startswith("make test-next: MEGATRON_PATH") and sentence in said
    assert not (tmp_path / "venv").exists()
