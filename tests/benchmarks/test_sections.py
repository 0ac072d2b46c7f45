"""A section that fails is distinguished from one that measured."""

import sys

import pytest

from tools.benchmarks import sections
from tools.benchmarks.settings import Settings

# Stand-ins for `python -m tools.benchmarks.sections NAME FOLDER`.
GOOD = """
import pathlib, sys
print("progress 0.25 begun", flush=True)
print("a library's chatter")
pathlib.Path(sys.argv[-1], "result.json").write_text('{"figure": 3}')
"""
DYING = "import sys; print('the reason', file=sys.stderr); sys.exit(7)"
HANGING = "import time; print('progress 0.5 waiting', flush=True); time.sleep(600)"


@pytest.fixture
def run(monkeypatch, tmp_path):
    real = sections.subprocess.Popen

    def run(program: str, seconds: float = 60.0):
        def popen(command, **keywords):
            return real([sys.executable, "-c", program, command[-1]], **keywords)

        monkeypatch.setattr(sections.subprocess, "Popen", popen)
        monkeypatch.setattr(sections.Section, "limit_s", seconds)
        steps = []
        section = sections.SECTIONS["decode"]
        return sections.run(section, Settings(False, tmp_path), lambda *s: steps.append(s)), steps

    return run


def test_result_and_progress(run):
    assert run(GOOD) == ({"figure": 3}, [(0.25, "begun")])


def test_the_error_of_a_failing_section_holds_its_last_lines(run):
    with pytest.raises(sections.SectionFailed, match="exit code 7\n    the reason"):
        run(DYING)


def test_a_hanging_section_is_killed(run):
    with pytest.raises(sections.SectionFailed, match="decode: no result after 1 s: killed"):
        run(HANGING, 1.0)
