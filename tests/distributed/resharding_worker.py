"""One rank of the launch in which every layout saves and every layout loads.

torchrun ... -m tests.distributed.resharding_worker OUTPUT_DIR

A layout with fewer ranks than the launch runs on some of them, while others run on the rest:
layouts exchange checkpoints as files, and have separate process groups.
"""

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from kvshift_megatron import cpu
from tests.distributed.worker import _TIMEOUT, model_parallel, store_outcome
from tests.support.releases import imported_from


def main(output: Path) -> None:
    cpu.enable()
    torch.set_num_threads(1)
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))
    (output / f"megatron-{rank}.json").write_text(json.dumps(imported_from()))

    from megatron.core.dist_checkpointing.strategies import filesystem_async

    from tests.distributed import resharding

    # The process in which Megatron collects what was written. Forked here, before there are
    # threads: a spawned one would take seconds to import torch.
    filesystem_async.get_write_results_queue(mp_mode="fork")
    work = [0] * world_size
    for phase in (_saves, _loads):
        jobs = {}
        for layout, name, *job in phase(output, resharding, world_size):
            jobs.setdefault((layout.ranks, layout.case.layout), []).append((name, *job))
        # The largest layouts come first. They need every rank, so all saves end before any load.
        for ranks, layout in sorted(jobs, key=lambda key: -key[0]):
            if ranks > world_size:
                continue
            first = min(range(0, world_size, ranks), key=lambda r: sum(work[r : r + ranks]))
            for other in range(first, first + ranks):
                work[other] += len(jobs[ranks, layout])
            if first <= rank < first + ranks:
                prefix = f"{phase.__name__}-{ranks}-{layout}"
                group = torch.distributed.PrefixStore(prefix, store)
                with model_parallel(group, rank - first, ranks, *layout):
                    for name, job, arguments in jobs[ranks, layout]:
                        store_outcome(output / f"{name}.pt", job, arguments)


def _saves(output: Path, table, world_size: int) -> Iterator[tuple[object, str, Callable, tuple]]:
    """Yield (layout, name, function, arguments) of everything that is saved."""
    for name, family in table.FAMILIES.items():
        yield family[0], f"unbroken:{name}", _unbroken, (family[0].case,)
        for layout in family:
            yield layout, f"save:{layout.name}", _save, (output / layout.name, layout.case)
    for plant in table.PLANTS:
        arguments = (output / plant.name, plant.saver.case, plant.declared)
        yield plant.saver, f"save:{plant.name}", _save, arguments


def _loads(output: Path, table, world_size: int) -> Iterator[tuple[object, str, Callable, tuple]]:
    """Yield the same of everything that is loaded: each layout reads what its family has saved."""
    for family in table.FAMILIES.values():
        saved = [layout for layout in family if layout.ranks <= world_size]
        for before, layout in zip([saved[-1], *saved], saved):
            folders = [output / saver.name for saver in saved]
            # In bf16 losses differ between layouts.
            goes_on = {layout.name} if layout.case.model.bf16 else {layout.name, before.name}
            yield layout, f"load:{layout.name}", _load, (folders, layout.case, goes_on)
    for plant in table.PLANTS:
        declared = plant.declared if plant.while_loading else None
        arguments = ([output / plant.name], plant.loader.case, set(), declared)
        yield plant.loader, f"load:{plant.name}", _load, arguments


def _unbroken(case) -> dict:
    from tests.distributed import resharding, training_state

    return {"losses": training_state.train(training_state.start(case), range(resharding.STEPS))}


def _save(directory: Path, case, declared: Callable | None = None) -> dict:
    """Save a checkpoint; return the whole state, and the losses of steps before and after."""
    from tests.distributed import resharding, training_state

    state = training_state.start(case)
    losses = training_state.train(state, range(resharding.SAVED_AFTER))
    with resharding.in_force(declared):
        training_state.save(state, directory)
    saved = training_state.whole(state)
    losses += training_state.train(state, range(resharding.SAVED_AFTER, resharding.STEPS))
    return {"losses": losses, "state": saved}


def _load(folders: list[Path], case, goes_on: set[str], declared: Callable | None = None) -> dict:
    """Load each checkpoint; return how its state differs from the saved one.

    For savers in `goes_on` also return the losses of the steps that follow.
    """
    from tests.distributed import resharding, training_state

    state = training_state.start(case)
    result = {"differences": {}, "losses": {}}
    for folder in folders:
        training_state.poison(state)
        with resharding.in_force(declared):
            training_state.load(state, folder)
        loaded = training_state.whole(state)
        saved = torch.load(folder.with_name(f"save:{folder.name}.pt"))["result"]["state"]
        result["differences"][folder.name] = training_state.differences(loaded, saved)
        if folder.name in goes_on:
            steps = range(resharding.SAVED_AFTER, resharding.STEPS)
            result["losses"][folder.name] = training_state.train(state, steps)
    return result


if __name__ == "__main__":
    main(Path(sys.argv[1]))
