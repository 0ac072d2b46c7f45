"""Check that a library still looks up what this package replaces in one of its modules.

If callers no longer look a function up under that name, replacing it silently has no effect.
"""

import ast
import importlib
import importlib.util
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

from tests.project.private_names import scan
from tests.project.private_names.syntax import root

# Names that are looked up in, or imported by, another module than their own in some release.
ELSEWHERE = {
    "megatron.core.dist_checkpointing.save": "megatron.training.checkpointing",
    "megatron.core.datasets.utils.compile_helpers": "megatron.training.initialize",
    "megatron.core.optimizer.distrib_optimizer.DistributedOptimizer": "megatron.core.optimizer",
    "megatron.core.jit.jit_fuser": "megatron.core.fusions.fused_bias_swiglu",
    # Only 0.17 has its row; what the module was is there since.
    "megatron.core.ssm.mamba_block.TENorm": "megatron.core.models.hybrid.hybrid_block",
    # Only from 0.20 on.
    "megatron.core.tensor_parallel.inference_layers.is_inference_column_parallel_linear": (
        "megatron.core.transformer.multi_token_prediction"
    ),
    "megatron.training.arguments.parse_args": "megatron.training.initialize",
    "megatron.training.initialize.initialize_megatron": "megatron.training.training",
    "megatron.training.initialize.set_jit_fusion_options": "megatron.training.training",
    # From 0.18 on a package.
    "megatron.training.checkpointing.save_checkpoint": "megatron.training.utils.common_utils",
    "torch.nn.functional.rms_norm": "torch.nn.modules.normalization",
}


# Its rows in torch replace what scripts call, too.
_CALLED_BY_ANYBODY = "upstream/cpu_table.py", "torch"


def replaced(uses: list[scan.Use]) -> list[str]:
    """Return the names that are replaced in a library's module, not in a class.

    Args:
        uses: The uses of the package, its tables and the benchmarks.
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
    """Return whether a function in a module's text looks a name up when it is called.

    Args:
        dotted: The name.
        text: One of `texts`.
    """
    name = dotted.rpartition(".")[2]
    found = any(
        name in _looked_up(function) and name not in _own(function)
        for function in ast.walk(ast.parse(text))
        if isinstance(function, ast.FunctionDef) and function.name != name
    )
    return found or (dotted in ELSEWHERE and name in _imported(text))


def texts(dotted: str) -> Iterator[str]:
    """Yield the text of the module with the name, and of the one in ELSEWHERE."""
    for module in filter(None, (dotted.rpartition(".")[0], ELSEWHERE.get(dotted))):
        try:
            found = importlib.util.find_spec(module)
        except ModuleNotFoundError:  # its parent is a module, not a package
            found = importlib.util.find_spec(module.rpartition(".")[0])
        if found is not None:  # not every release has the one in ELSEWHERE
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
    """Return a function's arguments, which it does not look up elsewhere."""
    arguments = ast.walk(function.args)
    return {node.arg for node in arguments if isinstance(node, ast.arg)}


def _imported(text: str) -> set[str]:
    imports = [node for node in ast.parse(text).body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names}
