"""Run the sections, each in a process of its own.

    python -m tools.benchmarks.sections NAME FOLDER [--quick]

is what the child runs. It prints lines `progress <fraction> <text>` to standard output, and writes
FOLDER/result.json at the end.
"""

import contextlib
import importlib
import json
import os
import signal
import subprocess
import sys
import threading
from collections import deque
from dataclasses import dataclass
from pathlib import Path

from kvshift_megatron.utils.atomic_files import replace
from tools.benchmarks.settings import ReportProgress, Settings

_TAIL_LINES = 20
_ROOT = str(Path(__file__).resolve().parents[2])
_MARK = "progress "


@dataclass(frozen=True)
class Section:
    """One module with `measure`.

    Attributes:
        seconds, quick_seconds: How long it took on 2 cores, to estimate the time left.
        trains: Whether it trains a model with the implementation that this package chooses.
    """

    name: str
    module: str
    seconds: float
    quick_seconds: float
    trains: bool = False

    @property
    def limit_s(self) -> float:
        """Seconds after which the section counts as hanging."""
        return 300 + 5 * self.seconds


SECTIONS = {
    section.name: section
    for section in (
        Section("operation", "operation", 180, 40),
        Section("pages", "pages", 60, 20),
        Section("step", "training_step", 140, 50, trains=True),
        Section("decode", "decode", 25, 10),
        Section("scaling", "scaling", 200, 80, trains=True),
        Section("conversion", "conversion", 30, 10),
    )
}


class SectionFailed(RuntimeError):
    """A section ended without a result; the message carries its last lines."""


def run(section: Section, settings: Settings, progress: ReportProgress) -> dict:
    """Measure the section in a process of its own and return its result.

    Raises:
        SectionFailed: It ended with an error or took too long.
    """
    folder = settings.folder / section.name
    folder.mkdir()
    command = [sys.executable, "-m", __spec__.name, section.name, str(folder)]
    command += ["--quick"] if settings.quick else []
    child = subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        start_new_session=True,  # its own children can be ended with it
        # Import from this checkout, whatever is installed.
        env={**os.environ, "PYTHONPATH": os.pathsep.join([_ROOT, *sys.path[1:]])},
    )
    timed_out = threading.Event()

    def end() -> None:
        timed_out.set()
        _kill(child)

    timer = threading.Timer(section.limit_s, end)
    timer.start()
    tail: deque[str] = deque(maxlen=_TAIL_LINES)
    try:
        for line in child.stdout:
            if line.startswith(_MARK):
                fraction, _, text = line.removeprefix(_MARK).rstrip().partition(" ")
                progress(float(fraction), text)
            else:
                tail.append(line.rstrip())
        code = child.wait()
    finally:
        timer.cancel()
        _kill(child)
    if timed_out.is_set():
        raise SectionFailed(f"{section.name}: no result after {section.limit_s:.0f} s: killed")
    if code != 0:
        lines = "\n".join(f"    {line}" for line in tail)
        raise SectionFailed(f"{section.name}: ended with exit code {code}\n{lines}")
    return json.loads((folder / "result.json").read_text())


def _refuse_wrong_shift() -> None:
    import torch

    from tools.benchmarks.operation import check_chosen

    device = "cuda" if torch.cuda.is_available() else "cpu"
    for dtype in (torch.float32, torch.bfloat16):
        check_chosen(device, dtype)


def _kill(child: subprocess.Popen) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def _say(fraction: float, text: str) -> None:
    print(f"{_MARK}{fraction:.4f} {text}", flush=True)


def main(argv: list[str]) -> None:
    """Measure, in the child, and write the result."""
    name, folder, *rest = argv
    section = SECTIONS[name]
    settings = Settings(quick="--quick" in rest, folder=Path(folder))
    module = importlib.import_module(f"{__package__}.{section.module}")
    if section.trains:
        _refuse_wrong_shift()
    result = module.measure(settings, _say)
    text = json.dumps(result, indent=1)
    replace(settings.folder / "result.json", lambda path: path.write_text(text))


if __name__ == "__main__":
    main(sys.argv[1:])
