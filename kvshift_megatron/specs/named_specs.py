"""Is the module there that is named behind Megatron's `--spec`?

Megatron turns an ImportError of that module into "no spec" and trains vanilla attention.
Everything here only looks: nothing is imported, and no argument is changed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from kvshift_megatron.arguments import megatron_args

_PACKAGE = __name__.partition(".")[0]


class MisspeltSpec(RuntimeError):
    """A module of this package that `--spec` names does not exist; no ImportError, see above."""


def refuse_misspelt(argv: Sequence[str]) -> None:
    """Raise MisspeltSpec where `--spec` names a module that this package does not have.

    For the package's import, which is part of Megatron's attempt to import that module. This
    package's own commands are left alone: they refuse it themselves.

    Args:
        argv: the process's command line. Megatron's parsed arguments, where they are set, count
            too: they may come from a YAML file or a checkpoint.
    """
    if _is_own_command(argv):
        return
    for module in (spec_module(argv), _parsed_spec_module()):
        if module is not None and module.startswith(f"{_PACKAGE}.") and not is_there(module):
            raise MisspeltSpec(sentence(module))


def spec_module(argv: Sequence[str]) -> str | None:
    """The module of the last `--spec MODULE NAME` on a command line.

    With fewer words behind it, also as `--spec=MODULE`, Megatron itself stops.
    """
    for position in range(len(argv) - 3, -1, -1):
        flag, module, name = argv[position : position + 3]
        if flag == "--spec" and not module.startswith("--") and not name.startswith("--"):
            return module
    return None


def is_there(module: str) -> bool:
    """Whether a module can be found from here; the packages that it is in are not imported."""
    path, name = None, ""
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
            # A folder without __init__.py in one that is not imported: Python cannot tell yet.
            return True
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


def sentence(module: str) -> str:
    """What is wrong with the name, and what to do."""
    if module.partition(".")[0] == _PACKAGE:
        return (
            f"there is no {module}: for --spec, {_PACKAGE}.layer_specs has kv_shift_layer_spec, "
            f"and {_PACKAGE}.static_specs the finished specs"
        )
    return (
        f"there is no module {module}, and Megatron would train without what --spec asks for: "
        "correct its name, or add the folder that it is in to PYTHONPATH"
    )


def _is_own_command(argv: Sequence[str]) -> bool:
    if not argv or argv[0] != "-m":
        return bool(argv) and Path(argv[0]).name.startswith("kvshift-")
    # So argv begins while Python looks for the module behind -m.
    given = sys.orig_argv
    named = given[given.index("-m") + 1] if "-m" in given[:-1] else ""
    return named.partition(".")[0] == _PACKAGE


def _parsed_spec_module() -> str | None:
    spec = getattr(megatron_args(), "spec", None)
    # A script of somebody's may keep something else there, such as a finished spec.
    is_pair = isinstance(spec, list | tuple) and len(spec) == 2 and isinstance(spec[0], str)
    return spec[0] if is_pair else None
