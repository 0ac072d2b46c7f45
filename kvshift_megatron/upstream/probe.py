"""Find out whether a Megatron still has the seams that this package needs.

    python -m kvshift_megatron.upstream.probe

prints one line per seam: `intact` or `broken`, the part of the package that needs it, and its name.
Exit status: 0 if all are intact, 1 if not.

Releases in SUPPORTED need no probe. With any other one the seams decide at the start of a run and
when a layer is built: intact, and it goes on with one warning; broken, and it is refused.
"""

import functools
import inspect
import os
import sys
from collections.abc import Collection, Iterator
from types import ModuleType

from kvshift_megatron.upstream import (
    builder_table,
    cpu_table,
    dataset_helpers,
    faults_table,
    loading_table,
    metrics_table,
    overridden,
    planning_table,
)
from kvshift_megatron.upstream.seams import Seam, of_rows
from kvshift_megatron.upstream.substitutions import Substitution, contains, installed

# The range of pyproject.toml.
SUPPORTED = ">=0.17.1,<0.20"

ATTENTION, CPU_LAYER, ENTRY_POINT, PLANNER = "attention", "CPU layer", "entry point", "planner"
_TABLES = {
    ATTENTION: (loading_table,),
    CPU_LAYER: (cpu_table,),
    ENTRY_POINT: (builder_table, dataset_helpers, faults_table, metrics_table),
    PLANNER: (planning_table,),
}
_OVERRIDDEN = {
    ATTENTION: overridden.of_attention,
    CPU_LAYER: overridden.of_cpu_layer,
    ENTRY_POINT: overridden.of_builders,
}


class _Anything:
    """Stands for every replacement: rows are read here, and not applied."""

    def __getattr__(self, name: str) -> "_Anything":
        return self


def seams() -> Iterator[tuple[str, Seam]]:
    """Yield (part of the package that needs it, seam) for the seams of the installed release."""
    for part, tables in _TABLES.items():
        found = _OVERRIDDEN.get(part, list)()
        for table in tables:
            found += of_rows(_rows(table))
        for seam in found:
            if seam.applies():
                yield part, seam


def _rows(table: ModuleType) -> Iterator[Substitution]:
    """Yield the rows of all public functions of a table."""
    for name, function in inspect.getmembers(table, inspect.isfunction):
        is_own = function.__module__ == table.__name__ and not name.startswith("_")
        if is_own and inspect.signature(function).return_annotation == list[Substitution]:
            yield from function(
                **dict.fromkeys(inspect.signature(function).parameters, _Anything())
            )


@functools.cache
def check_release(*parts: str) -> None:
    """Do nothing on a release in SUPPORTED; of any other, probe the seams, and warn or refuse.

    Args:
        *parts: What is about to be used, such as ATTENTION.

    Raises:
        ValueError: A seam that they need is broken.
    """
    release = installed("megatron")
    if contains(SUPPORTED, release):
        return
    broken = [f"{seam.target} {fault}" for seam, fault in _broken(parts)]
    start = f"megatron-core {release} is not one that this package supports ({SUPPORTED})"
    if broken:
        raise ValueError(
            f"{start}, and what it replaces there has changed: {'; '.join(broken)}: install "
            f"megatron-core{SUPPORTED}, or a kvshift_megatron that is made for this one"
        )
    _warn(
        f"{start}: what it replaces there is as it was, so the run goes on; to test the rest, run "
        "`make test-next MEGATRON_PATH=CHECKOUT` on its sources"
    )


@functools.cache
def _warn(sentence: str) -> None:
    if os.environ.get("RANK", "0") == "0":
        print(f"kvshift_megatron: WARNING: {sentence}", file=sys.stderr, flush=True)


def _broken(parts: Collection[str]) -> Iterator[tuple[Seam, str]]:
    for part, seam in seams():
        if part in parts and (fault := seam.fault()):
            yield seam, fault


def main() -> int:
    """Print every seam, and return the exit status."""
    broken = 0
    for part, seam in seams():
        fault = seam.fault()
        broken += fault is not None
        print(f"{'broken' if fault else 'intact'}  {part:11}  {seam.target} {fault or ''}".rstrip())
        if fault:
            print(f"        why it matters: {seam.reason}")
    word = "is" if contains(SUPPORTED, installed("megatron")) else "is not"
    print(
        f"megatron-core {installed('megatron')}, which {word} in {SUPPORTED}: {broken} broken seams"
    )
    return int(broken > 0)


if __name__ == "__main__":
    sys.exit(main())
