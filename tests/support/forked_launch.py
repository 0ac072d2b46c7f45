"""Several runs, one after the other, on the ranks of one launch (see forked_ranks.py)."""

import json
import re
from pathlib import Path
from typing import Any, NamedTuple

from tests.support import launch


class Run(NamedTuple):
    """A finished run: exit code and output of each rank, or of the launcher for all ranks."""

    codes: list[int]
    outputs: list[str]

    def said(self, pattern: str) -> list[str]:
        """Return the lines of all ranks that match."""
        lines = [line for output in self.outputs for line in output.splitlines()]
        return [line for line in lines if re.search(pattern, line)]


def forked(
    directory: Path,
    plan: dict[str, dict[str, Any]],
    ranks: int,
    module: str = "tests.support.forked_ranks",
    timeout: float = 600,
) -> dict[str, Run]:
    """Run all of a plan.

    Args:
        directory: An existing one; the runs leave their files there.
        plan: By name, what `module` expects of a run: {"command": flags, "before": ...}.
        ranks: Number of ranks.
        module: The script that forks the runs.
        timeout: Seconds for all runs together.
    """
    file = directory / "plan.json"
    file.write_text(json.dumps(plan))
    # Compiling takes longer than running a few steps.
    done = launch.ranks(ranks, module, [str(file)], timeout, forks=True, TORCHDYNAMO_DISABLE="1")
    assert done.returncode == 0, done.stdout[-5000:]
    return {
        name: Run(
            [int((directory / f"{name}-{rank}.exit").read_text()) for rank in range(ranks)],
            [
                (directory / f"{name}-{rank}.log").read_text(errors="replace")
                for rank in range(ranks)
            ],
        )
        for name in plan
    }
