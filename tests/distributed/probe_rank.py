"""A rank with a given behaviour: python -m tests.distributed.probe_rank WHAT FOLDER."""

import os
import subprocess
import sys
import time
from pathlib import Path

import torch


def main(what: str, folder: Path) -> None:
    store, rank, ranks = next(torch.distributed.rendezvous("env://"))
    (folder / f"rank-{rank}").write_text(str(os.getpid()))
    if what == "meets":
        # The first rank ends; the others still use the store, which is not in its process.
        if rank:
            time.sleep(0.5)
            store.set(f"late {rank}", "there")
            store.wait([f"late {other}" for other in range(1, ranks)])
        print(f"rank {rank} of {ranks}", flush=True)
    elif what == "fails" and rank == 1:
        sys.exit("rank 1 has failed")
    else:
        child = subprocess.Popen(["sleep", "1000"])
        (folder / f"child-{rank}").write_text(str(child.pid))
        time.sleep(1000)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
