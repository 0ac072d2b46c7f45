"""What the ranks of a failed attempt said last."""

import re
from pathlib import Path

_MOST = 5  # different last words that are shown
_RANK = re.compile(r"^\[rank\d+\]:\s?")  # before each line of a traceback that PyTorch prints
# The line that a Python program ends with, or this package's own refusals.
_LAST_WORDS = re.compile(r"^(kvshift_megatron: |([a-zA-Z_][\w.]*\.)?\w*(Error|Exception|Exit)\b)")


def summary(attempt: Path, ranks_per_node: int) -> list[str]:
    """Lines for the job's output: last words, each with the ranks that said them.

    Args:
        attempt: the directory of the attempt, with torchrun's logs below `logs/node-N`.
        ranks_per_node: for the numbers of the ranks.
    """
    said: dict[str, list[int]] = {}
    for path in sorted(attempt.glob("logs/node-*/*/attempt_0/*/stderr.log")):
        node = int(path.relative_to(attempt).parts[1].removeprefix("node-"))
        rank = node * ranks_per_node + int(path.parent.name)
        if words := last_words(path.read_text(errors="replace")):
            said.setdefault(words, []).append(rank)
    lines = [f"ranks {_ranges(ranks)}: {words}" for words, ranks in list(said.items())[:_MOST]]
    if len(said) > _MOST:
        lines.append(f"and {len(said) - _MOST} others, in {attempt / 'logs'}")
    return lines


def last_words(text: str) -> str:
    """The message that a rank's standard error ends with; empty where it holds none."""
    lines = [_RANK.sub("", line) for line in text.splitlines()]
    lines = [line for line in lines if _LAST_WORDS.match(line)]
    return lines[-1] if lines else ""


def _ranges(ranks: list[int]) -> str:
    """`0-3, 7` for 0, 1, 2, 3, 7."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and runs[-1][-1] == rank - 1:
            runs[-1].append(rank)
        else:
            runs.append([rank])
    return ", ".join(str(r[0]) if len(r) == 1 else f"{r[0]}-{r[-1]}" for r in runs)
