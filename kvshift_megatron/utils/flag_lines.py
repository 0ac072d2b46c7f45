"""Flags in a text file, one per line with its values, so that every value survives.

Words without spaces, quotes and backslashes stand as they are; others are quoted as for a shell.
"""

import re
import shlex


def to_line(words: list[str]) -> str:
    """Return one flag and its values as a line.

    Raises:
        ValueError: A word holds a line break.
    """
    for word in words:
        if len(word.splitlines()) > 1 or "\0" in word:
            raise ValueError(f"{word!r}: a line break cannot be written into a file of flags")
    return " ".join(
        shlex.quote(word) if not word or re.search(r"[\s'\"\\]", word) else word for word in words
    )


def to_words(line: str) -> list[str]:
    """Return the words of a line.

    Raises:
        ValueError: A quote is not closed.
    """
    return shlex.split(line)
