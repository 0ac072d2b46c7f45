"""Recipes as hybrid models: the flags, and what cannot be translated or divided."""

import pytest

from kvshift_megatron.recipes import patterns, recipe, show
from kvshift_megatron.recipes.hybrid_form import hybrid_form
from kvshift_megatron.recipes.toml_flags import command_line

pytestmark = pytest.mark.slow

GPT = {"hidden-size": 8, "num-layers": 4, "bf16": True}


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ({}, {"hybrid-layer-pattern": "*-*-*-*-"}),
        (
            {"pipeline-model-parallel-size": "2"},
            {"pipeline-model-parallel-size": "2", "hybrid-layer-pattern": "*-*-|*-*-"},
        ),
        (
            {"pipeline-model-parallel-size": 2, "num-layers-per-virtual-pipeline-stage": 1},
            {"pipeline-model-parallel-size": 2, "hybrid-layer-pattern": "*-|*-|*-|*-"},
        ),
        (
            {"pipeline-model-parallel-size": 1, "num-virtual-stages-per-pipeline-rank": 2},
            {"pipeline-model-parallel-size": 1, "hybrid-layer-pattern": "*-*-*-*-"},
        ),
        (
            {"pipeline-model-parallel-size": 2, "num-virtual-stages-per-pipeline-rank": 2},
            {"pipeline-model-parallel-size": 2, "hybrid-layer-pattern": "*-|*-|*-|*-"},
        ),
        ({"mtp-num-layers": 2}, {"hybrid-layer-pattern": "*-*-*-*-/*-/*-"}),
        (
            {"num-experts": 8, "mtp-num-layers": 1},
            {"num-experts": 8, "hybrid-layer-pattern": "*E*E*E*E/*E"},
        ),
        (
            {"recompute-granularity": "full", "recompute-num-layers": "1"},
            {"recompute-granularity": "full", "recompute-num-layers": 2,
             "hybrid-layer-pattern": "*-*-*-*-"},
        ),
        ({"no-rope-freq": False}, {"no-rope-freq": False, "hybrid-layer-pattern": "*-*-*-*-"}),
    ],
)  # fmt: skip
def test_flags_of_the_other_form(own, expected):
    found = hybrid_form(GPT | own)
    assert found == {"hidden-size": 8, "bf16": True} | expected
    # The pattern stands where the number of layers stood.
    assert list(found)[:2] == ["hidden-size", "hybrid-layer-pattern"]


def test_a_pattern_stays_as_it_is():
    flags = {"hybrid-layer-pattern": "**-", "recompute-num-layers": 1}
    assert hybrid_form(flags) is flags


@pytest.mark.parametrize(
    ("own", "message"),
    [
        ({"num-layers": 3, "pipeline-model-parallel-size": 2}, "must be divisible by PP x chunks"),
        (
            {"pipeline-model-parallel-size": 2, "num-layers-per-virtual-pipeline-stage": 3},
            "num-layers is 4: it must be divisible by .* = 6",
        ),
        ({"num-layers": "many"}, "num-layers must be a whole number above 0, got 'many'"),
        ({"num-layers": False}, "num-layers must be a whole number above 0, got None"),
        ({"mtp-num-layers": 0}, "mtp-num-layers must be a whole number above 0, got 0"),
        (
            {"pipeline-model-parallel-layout": "Et*4L"},
            "pipeline-model-parallel-layout counts layers of a GPT model, .* leave --hybrid out",
        ),
        ({"moe-layer-freq": 2}, "moe-layer-freq counts layers"),
    ],
)
def test_what_cannot_be_translated_is_one_sentence(own, message):
    with pytest.raises(ValueError, match=message):
        hybrid_form(GPT | own)


@pytest.mark.parametrize(
    ("pattern", "unit", "layers", "stages"),
    [
        ("*-*-*-", "*-", "*-*-*-", 1),
        ("*-*-|*-*-/*-", "*-", "*-*-*-*-", 2),
        ("**-*|*-", "**-", "**-**-", 2),
        ("*-**-", "*-**-", "*-**-", 1),
        ("*-|-*/*-/*-", "*--*", "*--*", 2),
    ],
)
def test_patterns_are_read_as_text(pattern, unit, layers, stages):
    assert patterns.unit(pattern) == unit
    assert patterns.main_layers(pattern) == layers
    assert patterns.stages(pattern) == stages


def test_megatron_reads_the_same_number_of_layers():
    from kvshift_megatron.specs.hybrid_pattern import num_layers

    for pattern in ("*-*-*-", "*-*-|*-*-/*-", "*-|-*/*-/*-"):
        assert len(patterns.main_layers(pattern)) == num_layers(pattern)


def test_only_the_flag_of_the_layers_differs(capsys):
    assert show.main(["19b", "240x80gb"]) == 0
    gpt = capsys.readouterr()
    assert show.main(["19b", "240x80gb", "--hybrid", "--check"]) == 0
    hybrid = capsys.readouterr()
    pattern = f"--hybrid-layer-pattern {'*-' * 48}"
    assert hybrid.out == gpt.out.replace("--num-layers 48", pattern)
    assert hybrid.err.rstrip() == gpt.err.partition(" (--check")[0]


def test_stages_of_a_layout_are_written_into_the_pattern(capsys):
    words = ["10m", "8x80gb", "--hybrid", "--set", "pipeline-model-parallel-size=2"]
    assert show.main([*words, "--set", "num-layers=4"]) == 0
    assert "--hybrid-layer-pattern *-*-|*-*-" in capsys.readouterr().out.splitlines()


def test_a_pattern_of_ones_own_replaces_the_number_of_layers():
    run = recipe.load("10m", "cpu", {"hybrid-layer-pattern": "*-**-"})
    words = command_line(run.flags)
    assert "--num-layers" not in words
    assert words[words.index("--hybrid-layer-pattern") + 1] == "*-**-"
    assert recipe.load("10m", "cpu", {"hybrid-layer-pattern": False}).flags["num-layers"] == 8


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "by-megatron"])
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (["hybrid-layer-pattern=*-|*-|*-", "pipeline-model-parallel-size=2"],
         "the number of stages in hybrid-layer-pattern *-|*-|*- is 3: it must be divisible by PP"),
        (["hybrid-layer-pattern=*-*", "pipeline-model-parallel-size=2"],
         "the number of layers in hybrid-layer-pattern *-* is 3: it must be divisible by PP = 2"),
        (["hybrid-layer-pattern=*-*-", "num-layers=8"],
         "num-layers is 8, but hybrid-layer-pattern *-*- has 4 layers: leave num-layers out"),
    ],
)  # fmt: skip
def test_a_wrong_pattern_is_one_sentence(settings, message, checked, capsys):
    words = ["10m", "8x80gb", *(word for text in settings for word in ("--set", text))]
    code = show.main([*words, "--check"] if checked else words)
    out, err = capsys.readouterr()
    assert (code, out) == (2, "")
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


def test_check_has_megatron_read_the_pattern(capsys):
    words = ["10m", "cpu", "--set", "hybrid-layer-pattern=*-?"]
    assert show.main([*words, "--check"]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: hybrid-layer-pattern *-?: ") and "'?'" in err
    assert len(err.splitlines()) == 1


def test_a_pattern_without_a_value_is_refused(capsys):
    for text in ("hybrid-layer-pattern", "hybrid-layer-pattern="):
        assert show.main(["10m", "cpu", "--set", text]) == 2
        assert "hybrid-layer-pattern must be layers such as *-*-" in capsys.readouterr().err
