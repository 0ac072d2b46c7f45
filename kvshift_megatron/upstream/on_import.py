"""The engine for a process that has yet to import Megatron: rows wait for their modules.

A row in torch is applied before Megatron is imported, so a `from torch.cuda import ...` in Megatron
captures the replacement. A row in Megatron is applied as soon as its module has run and before the
importer continues, so a `from` import captures that replacement too. Megatron modules that were
imported earlier are searched for captured names.
"""

import importlib.abc
import importlib.machinery
import sys
from collections.abc import Callable, Iterable, Iterator
from types import ModuleType
from typing import Any

from kvshift_megatron.upstream.substitutions import Applied, Substitution, resolve

_WAITS = "megatron"  # the library whose rows wait


class AppliedOnImport(Applied):
    """Like Applied, but rows in Megatron wait for the import, and captured names change too.

    A row is skipped if the installed release lacks its target.
    """

    def __init__(self, rows: Iterable[Substitution]) -> None:
        super().__init__(rows)
        self._pairs: list[tuple[Any, Any]] = []  # original, replacement
        self._finder = AfterImport(
            frozenset(row.module for row in self.rows if row.library == _WAITS), self._on_import
        )

    def apply(self) -> None:
        """Apply what can be applied now; the other rows follow when their modules are imported."""
        for row in self.rows:
            if row.library != _WAITS:
                self._replace_if_there(resolve(row.module), row)
        for name in self._finder.names:
            if name in sys.modules:
                self._on_import(sys.modules[name])
        _rebind({id(old): new for old, new in self._pairs})
        sys.meta_path.insert(0, self._finder)

    def undo(self) -> None:
        """Restore every original, also in modules that have captured its replacement."""
        sys.meta_path.remove(self._finder)
        super().undo()
        _rebind({id(new): old for old, new in self._pairs})
        self._pairs.clear()

    def _on_import(self, module: ModuleType) -> None:
        for row in self.rows:
            if row.module == module.__name__:
                self._replace_if_there(module, row)

    def _replace_if_there(self, owner: Any, row: Substitution) -> None:
        if row.applies() and hasattr(owner, row.name):
            original, new = self._replace(owner, row)
            if callable(original):
                self._pairs.append((original, new))


class AfterImport(importlib.abc.MetaPathFinder):
    """Call `after_import(module)` once a module named in `names` has been executed."""

    def __init__(self, names: frozenset[str], after_import: Callable[[ModuleType], None]) -> None:
        self.names = names
        self.after_import = after_import

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> Any:
        """Return a named module's own spec, with a loader that also calls `after_import`."""
        if fullname not in self.names:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module: ModuleType) -> None:
                run(module)
                if self in sys.meta_path:  # a module may be reloaded after `undo`
                    self.after_import(module)

            spec.loader.exec_module = exec_module  # type: ignore[method-assign]  # this loader's only
        return spec


def _rebind(new_by_id: dict[int, Any]) -> None:
    """Replace the objects that Megatron's modules captured with `from ... import`."""
    for module in _megatron_modules():
        for name, value in list(vars(module).items()):
            if id(value) in new_by_id:
                setattr(module, name, new_by_id[id(value)])


def _megatron_modules() -> Iterator[ModuleType]:
    for name, module in list(sys.modules.items()):
        if name.startswith("megatron.") and isinstance(module, ModuleType):
            yield module
