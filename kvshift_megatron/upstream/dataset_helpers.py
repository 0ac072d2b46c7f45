"""Megatron's compiled dataset helpers, where Megatron is installed from a wheel.

At every start Megatron runs `make` beside them. A wheel holds them compiled, and no Makefile.
"""

import functools
import importlib.util
from collections.abc import Callable

HELPERS = "megatron.core.datasets.helpers_cpp"


def skip_if_built(original: Callable) -> Callable:
    """`compile_helpers` that runs ``make`` only where the helpers do not import."""

    @functools.wraps(original)
    def compile_helpers() -> None:
        if importlib.util.find_spec(HELPERS) is None:
            original()

    return compile_helpers


def use_built() -> None:
    """Keep Megatron from compiling helpers that are there."""
    from megatron.core.datasets import utils

    utils.compile_helpers = skip_if_built(utils.compile_helpers)
