"""One rank of a launch: run every case of its world size and store the results.

torchrun ... -m tests.distributed.worker OUTPUT_DIR
"""

import contextlib
import json
import sys
import time
import traceback
from collections import defaultdict
from datetime import timedelta
from pathlib import Path

import torch

from kvshift_megatron import cpu
from tests.support.releases import imported_from

# How long a rank waits for another one.
_TIMEOUT = timedelta(seconds=90)


def main(output: Path) -> None:
    cpu.enable()
    torch.set_num_threads(1)
    store, rank, world_size = next(torch.distributed.rendezvous("env://", timeout=_TIMEOUT))

    from tests.distributed import engine, properties
    from tests.distributed.cases import cases

    (output / f"megatron-{rank}.json").write_text(json.dumps(imported_from()))
    by_layout = defaultdict(list)
    for case in cases(world_size):
        by_layout[case.layout].append((case.name, engine.run, (case,)))
    for name, case, job in properties.properties(world_size):
        job = (f"property:{name}", properties.run, (case, job))
        by_layout[case.layout].append(job)
    for layout, jobs in by_layout.items():
        prefix = torch.distributed.PrefixStore(str(layout), store)
        with model_parallel(prefix, rank, world_size, *layout):
            for name, job, arguments in jobs:
                store_outcome(output / f"{name}.pt", job, arguments)


@contextlib.contextmanager
def model_parallel(store, rank: int, world_size: int, tp: int, pp: int, cp: int, vpp: int | None):
    """Set up a layout's process groups; destroy them, as threads of idle gloo groups stay awake."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group(
        "gloo", store=store, rank=rank, world_size=world_size, timeout=_TIMEOUT
    )
    parallel_state.initialize_model_parallel(
        tensor_model_parallel_size=tp,
        pipeline_model_parallel_size=pp,
        context_parallel_size=cp,
        virtual_pipeline_model_parallel_size=vpp,
    )
    yield
    parallel_state.destroy_model_parallel()
    torch.distributed.destroy_process_group()


def store_outcome(path: Path, job, arguments: tuple) -> None:
    """Run a job on every rank; rank 0 stores its result, or the first rank's error."""
    start = time.monotonic()
    try:
        outcome = {"result": job(*arguments)}
    except Exception:
        outcome = {"error": traceback.format_exc()}
    errors = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(errors, outcome.get("error"))
    failed = [f"rank {rank}: {error}" for rank, error in enumerate(errors) if error]
    if torch.distributed.get_rank() == 0:
        torch.save({"error": failed[0]} if failed else outcome, path)
        print(f"{path.stem}: {time.monotonic() - start:.2f} s", flush=True)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
