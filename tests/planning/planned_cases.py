"""Make plans in one process: python -m tests.planning.planned_cases FOLDER.

Files in FOLDER afterwards
    counted.json   {case: [what the dry runs of its first and last rank counted]}, and under
                   "baseline" rank 0 of one case without KV shifting
    forms.json     {case: [[GPT, hybrid] of its first and last rank]}, the recipes' first ranks
                   too, and under "each layer" one case whose hybrid form recomputes otherwise
    lines.json     a step of many micro-batches: {"exact": counted, "extrapolated": from two short}
    plan.txt, plan.json, plan.png and search.txt: the output of tools/plan_cluster.py; also
                   hybrid.json and hybrid_search.txt, of the same with --hybrid
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
from kvshift_megatron.recipes import recipe
from kvshift_megatron.recipes.toml_flags import command_line as words_of
from tests.integration.tiny_gpt import flags
from tests.planning.cases import CASES, ONLY_PLANNED

MANY = 12  # micro-batches
SEARCH = ["10m", "8x80gb", "--nproc", "4", "--search", "--gpu-set", "node=2"]
# Every model of the paper, on its number of GPUs.
RECIPES = [("1.5b", "64x80gb"), ("2.9b", "512x80gb"), ("6.7b", "64x80gb"), ("13b", "128x80gb"),
           ("19b", "240x80gb"), ("10m", "8x80gb")]  # fmt: skip
PIPELINE = ["10m", "8x80gb", "--set", "pipeline-model-parallel-size=2"]


def count_cases() -> dict[str, list[dict]]:
    """Count the cases of the real runs, with as many micro-batches per step."""
    ranks = {
        (name, rank): DryRank(case.command, case.ranks, rank, (case.micro_batches,) * 3, "cpu")
        for name, case in CASES.items()
        for rank in case.planned_ranks
    }
    case = CASES["tp2-cp2"]
    ranks["baseline", 0] = DryRank(
        (*case.command, "--no-kv-shift"), case.ranks, 0, (case.micro_batches,) * 3, "cpu"
    )
    counted = dict(zip(ranks, dry_run.count(list(ranks.values()))))
    by_case = {
        name: [counted[name, rank] for rank in case.planned_ranks] for name, case in CASES.items()
    }
    return by_case | {"baseline": [counted["baseline", 0]]}


def count_forms(counted: dict[str, list[dict]]) -> dict[str, list[list[dict]]]:
    """Count the hybrid forms of the cases, and the recipes in both.

    Args:
        counted: What `count_cases` returned.
    """
    runs: dict[tuple[str, int, str], DryRank] = {}
    for name, case in (CASES | ONLY_PLANNED).items():
        for rank in case.planned_ranks:
            kernels = "gpu" if name == "selective" else "cpu"
            for form, words in (("gpt", case.command), ("hybrid", case.hybrid)):
                if form == "hybrid" or kernels == "gpu" or name not in CASES:
                    steps = (case.micro_batches,) * 3
                    runs[name, rank, form] = DryRank(words, case.ranks, rank, steps, kernels)
    for model, layout in RECIPES:
        for form in ("gpt", "hybrid"):
            # The layers are alike; tests/recipes builds all of them.
            run = recipe.load(model, layout, {"num-layers": 4}, hybrid=form == "hybrid")
            runs[model, 0, form] = DryRank(tuple(words_of(run.flags)), run.nproc, 0, (1,))
    case = CASES["interleaved"]
    at = case.hybrid.index("--recompute-num-layers") + 1
    each = (*case.hybrid[:at], "1", *case.hybrid[at + 1 :])
    runs["each layer", 0, "hybrid"] = DryRank(each, case.ranks, 0, (case.micro_batches,) * 3, "cpu")
    found = dict(zip(runs, dry_run.count(list(runs.values()))))
    gpt = {
        (name, rank): one
        for name, case in CASES.items()
        for rank, one in zip(case.planned_ranks, counted[name])
    }
    gpt["each layer", 0] = counted["interleaved"][0]
    gpt |= {(name, rank): one for (name, rank, form), one in found.items() if form == "gpt"}
    pairs: dict[str, list[list[dict]]] = {}
    for (name, rank, form), one in found.items():
        if form == "hybrid":
            pairs.setdefault(name, []).append([gpt[name, rank], one])
    return pairs


def count_lines() -> dict[str, list[dict]]:
    """Count a middle pipeline stage, plain and interleaved: in full, and from short steps."""
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
        assert len(short) == 3, "the step is too short to be extrapolated to"
        for name, steps in (("exact", (layout.warm_up(), MANY)), ("extrapolated", short)):
            (counted,) = dry_run.count([DryRank(tuple(words), 3, layout.rank(1), steps)])
            result[name].append(stage_plan(layout, 1, counted))
    return result


def run_commands(folder: Path) -> None:
    """Run the commands of tools/plan_cluster.py on a small model."""
    codes = []
    files = ["--json", str(folder / "plan.json"), "--png", str(folder / "plan.png")]
    with (folder / "plan.txt").open("w") as output, contextlib.redirect_stdout(output):
        codes.append(command_line.main([*PIPELINE, *files]))
        codes.append(
            command_line.main(["10m", "cpu", "--gpu-set", "memory=6.2e9", "--set", "no-kv-shift"])
        )
        codes.append(
            command_line.main([*PIPELINE, "--hybrid", "--json", str(folder / "hybrid.json")])
        )
    for name, form in (("search.txt", []), ("hybrid_search.txt", ["--hybrid"])):
        with (
            (folder / name).open("w") as output,
            contextlib.redirect_stdout(output),
            # Fewer candidates than there are, as each takes a second.
            mock.patch.object(search, "_CONTEXT", (1,)),
            mock.patch.object(search, "_MICRO_BATCHES", (1, 2)),
            mock.patch.object(search, "RECOMPUTE", {"none": {}}),
            mock.patch.object(command_line, "_FINALISTS", 1),
        ):
            codes.append(command_line.main([*SEARCH, *form]))
    (folder / "plan.exit").write_text(json.dumps(codes))


def main(folder: Path) -> None:
    counted = count_cases()
    (folder / "counted.json").write_text(json.dumps(counted))
    (folder / "forms.json").write_text(json.dumps(count_forms(counted)))
    (folder / "lines.json").write_text(json.dumps(count_lines()))
    run_commands(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
