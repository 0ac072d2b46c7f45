"""The command line of `python -m tools.benchmarks`."""

import argparse
import inspect
import math
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import kvshift_megatron
from kvshift_megatron.utils.atomic_files import replace
from kvshift_megatron.utils.output_paths import check_outputs
from tools.benchmarks import machine, results, tables
from tools.benchmarks.sections import SECTIONS, Section, SectionFailed, run
from tools.benchmarks.settings import ReportProgress, Settings

_SECONDS_BETWEEN_LINES = 1.0
_FILES = ("benchmark.json", "benchmark.md", "benchmark.png")
_MEASURED = Path(inspect.getfile(kvshift_megatron)).parent


def main(argv: list[str] | None = None) -> int:
    """Measure as the command line says; return 0, or 1 if a section failed or refused something."""
    options = _parser().parse_args(argv)
    # Imported now, so that a missing Matplotlib is noticed before ten minutes of measuring.
    from tools.benchmarks.picture import draw

    # Treated as an interrupt, which ends child processes and removes temporary files.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    chosen = [SECTIONS[name] for name in options.only]
    try:
        check_outputs([options.output / name for name in _FILES], [_MEASURED])
        options.output.mkdir(parents=True, exist_ok=True)
    except (ValueError, OSError) as error:
        print(f"benchmark: --output: {error}", file=sys.stderr)
        return 1
    result: dict = {"quick": options.quick, "machine": machine.describe()}
    result |= {"sections": {}, "failed": {}}
    clock = _Clock(chosen, options.quick)
    try:
        with tempfile.TemporaryDirectory(prefix="kvshift-benchmark-") as folder:
            settings = Settings(options.quick, Path(folder))
            for section in chosen:
                began = time.monotonic()
                try:
                    result["sections"][section.name] = run(section, settings, clock.of(section))
                except SectionFailed as error:
                    result["failed"][section.name] = str(error)
                    print(f"benchmark: {error}", file=sys.stderr, flush=True)
                clock.done(section, time.monotonic() - began)
    except KeyboardInterrupt:
        print("benchmark: interrupted, nothing was written", file=sys.stderr)
        return 1
    return _report(result | {"seconds": clock.elapsed()}, options.output, draw)


def _report(result: dict, output: Path, draw: Callable[[dict, Path], bool]) -> int:
    results.write_json(output / "benchmark.json", result)
    text = tables.markdown(result)
    replace(output / "benchmark.md", lambda path: path.write_text(text))
    drawn = draw(result, output / "benchmark.png")
    names = ["benchmark.json", "benchmark.md"] + (["benchmark.png"] if drawn else [])
    print(f"\n{text}\n{result['seconds'] / 60:.1f} minutes; wrote {', '.join(names)} in {output}")
    found = results.problems(result)
    for problem in found:
        print(f"benchmark: {problem}", file=sys.stderr)
    return 1 if found else 0


class _Clock:
    """Prints progress lines: the time so far, and roughly how much is left."""

    def __init__(self, chosen: list[Section], quick: bool):
        self._start = time.monotonic()
        self._said = -math.inf
        self._expected = {s.name: s.quick_seconds if quick else s.seconds for s in chosen}

    def elapsed(self) -> float:
        """Return the seconds since the start."""
        return time.monotonic() - self._start

    def of(self, section: Section) -> ReportProgress:
        """Return the function that prints the section's progress."""

        def say(fraction: float, text: str) -> None:
            if time.monotonic() - self._said < _SECONDS_BETWEEN_LINES:
                return
            self._said = time.monotonic()
            later = sum(s for name, s in self._expected.items() if name != section.name)
            left = later + (1 - fraction) * self._expected.get(section.name, 0.0)
            times = f"{_minutes(self.elapsed())}, about {_minutes(left)} left"
            print(f"[{times}] {section.name}: {text}", flush=True)

        return say

    def done(self, section: Section, seconds: float) -> None:
        """Record the end of a section, and correct what is expected of the others by its time."""
        pace = seconds / self._expected.pop(section.name)
        for name in self._expected:
            self._expected[name] *= pace**0.5
        print(f"[{_minutes(self.elapsed())}] {section.name}: {seconds:.0f} s", flush=True)


def _minutes(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


def _sections(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SECTIONS:
            raise argparse.ArgumentTypeError(
                f"{name!r} is not a section: choose from {', '.join(SECTIONS)}"
            )
    return [name for name in SECTIONS if name in names]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m tools.benchmarks",
        description="Measure what KV shifting costs on this machine, against other ways to write "
        "it, a plain copy and the baseline model. About 10 minutes on 2 cores, on which nothing "
        "else should run.",
    )
    parser.add_argument(
        "--quick",
        action="store_true",
        help="small shapes and few rounds, only to show that everything runs",
    )
    parser.add_argument(
        "--only",
        type=_sections,
        default=list(SECTIONS),
        metavar="SECTION,...",
        help=f"one or more of {', '.join(SECTIONS)} (default: all)",
    )
    parser.add_argument(
        "--output",
        type=Path,
        default=Path("build/benchmark"),
        metavar="DIRECTORY",
        help="where to write benchmark.json, .md and .png (default: build/benchmark)",
    )
    return parser
