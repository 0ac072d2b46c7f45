"""Summarize the last messages of the ranks of a failed attempt."""

import re
from pathlib import Path

_MOST = 5  # different messages that are shown
_RANK = re.compile(r"^\[rank\d+\]:\s?")  # precedes each line of a traceback that PyTorch prints
# The last line of a Python traceback, or a message of this package.
_LAST_MESSAGE = re.compile(r"^(kvshift_megatron: |([a-zA-Z_][\w.]*\.)?\w*(Error|Exception|Exit)\b)")


def summary(attempt: Path, ranks_per_node: int) -> list[str]:
    """Return lines for the job's output: last messages, each with the ranks that printed it.

    Args:
        attempt: The directory of the attempt, with torchrun's logs below `logs/node-N`.
        ranks_per_node: Gives the ranks their numbers.
    """
    said: dict[str, list[int]] = {}
    for path in sorted(attempt.glob("logs/node-*/*/attempt_0/*/stderr.log")):
        node = int(path.relative_to(attempt).parts[1].removeprefix("node-"))
        rank = node * ranks_per_node + int(path.parent.name)
        if message := last_message(path.read_text(errors="replace")):
            said.setdefault(message, []).append(rank)
    shown = list(said.items())[:_MOST]
    lines = [f"ranks {_ranges(ranks)}: {message}" for message, ranks in shown]
    if len(said) > _MOST:
        lines.append(f"and {len(said) - _MOST} other messages in {attempt / 'logs'}")
    return lines


def last_message(text: str) -> str:
    """Return the last error message in a rank's standard error; empty if it holds none."""
    lines = [_RANK.sub("", line) for line in text.splitlines()]
    lines = [line for line in lines if _LAST_MESSAGE.match(line)]
    return lines[-1] if lines else ""


def _ranges(ranks: list[int]) -> str:
    """Format ranks as ranges: `0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
