"""The output of kvshift-plan, and the counts that it shows."""

import json
import subprocess
import sys

import pytest

from kvshift_megatron.planning import command_line
from tests.planning.planned_cases import MANY
from tests.support.launch import PROJECT

pytestmark = pytest.mark.slow


def test_two_short_steps_give_the_cost_of_a_long_one(plan_folder):
    lines = json.loads((plan_folder / "lines.json").read_text())
    for exact, line in zip(lines["exact"], lines["extrapolated"], strict=True):
        for name in ("work", "saved_per_micro_batch", "saved_peak", "state_bytes"):
            assert line[name] == exact[name], name
        assert _sorted(line["traffic"]) == _sorted(exact["traffic"])
        assert line["peak_bytes"] == pytest.approx(exact["peak_bytes"], rel=0.01)
        sends = [row for row in exact["traffic"] if row["group"] == "PP"]
        assert sends[0]["messages"] >= 2 * MANY


def _sorted(rows):
    return sorted(map(str, map(sorted, (row.items() for row in rows))))


def test_exit_status_says_whether_it_fits(plan_folder):
    assert json.loads((plan_folder / "plan.exit").read_text()) == [0, 1, 0, 0, 0]
    text = (plan_folder / "plan.txt").read_text()
    assert (text.count("  FITS: "), text.count("  DOES NOT FIT: ")) == (2, 1)


def test_what_kv_shifting_adds(plan_folder):
    plan = json.loads((plan_folder / "plan.json").read_text())
    for stage in plan["added_by_kv_shift"]:
        assert stage["parameters"] == 4 * 4 * 2  # layers, taps, groups
        assert stage["matmul_flops"] == 0
        assert stage["pointwise_elements"] > 0
        messages = {kind: n for kind, (n, _) in stage["traffic"].items() if n}
        assert messages == {}  # without context parallelism the shift sends nothing


def test_counted_flops_are_megatron_s(plan_folder):
    plan = json.loads((plan_folder / "plan.json").read_text())
    forward = [stage["work"]["forward"] for stage in plan["stages"]]
    flops = 3 * sum(work["matmul"] + work["attention"] / 2 for work in forward)
    replicas = plan["layout"]["dp"]
    assert flops * replicas == pytest.approx(plan["figures"]["megatron_flops_per_step"], rel=1e-6)


def test_files(plan_folder):
    plan = json.loads((plan_folder / "plan.json").read_text())
    assert plan["layout"]["pp"] == len(plan["stages"]) == len(plan["twin_stages"]) == 2
    assert plan["stages"][0]["in_flight"] == pytest.approx(2, abs=0.1)
    assert plan["figures"]["megatron_activation_bytes"] > 0
    assert (plan_folder / "plan.png").read_bytes().startswith(b"\x89PNG")
    assert not list(plan_folder.glob("*.tmp"))


def test_search_proposes_the_fastest_that_fits(plan_folder):
    text = (plan_folder / "search.txt").read_text()
    proposals, built = text.split("The first of them, every stage built:")
    quick = [figures(line) for line in proposals.splitlines() if " GB free: TP" in line]
    assert len(quick) > 5 and quick == sorted(quick, key=lambda row: row["seconds"])
    assert "  FITS: " in built
    # The quick models take every stage to be the slowest, which here is the last one.
    (finalist,) = [figures(line) for line in built.splitlines() if " GB free, MFU" in line]
    assert finalist["layout"] == quick[0]["layout"]
    assert quick[0]["seconds"] == pytest.approx(finalist["seconds"], rel=0.3)


def figures(line: str) -> dict:
    """Read the figures of one proposal from its printed line."""
    numbers, _, layout = line.partition(": ")
    return {"seconds": float(numbers.split()[0]), "layout": layout}


def test_the_papers_largest_model_is_planned_in_minutes(tmp_path):
    """On 240 GPUs at 12288 tokens, it takes less than five minutes and 8 GiB."""
    subprocess.run(
        [sys.executable, "tools/plan_cluster.py", "19b", "240x80gb", "--json", tmp_path / "plan"],
        cwd=PROJECT,
        check=True,
        capture_output=True,
        timeout=300,
    )
    plan = json.loads((tmp_path / "plan").read_text())
    assert plan["layout"]["world_size"] == 240 and plan["figures"]["seq_length"] == 12288
    # TP 4 divides the matrices and the taps by four; every rank holds all norms.
    norms = (2 * 48 + 1) * 6144
    assert plan["stages"][0]["parameters"] == (19_011_803_136 - norms) // 4 + norms + 768 // 4
    assert 3 * plan["peak_rss"] < 8 * 2**30


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["20b", "8x80gb"], "model 20b: neither one of"),
        (["10m", "8x80gb", "--jobs", "0"], "--jobs 0: expected at least 1"),
        (["10m", "8x80gb", "--gpu", "abacus"], "--gpu abacus: not one of"),
        (["10m", "8x80gb", "--json", "/nowhere/plan.json"], "there is no directory /nowhere"),
    ],
)
def test_mistakes_are_one_sentence(argv, words, capsys):
    assert command_line.main(argv) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and words in said and said.count("\n") == 1
