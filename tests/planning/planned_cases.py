"""Plans, made in one process: python -m tests.planning.planned_cases FOLDER.

Leaves in FOLDER
    counted.json   {case: [what the dry runs of its first and last rank counted]}, and as "twin"
                   rank 0 of one case without KV shifting
    lines.json     a step of many micro-batches: {"exact": counted, "extrapolated": from two short}
    plan.txt, plan.json, plan.png and search.txt: what tools/plan_cluster.py gives
    plan.exit      its exit codes
"""

import contextlib
import json
import sys
from pathlib import Path
from unittest import mock

from kvshift_megatron.planning import command_line, dry_run, search
from kvshift_megatron.planning.dry_run import DryRank
from kvshift_megatron.planning.layout import Layout
from kvshift_megatron.planning.plan import stage_plan
from tests.integration.tiny_gpt import flags
from tests.planning.cases import CASES

MANY = 12  # micro-batches
PIPELINE = ["10m", "8x80gb", "--set", "pipeline-model-parallel-size=2"]


def count_cases() -> dict[str, list[dict]]:
    """The cases of the real runs, in the steps of these."""
    ranks = {
        (name, rank): DryRank(case.command, case.ranks, rank, (case.micro_batches,) * 3, "cpu")
        for name, case in CASES.items()
        for rank in case.planned_ranks
    }
    twin = CASES["tp2-cp2"]
    ranks["twin", 0] = DryRank(
        (*twin.command, "--no-kv-shift"), twin.ranks, 0, (twin.micro_batches,) * 3, "cpu"
    )
    counted = dict(zip(ranks, dry_run.count(list(ranks.values()))))
    by_case = {
        name: [counted[name, rank] for rank in case.planned_ranks] for name, case in CASES.items()
    }
    return by_case | {"twin": [counted["twin", 0]]}


def count_lines() -> dict[str, list[dict]]:
    """A middle pipeline stage, plain and interleaved: all micro-batches, and from short steps."""
    result: dict[str, list[dict]] = {"exact": [], "extrapolated": []}
    for chunks in (1, 2):
        layout = Layout(1, 1, 1, 3, chunks > 1, MANY)
        interleaving = {"num_layers_per_virtual_pipeline_stage": 1} if chunks > 1 else {}
        words = flags(
            num_layers=3 * chunks,
            pipeline_model_parallel_size=3,
            micro_batch_size=1,
            global_batch_size=MANY,
            **interleaving,
        )
        short = (layout.warm_up(), *layout.counted_steps(1))
        assert len(short) == 3, "the step is not long enough to be extrapolated"
        for name, steps in (("exact", (layout.warm_up(), MANY)), ("extrapolated", short)):
            (counted,) = dry_run.count([DryRank(tuple(words), 3, layout.rank(1), steps)])
            result[name].append(stage_plan(layout, 1, counted))
    return result


def run_commands(folder: Path) -> None:
    """tools/plan_cluster.py as a user has it, on a small model."""
    codes = []
    files = ["--json", str(folder / "plan.json"), "--png", str(folder / "plan.png")]
    with (folder / "plan.txt").open("w") as output, contextlib.redirect_stdout(output):
        codes.append(command_line.main([*PIPELINE, *files]))
        codes.append(
            command_line.main(["10m", "cpu", "--gpu-set", "memory=6.2e9", "--set", "no-kv-shift"])
        )
    with (
        (folder / "search.txt").open("w") as output,
        contextlib.redirect_stdout(output),
        # Fewer than there are, as each takes a second.
        mock.patch.object(search, "_CONTEXT", (1,)),
        mock.patch.object(search, "RECOMPUTE", {"none": {}}),
        mock.patch.object(command_line, "_FINALISTS", 1),
    ):
        codes.append(
            command_line.main(["10m", "8x80gb", "--nproc", "4", "--search", "--gpu-set", "node=2"])
        )
    (folder / "plan.exit").write_text(json.dumps(codes))


def main(folder: Path) -> None:
    (folder / "counted.json").write_text(json.dumps(count_cases()))
    (folder / "lines.json").write_text(json.dumps(count_lines()))
    run_commands(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
