"""The settings of a section, and how it reports its progress."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ReportProgress = Callable[[float, str], None]
"""Called with the fraction of the section that is done, 0 to 1, and what it does now."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        quick: Small shapes and few rounds, to show that everything runs; the figures mean little.
        folder: An existing folder for temporary files.
    """

    quick: bool
    folder: Path


def part(progress: ReportProgress, start: float, end: float) -> ReportProgress:
    """Return the progress report for a part of a section, from start to end of the whole."""
    return lambda fraction, text: progress(start + (end - start) * fraction, text)
