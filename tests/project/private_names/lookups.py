"""Does a library still look up what is replaced in one of its modules?

A function that its callers no longer find under that name can be replaced without effect, and
without a word.
"""

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tests.project.private_names import scan
from tests.project.private_names.syntax import root

# Looked up as a part of the module, or imported by the caller: in some release not in the module.
ELSEWHERE = {
    "megatron.core.dist_checkpointing.save": "megatron.training.checkpointing",
    "megatron.core.datasets.utils.compile_helpers": "megatron.training.initialize",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer": "megatron.core.optimizer",
    "megatron.training.arguments.parse_args": "megatron.training.initialize",
    "megatron.training.initialize.initialize_megatron": "megatron.training.training",
    "megatron.training.initialize.set_jit_fusion_options": "megatron.training.training",
    # A package from 0.18 on.
    "megatron.training.checkpointing.save_checkpoint": "megatron.training.utils.common_utils",
    "torch.nn.functional.rms_norm": "torch.nn.modules.normalization",
}


# Its rows in torch replace what scripts call, too.
_CALLED_BY_ANYBODY = "upstream/cpu_table.py", "torch"


def replaced(uses: list[scan.Use]) -> list[str]:
    """Return what is replaced in a module of another library, and not in a class.

    Args:
        uses: of the package, its tables and the benchmarks.
    """
    names = {
        use.name
        for use in uses
        if use.kind in ("set", "row")
        and not use.name.startswith(".")
        and (use.file, root(use.name)) != _CALLED_BY_ANYBODY
    }
    return sorted(name for name in names if _is_in_a_module(name))


def _is_in_a_module(dotted: str) -> bool:
    owner = dotted.rpartition(".")[0]
    try:
        return isinstance(importlib.import_module(owner), ModuleType)
    except ModuleNotFoundError:
        return False


def is_looked_up(dotted: str, text: str) -> bool:
    """Whether a function in a module's text takes a name from what the module holds at that moment.

    Args:
        dotted: the name.
        text: one of `texts`.
    """
    name = dotted.rpartition(".")[2]
    found = any(
        name in _looked_up(function) and name not in _own(function)
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef) and function.name != name
    )
    return found or (dotted in ELSEWHERE and name in _imported(text))


def texts(dotted: str) -> Iterator[str]:
    """Of the module that is written to, and of the one in ELSEWHERE."""
    for module in filter(None, (dotted.rpartition(".")[0], ELSEWHERE.get(dotted))):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # its parent is a module by itself
            found = importlib.util.find_spec(module.rpartition(".")[0])
        yield Path(found.origin).read_text()


def _looked_up(function: ast.FunctionDef) -> Iterator[str]:
    for node in ast.walk(function):
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            yield node.id
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


def _own(function: ast.FunctionDef) -> set[str]:
    """What a function has of its own, and so does not look up."""
    arguments = ast.walk(function.args)
    return {node.arg for node in arguments if isinstance(node, ast.arg)}


def _imported(text: str) -> set[str]:
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}
