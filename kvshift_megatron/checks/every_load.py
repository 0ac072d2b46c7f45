"""Look at every load of Megatron's: what it loads must be a checkpoint that has been checked.

The check after the build looks at the checkpoint that the arguments name then. Megatron may load
others: those for which its reinforcement learning or a script changes the arguments.
"""

import functools
import weakref
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from kvshift_megatron.checks.to_load import ToLoad, checkpoint_in
from kvshift_megatron.upstream import loading_table, substitutions
from kvshift_megatron.utils.ranks import on_rank_0

# Collective over all ranks; raises ValueError for a checkpoint that the model must not load.
Check = Callable[[ToLoad, list[torch.nn.Module]], None]


class _Watch:
    """The model that was built last, and the checkpoints that fit it.

    Args:
        model: Its chunks; not kept alive.
        check: Called for a checkpoint that has not been checked.
        checked: The folder of the checkpoint that has been.
    """

    def __init__(self, model: list[torch.nn.Module], check: Check, checked: Path | None):
        self._chunks = [weakref.ref(chunk) for chunk in model]
        self._check = check
        self._checked = {checked}

    def is_over(self) -> bool:
        """Return whether the model is gone, or there is none that could be checked together."""
        return len(self._model()) < len(self._chunks) or not torch.distributed.is_initialized()

    def _model(self) -> list[torch.nn.Module]:
        return [chunk for chunk in (reference() for reference in self._chunks) if chunk is not None]

    def before(self, root: str | Path | None, args: Namespace) -> ToLoad | None:
        """Check the checkpoint that a load of `root` will find; collective over all ranks."""
        found = on_rank_0(lambda: checkpoint_in(root, args))
        if found is not None and found.directory not in self._checked:
            self._check(found, self._model())
            self._checked.add(found.directory)
        return found


_watch: _Watch | None = None


def check_at_load(model: list[torch.nn.Module], check: Check, checked: Path | None) -> None:
    """Have `check` called before Megatron loads anything else than `checked` into the model.

    Args:
        model: The built chunks. A later call for another model takes the place of this one.
        check: For one checkpoint; collective over all ranks.
        checked: The folder of a checkpoint that needs no other check.
    """
    global _watch
    is_first = _watch is None
    _watch = _Watch(model, check, checked)
    if is_first:
        substitutions.apply(loading_table.load(_checked))


def _checked(original: Callable) -> Callable:
    @functools.wraps(original)
    def load(load_dir: Any, args: Namespace, *rest: Any, **others: Any) -> Any:
        if _watch is None or _watch.is_over():
            return original(load_dir, args, *rest, **others)
        found = _watch.before(load_dir, args)
        answer = original(load_dir, args, *rest, **others)
        _compare(found, answer[1])
        return answer

    return load


def _compare(found: ToLoad | None, loaded: str) -> None:
    """Raise ValueError unless Megatron loaded from the folder that was checked.

    Args:
        found: What was checked.
        loaded: A folder, a file in one, or "" for nothing, as Megatron returns it.
    """
    if found is None:
        is_same = not loaded
    else:
        is_same = bool(loaded) and Path(loaded).is_relative_to(found.directory)
    if not is_same:
        raise ValueError(
            f"load: Megatron loads {loaded or 'nothing'}, and the checkpoint that was checked is "
            f"{found.directory if found else 'none'}: set --load and --ckpt-step so that every "
            "rank finds the same checkpoint, and report this if it does"
        )
