"""Check that the module named by Megatron's `--spec` exists.

Megatron takes an ImportError of that module for "no spec" and trains vanilla attention. The check
imports nothing and changes no argument.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kvshift_megatron.arguments import megatron_args

_PACKAGE = __name__.partition(".")[0]
# What --spec may name in this package.
_NAMES = {
    f"{_PACKAGE}.layer_specs": ("kv_shift_layer_spec", "vanilla_layer_spec"),
    f"{_PACKAGE}.static_specs": (
        "te_layer_spec",
        "te_qk_layernorm_layer_spec",
        "local_layer_spec",
        "local_qk_layernorm_layer_spec",
        "hybrid_stack_spec",
    ),
}


class MisspeltSpec(RuntimeError):
    """`--spec` names what this package lacks; no ImportError, which Megatron ignores."""


def refuse_misspelt(argv: Sequence[str]) -> None:
    """Raise MisspeltSpec if `--spec` names a module or a spec that this package does not have.

    Importing the package calls this, and Megatron's attempt to import such a module imports the
    package first. This package's own commands are exempt: they refuse such a module themselves.

    Args:
        argv: The process's command line. Megatron's parsed arguments are checked too if they are
            set: they may come from a YAML file or a checkpoint.
    """
    if _is_own_command(argv):
        return
    for named in (named_spec(argv), _parsed_spec()):
        if named is None or not named[0].startswith(f"{_PACKAGE}."):
            continue
        if not is_there(named[0]) or is_no_spec(*named):
            raise MisspeltSpec(sentence(*named))


def named_spec(argv: Sequence[str]) -> tuple[str, str] | None:
    """Return the last `--spec MODULE NAME` on a command line, or None.

    Megatron itself refuses `--spec` with fewer words after it, as in `--spec=MODULE`.
    """
    for position in range(len(argv) - 3, -1, -1):
        flag, module, name = argv[position : position + 3]
        if flag == "--spec" and not module.startswith("--") and not name.startswith("--"):
            return module, name
    return None


def is_no_spec(module: str, name: str) -> bool:
    """Return whether a module of this package that has specs has none of this name."""
    return name not in _NAMES.get(module, (name,))


def is_there(module: str) -> bool:
    """Return whether a module can be found, without importing the packages that contain it."""
    path: Any = None
    name = ""
    for part in module.split("."):
        is_top, name = not name, f"{name}.{part}".lstrip(".")
        if name in sys.modules:
            path = getattr(sys.modules[name], "__path__", None)
            continue
        if path is None and not is_top:
            return False
        try:
            finders = (finder for finder in sys.meta_path if hasattr(finder, "find_spec"))
            specs = (finder.find_spec(name, path) for finder in finders)
            spec = next((spec for spec in specs if spec is not None), None)
        except KeyError:
            # A namespace package in one that is not imported: Python cannot tell yet.
            return True
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def sentence(module: str, name: str) -> str:
    """Return a sentence that says what is wrong with the names and what to do."""
    if module in _NAMES:
        return (
            f"{module} has no {name}: correct the name after --spec {module}, which is one of "
            f"{', '.join(_NAMES[module])}"
        )
    if module.partition(".")[0] == _PACKAGE:
        return (
            f"there is no {module}: for --spec, {_PACKAGE}.layer_specs has kv_shift_layer_spec, "
            f"and {_PACKAGE}.static_specs has the static specs"
        )
    return (
        f"there is no module {module}, and Megatron would train without what --spec asks for: "
        "correct its name, or add its folder to PYTHONPATH"
    )


def _is_own_command(argv: Sequence[str]) -> bool:
    if not argv or argv[0] != "-m":
        return bool(argv) and Path(argv[0]).name.startswith("kvshift-")
    # While Python looks for the module of `python -m MODULE`, argv begins with "-m".
    given = sys.orig_argv
    named = given[given.index("-m") + 1] if "-m" in given[:-1] else ""
    return named.partition(".")[0] == _PACKAGE


def _parsed_spec() -> tuple[str, str] | None:
    spec: Any = getattr(megatron_args(), "spec", None)
    # A script may keep something else there, such as a static spec.
    is_pair = isinstance(spec, list | tuple) and len(spec) == 2
    return tuple(spec) if is_pair and all(isinstance(word, str) for word in spec) else None
