"""Megatron's loop takes its steps, and ends, when it is told to."""

import pytest

from tools.benchmarks.model_flags import model_flags
from tools.benchmarks.stepping import Run, RunFailed

pytestmark = pytest.mark.slow


def test_windows_figures_and_the_end(tmp_path):
    model = {"layers": 1, "hidden": 64, "heads": 4, "query_groups": 2, "seq_length": 16, "batch": 2}
    run = Run("tiny", model_flags(**model), 1, {"KVSHIFT_IMPLEMENTATION": "eager"})
    try:
        run.start(tmp_path)
        run.wait_until_ready()
        seconds = [run.window(steps) for steps in (1, 2)]
        figures = run.ask_figures()
        run.wait_until_ended()
    finally:
        run.stop()
    assert all(s > 0 for s in seconds)
    assert figures["peak_bytes"] > 100 * 2**20  # PyTorch alone takes more
    # More than the input [s, b, h] in fp32, and less than 1 MiB.
    assert 16 * 2 * 64 * 4 < figures["saved_bytes_a_layer"] < 2**20
    log = (tmp_path / "tiny.log").read_text()
    assert "implementation of the shift: eager" in log
    # Asking for more raises an error with the run's last lines.
    with pytest.raises(RunFailed, match=r"the run tiny (is gone|lost)"):
        run.window(1)


def test_a_run_that_does_not_start_says_why(tmp_path):
    # Python does not find its standard library there and ends at once.
    run = Run("broken", [], 1, {"PYTHONHOME": str(tmp_path)})
    try:
        run.start(tmp_path)
        with pytest.raises(RunFailed, match=r"the run broken did not start:(.|\n)*encodings"):
            run.wait_until_ready()
    finally:
        run.stop()


def test_a_folder_too_deep_for_a_socket_is_refused(tmp_path):
    with pytest.raises(RunFailed, match="set TMPDIR"):
        Run("r", []).start(tmp_path / ("x" * 100))
