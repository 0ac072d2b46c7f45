"""Write a result to a file, and find in it what went wrong or is missing."""

import json
from collections.abc import Iterator
from pathlib import Path

from kvshift_megatron.utils.atomic_files import replace


def write_json(path: Path, result: dict) -> None:
    """Write the result. NaN and infinity are refused, as JSON has neither."""
    text = json.dumps(result, indent=1, allow_nan=False) + "\n"
    replace(path, lambda temporary: temporary.write_text(text))


def problems(result: dict) -> list[str]:
    """Return what failed or was refused. With any of these the benchmark's exit code is 1."""
    found = [f"failed: {why}" for why in result["failed"].values()]
    for section in result["sections"].values():
        found += [f"REFUSED: {why}" for why in section.get("refused", {}).values()]
    return found


def not_measured(result: dict) -> Iterator[tuple[str, str]]:
    """Yield what could not be measured on this machine, and why, each only once."""
    seen = set()
    for section in result["sections"].values():
        for what, why in section.get("not_measured", {}).items():
            if (what, why) not in seen:
                seen.add((what, why))
                yield what, why
