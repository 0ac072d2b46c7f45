"""What a section is told, and how it tells how far it is."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

ReportProgress = Callable[[float, str], None]
"""Called with the fraction of the section that is done, 0 to 1, and what is being done."""


@dataclass(frozen=True)
class Settings:
    """How to measure.

    Attributes:
        quick: small shapes and few rounds: shows that everything runs; the figures mean little.
        folder: an existing folder for temporary files.
    """

    quick: bool
    folder: Path


def part(progress: ReportProgress, start: float, end: float) -> ReportProgress:
    """Progress for a part of a section, which spans start to end of the whole."""
    return lambda fraction, text: progress(start + (end - start) * fraction, text)
