"""Megatron's own refusals of flags, in one sentence that names the flags where they can be told.

Megatron refuses with assertions, many of them without a text, or fails in the middle of an
expression. The failed statement says which arguments it is about. The traceback goes to the log of
rank 0, before the sentence, so that the sentence is the last line.
"""

import ast
import inspect
import logging
import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import Any

from kvshift_megatron.cpu.flags import megatron_actions

_logger = logging.getLogger(__name__)
_HOLDERS = {"args", "self", "config"}  # variables whose attributes are arguments
_CLEAR = (AssertionError, ValueError, RuntimeError, NotImplementedError)  # the text is enough
_LONGEST = 600


@contextmanager
def in_one_sentence() -> Iterator[None]:
    """Turn what Megatron raises in a block into a ValueError of one line.

    What this package, a task's module or argparse raises stays as it is.

    Raises:
        ValueError: With Megatron's message, or the condition that failed, and the flags.
    """
    try:
        yield
    # Megatron also ends the process, with exit code 0, for flags that it no longer has.
    except (Exception, SystemExit) as error:
        frames = list(_frames(error))
        parts = [str(frame.f_globals.get("__name__")).partition(".")[0] for frame, _ in frames]
        concerned = [part for part in parts if part in ("megatron", "kvshift_megatron")]
        if concerned[-1:] != ["megatron"] or "argparse" in parts:
            raise
        if os.environ.get("RANK", "0") == "0":
            _logger.error("Megatron refused the flags:", exc_info=error)
        raise ValueError(sentence(error, frames)) from error


def sentence(error: BaseException, frames: list[tuple[FrameType, int]]) -> str:
    """Return what an error says, in one line.

    Args:
        error: Raised by Megatron.
        frames: From the outermost to the innermost, each with the line that it was at.
    """
    condition, flags = "", ""
    for frame, line in reversed(frames):
        if str(frame.f_globals.get("__name__")).startswith("megatron."):
            found, names = _statement(frame, line)
            condition = condition or found
            flags = _shown(frame, names)
            if flags:
                break
    text = " ".join(str(error).split())
    if isinstance(error, SystemExit):
        text = "it would end the run there, without an error"
    elif not isinstance(error, _CLEAR):
        text = f"{type(error).__name__}{text and f': {text}'} in `{condition}`"
    text = text or f"it requires `{condition}`"
    return f"Megatron refuses {flags or 'these flags'}: {text}"[:_LONGEST]


def _frames(error: BaseException) -> Iterator[tuple[FrameType, int]]:
    trace = error.__traceback__
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _statement(frame: FrameType, line: int) -> tuple[str, list[tuple[str, str]]]:
    """Return the condition or statement at a line, and the attributes that it reads.

    Returns:
        The source, and (variable, attribute) for each variable that may hold arguments. Both are
        empty if there is no source.
    """
    try:
        lines, first = inspect.getsourcelines(frame.f_code)
        tree = ast.parse(textwrap.dedent("".join(lines)))
    except (OSError, SyntaxError):
        return "", []
    at = line - max(first, 1) + 1
    around = [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.stmt) and node.lineno <= at <= (node.end_lineno or node.lineno)
    ]
    if not around:
        return "", []
    # From the outermost to the innermost, as ast.walk goes.
    inner = around[-1]
    tests: Sequence[ast.AST] = [node.test for node in around if isinstance(node, ast.If)][-1:]
    told: Sequence[ast.AST] = tests if isinstance(inner, ast.If) else [*tests, inner]
    if isinstance(inner, ast.For | ast.With | ast.FunctionDef):
        return "", []
    if isinstance(inner, ast.Assert):
        source = ast.unparse(inner.test)
    elif isinstance(inner, ast.Raise) and tests:
        source = f"not ({ast.unparse(tests[0])})"
    else:
        source = ast.unparse(told[-1])
    names = [
        (node.value.id, node.attr)
        for expression in told
        for node in ast.walk(expression)
        if isinstance(node, ast.Attribute)
        and isinstance(node.value, ast.Name)
        and node.value.id in _HOLDERS
    ]
    return source, list(dict.fromkeys(names))


def _shown(frame: FrameType, names: list[tuple[str, str]]) -> str:
    """Return the flags with their values as they would be typed, and those that are missing."""
    actions = megatron_actions()
    given: list[str] = []
    missing: list[str] = []
    for variable, name in names:
        action = actions.get(name)
        if action is None:
            continue
        value: Any = getattr(frame.f_locals.get(variable), name, None)
        flag = action.option_strings[0]
        if value is None or (action.nargs == 0 and value != action.const):
            missing.append(flag)
        elif action.nargs == 0:
            given.append(flag)
        else:
            words = value if isinstance(value, list) else [value]
            given.append(" ".join([flag, *map(str, words)]))
    parts = [", ".join(given), f"without {', '.join(missing)}" if missing else ""]
    return " ".join(filter(None, parts))
