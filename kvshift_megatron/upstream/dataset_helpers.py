"""Megatron's compiled dataset helpers, if Megatron is installed from a wheel.

At every start Megatron runs `make` in their folder. A wheel holds the compiled helpers but no
Makefile.
"""

import functools
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
from collections.abc import Callable
from typing import Any

from kvshift_megatron.upstream import substitutions
from kvshift_megatron.upstream.substitutions import Substitution

HELPERS = "megatron.core.datasets.helpers_cpp"


def rows() -> list[Substitution]:
    """Return the row for compiling the helpers when Megatron starts."""
    return [
        Substitution(
            "megatron.core.datasets.utils.compile_helpers",
            "Megatron runs make at every start, and a wheel has no Makefile.",
            wrap=skip_if_built,
        )
    ]


def skip_if_built(original: Callable[[], None]) -> Callable[[], None]:
    """Return a `compile_helpers` that runs `make` only if the helpers cannot be imported."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec(HELPERS) is None:
            original()

    return compile_helpers


def use_built() -> None:
    """Keep Megatron from compiling helpers that are already built."""
    substitutions.apply(rows())


class HelperFinder(importlib.abc.MetaPathFinder):
    """Find the installed wheel's helpers for a source checkout that has not been built.

    It is needed because the checkout's `megatron` comes first on `sys.path`.
    """

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return the helpers' spec; None for every other module."""
        if fullname != HELPERS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(HELPERS, path)
        if spec is None:
            elsewhere = [os.path.join(p, "megatron", "core", "datasets") for p in sys.path]
            spec = importlib.machinery.PathFinder.find_spec(HELPERS, elsewhere)
        return spec
