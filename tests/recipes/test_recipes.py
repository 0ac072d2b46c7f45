"""Recipes: every model on every layout, through Megatron's parser and the model builder.

The code that trains the models builds them on the meta device, where nothing is allocated.
"""

import contextlib
import io
import re
import sys
from dataclasses import dataclass

import pytest
import torch

from kvshift_megatron.cpu import cpu_device_layer
from kvshift_megatron.recipes import recipe, show, sizes, validate
from kvshift_megatron.recipes.toml_flags import command_line, read
from tests.support.fake_ranks import Layout, fake_rank
from tests.support.launch import PROJECT, ranks

pytestmark = pytest.mark.slow


@dataclass(frozen=True)
class Paper:
    """One column of Tables 1 and 6, the parameters that follow from it, in billions, and taps."""

    hidden: int
    layers: int
    heads: int
    groups: int
    ffn: int
    seq: int
    tokens: int
    vocab: int
    gpus: int
    samples_per_gpu: int
    lr: float
    warmup: int
    billions: float
    taps: int


G = 10**9
# fmt: off
PAPER = {
    "1.5b": Paper(2048, 28, 16, 16, 5504, 2048, 10*G, 36000, 64, 8, 2e-4, 1000, 1.564, 1792),
    "2.9b": Paper(2560, 32, 20, 4, 8704, 4096, 500*G, 48000, 512, 8, 8e-4, 600, 2.888, 512),
    "6.7b": Paper(4096, 32, 32, 32, 11008, 2048, 10*G, 36000, 64, 8, 2e-4, 1000, 6.771, 4096),
    "13b": Paper(5120, 40, 40, 40, 13824, 2048, 10*G, 36000, 128, 8, 2e-4, 1000, 13.057, 6400),
    "19b": Paper(6144, 48, 48, 4, 16384, 12288, 200*G, 48000, 240, 1, 2e-4, 3000, 19.012, 768),
}
# Computed by hand from the shapes, without the taps.
PARAMETERS = {
    "10m": 9_998_592,
    "1.5b": 1_564_198_912,
    "2.9b": 2_888_337_920,
    "6.7b": 6_771_183_616,
    "13b": 13_056_824_320,
    "19b": 19_011_803_136,
}
# fmt: on
TAPS = {"10m": 64} | {name: paper.taps for name, paper in PAPER.items()}
LAYOUTS = sorted(path.stem for path in recipe.LAYOUTS.glob("*.toml"))
RUNS = [
    (model, layout)
    for layout in LAYOUTS
    for model in read(recipe.LAYOUTS / f"{layout}.toml")["models"]
]


@pytest.fixture(scope="module", autouse=True)
def cpu_layer():
    with cpu_device_layer(force=True):
        yield


def validated(run: recipe.Run, monkeypatch):
    """Return what the entry point's parsing and checks make of a run on rank 0."""
    from megatron.training.global_vars import unset_global_variables

    from kvshift_megatron.training.run_config import parse_and_check

    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(run.nproc))
    monkeypatch.setattr(sys, "argv", ["pretrain", *command_line(run.flags)])
    with contextlib.redirect_stdout(io.StringIO()):
        try:
            return parse_and_check()
        finally:
            unset_global_variables()


def built(args, layout: Layout, rank: int = 0) -> torch.nn.Module:
    """Build a rank's model with the builder that training uses."""
    from megatron.core.process_groups_config import ProcessGroupCollection

    from kvshift_megatron.training.run_config import configurations

    with fake_rank(layout, rank), torch.device("meta"):
        config, _ = configurations(args)
        config.transformer.perform_initialization = False
        groups = ProcessGroupCollection.use_mpu_process_groups()
        model = config.get_builder_cls()(config).build_model(groups)
    assert all(parameter.is_meta for parameter in model.parameters())
    return model


def counts(model: torch.nn.Module) -> tuple[int, int]:
    """Count the parameters without the taps, and the taps."""
    taps = others = 0
    for name, parameter in model.named_parameters():
        if name.rpartition(".")[2].startswith(("alpha_", "beta_")):
            taps += parameter.numel()
        else:
            others += parameter.numel()
    return others, taps


def whole(model: str, *, hybrid: bool = False, **overrides) -> recipe.Run:
    """Return a run of the model on one process, whatever its layout says."""
    layout = next(layout for name, layout in RUNS if name == model)
    alone = {
        "tensor-model-parallel-size": 1,
        "context-parallel-size": 1,
        "sequence-parallel": False,
    }
    return recipe.load(model, layout, alone | overrides, nproc=1, hybrid=hybrid)


each_form = pytest.mark.parametrize("hybrid", [False, True], ids=["gpt", "hybrid"])


@each_form
@pytest.mark.parametrize("model", PARAMETERS)
def test_parameters_are_exact(model, hybrid, monkeypatch):
    run = whole(model, hybrid=hybrid)
    assert counts(built(validated(run, monkeypatch), Layout())) == (PARAMETERS[model], TAPS[model])


def test_a_wrong_shape_changes_the_count(monkeypatch):
    for wrong in (
        {"ffn-hidden-size": 5505},
        {"num-query-groups": 8},
        {"untie-embeddings-and-output-weights": False},
        {"make-vocab-size-divisible-by": 128},
        {"no-kv-shift": True},
        {"hybrid-layer-pattern": "*-" * 27 + "*"},
    ):
        model = built(validated(whole("1.5b", **wrong), monkeypatch), Layout())
        assert counts(model) != (PARAMETERS["1.5b"], TAPS["1.5b"]), wrong


@pytest.mark.parametrize("model", PAPER)
def test_the_counts_follow_from_the_papers_shape(model):
    p = PAPER[model]
    head = p.hidden // p.heads
    attention = 2 * p.hidden * p.hidden + 2 * p.hidden * p.groups * head
    layer = attention + 3 * p.hidden * p.ffn + 2 * p.hidden
    assert PARAMETERS[model] == 2 * p.vocab * p.hidden + p.layers * layer + p.hidden
    assert round(PARAMETERS[model] / 1e9, 3) == p.billions
    assert 4 * p.groups * p.layers == p.taps


@pytest.mark.parametrize("model", PAPER)
def test_a_model_has_the_papers_recipe(model):
    p, flags = PAPER[model], whole(model).flags
    assert flags["global-batch-size"] == p.gpus * p.samples_per_gpu
    assert flags["seq-length"] == flags["max-position-embeddings"] == p.seq
    step = flags["global-batch-size"] * p.seq
    assert 0 <= flags["train-iters"] * step - p.tokens < step
    assert (flags["lr"], flags["lr-warmup-iters"]) == (p.lr, p.warmup)
    assert flags["lr-decay-style"] == "constant"
    assert (flags["adam-beta1"], flags["adam-beta2"], flags["weight-decay"]) == (0.9, 0.95, 0.1)
    assert (flags["vocab-size"], flags["rotary-base"]) == (p.vocab, 100_000)


def test_the_models_set_the_same_flags_in_the_same_order():
    names = {name: list(read(recipe.MODELS / f"{name}.toml")["flags"]) for name in PARAMETERS}
    assert all(order == names["19b"] for order in names.values())
    assert {path.stem for path in recipe.MODELS.glob("*.toml")} == set(PARAMETERS)


def test_every_model_has_a_layout_and_one_with_the_papers_number_of_gpus():
    assert {model for model, _ in RUNS} == set(PARAMETERS)
    for model, paper in PAPER.items():
        assert (model, f"{paper.gpus}x80gb") in RUNS


@each_form
@pytest.mark.parametrize(("model", "layout"), RUNS)
def test_a_layout_divides_the_sizes_and_its_first_rank_builds(model, layout, hybrid, monkeypatch):
    run, flags = recipe.load(model, layout, hybrid=hybrid), recipe.load(model, layout).flags
    tp = flags.get("tensor-model-parallel-size", 1)
    cp = flags.get("context-parallel-size", 1)
    assert "pipeline-model-parallel-size" not in flags, "the counts below are for one stage"
    dp, rest = divmod(run.nproc, tp * cp)
    assert rest == 0
    assert flags["global-batch-size"] % (flags["micro-batch-size"] * dp) == 0
    assert flags["seq-length"] % (tp * cp * (2 if cp > 1 else 1)) == 0
    for name in ("num-attention-heads", "ffn-hidden-size", "vocab-size", "hidden-size"):
        assert flags[name] % tp == 0, name
    assert (tp * cp <= 8) and 8 % (tp * cp) == 0, "TP and CP stay within a node of 8"
    assert flags.get("sequence-parallel", False) == (tp > 1)

    args = validated(run, monkeypatch)
    assert args.padded_vocab_size == flags["vocab-size"]
    assert args.data_parallel_size == dp
    # DP 1: the other ranks of a data-parallel group would only cost time.
    others, taps = counts(built(args, Layout(tp=tp, cp=cp)))
    norms = (2 * flags["num-layers"] + 1) * flags["hidden-size"]
    assert others == (PARAMETERS[model] - norms) // tp + norms
    # With fewer groups than ranks, each rank keeps the taps of all groups.
    assert taps == TAPS[model] // (tp if flags["num-query-groups"] >= tp else 1)


@each_form
def test_training_needs_only_the_flags_and_data(hybrid):
    short = {"train-iters": 2, "lr-warmup-iters": 1, "log-interval": 1}
    run = recipe.load("10m", "cpu", short, hybrid=hybrid)
    words = [*command_line(run.flags), "--mock-data", "--eval-iters", "1"]
    result = ranks(run.nproc, "kvshift_megatron.pretrain", words, timeout=200)
    assert result.returncode == 0, result.stdout[-3000:]
    assert "64 taps" in result.stdout
    # Guessing among 8000 tokens gives a loss of 8.99.
    losses = [float(loss) for loss in re.findall(r"lm loss: (\S+)", result.stdout)]
    assert len(losses) == 2 and all(abs(loss - 8.99) < 0.3 for loss in losses)


def test_flags_are_printed_one_per_line(capsys):
    assert show.main(["19b", "240x80gb"]) == 0
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert all(line.startswith("--") for line in lines)
    assert out.split() == command_line(recipe.load("19b", "240x80gb").flags)
    assert "--train-iters 67817" in lines and "--tensor-model-parallel-size 4" in lines
    assert "TP 4 x PP 1 x CP 1 x DP 60" in err and len(err.splitlines()) == 1


def test_overrides_win(capsys):
    words = ["1.5b", "8x80gb", "--nproc", "16"]
    words += ["--set", "global-batch-size=1024", "--set", "lr=1e-3", "--set", "bf16=false"]
    words += ["--set", "no-kv-shift", "--set", "save=a/b", "--set", 'recompute-modules=["mlp"]']
    assert show.main(words) == 0
    lines = capsys.readouterr().out.splitlines()
    # 10e9 tokens in steps of 1024 x 2048.
    for line in ("--global-batch-size 1024", "--lr 1e-3", "--train-iters 4769", "--no-kv-shift"):
        assert line in lines
    assert "--save a/b" in lines and "--recompute-modules mlp" in lines
    assert "--bf16" not in lines


# Not all runs, as parsing is slow: with and without grouped queries, CP and sequence parallelism.
@pytest.mark.parametrize(("model", "layout"), [r for r in RUNS if r[0] == "19b"] + [("10m", "cpu")])
def test_sizes_are_those_of_megatrons_parser(model, layout):
    run = recipe.load(model, layout)
    plain, parsed = validate.check_without_megatron(run), validate.check(run)
    for name in (*sizes.NUMBERS, *sizes.OTHERS):
        assert getattr(plain, name) == getattr(parsed, name), name


def test_missing_sizes_are_megatrons_defaults():
    empty = recipe.Run("none", "none", nproc=1, flags={})
    parsed = vars(validate.parse(empty))
    assert {name: parsed[name] for name in sizes.NUMBERS} == sizes.NUMBERS
    assert {name: parsed[name] for name in sizes.OTHERS} == sizes.OTHERS


def test_flags_are_the_same_with_megatrons_check(capsys):
    words = ["10m", "cpu", "--set", "kv-shift-variant=gate"]
    assert show.main(words) == 0
    plain = capsys.readouterr()
    assert show.main([*words, "--check"]) == 0
    checked = capsys.readouterr()
    assert plain.out == checked.out
    assert "--check" in plain.err and checked.err.rstrip() == plain.err.partition(" (--check")[0]


# Mistakes that only Megatron's parser finds.
BY_MEGATRON = [
    (["10m", "cpu", "--set", "num-layer=3"], "unrecognized arguments: --num-layer 3"),
    (["10m", "cpu", "--set", "lr=fast"], "argument --lr: invalid float value: 'fast'"),
]
MISTAKES = [
        (["7b", "cpu"], "model 7b: neither one of 1.5b, 10m, 13b, 19b, 2.9b, 6.7b nor a file"),
        (["10m", "gpu"], "layout gpu: neither one of"),
        (["19b", "512x80gb"], "512x80gb.toml is for the models 1.5b, 2.9b, 6.7b, 13b, not for 19b"),
        (["10m", "cpu", "--set", "=3"], "--set =3: expected FLAG=VALUE or FLAG"),
        (["10m", "cpu", "--set", "seq-length=long"], "seq-length must be a positive integer"),
        (["10m", "cpu", "--nproc", "0"], "--nproc must be at least 1"),
        (["10m", "cpu", "--nproc", "3"],
         "batch-size is 8: it must be divisible by micro-batch-size x DP = 12"),
        (["19b", "240x80gb", "--nproc", "242"],
         "processes is 242: it must be divisible by TP x PP x CP = 4"),
        (["10m", "cpu", "--set", "num-attention-heads=6", "--set", "num-query-groups=3", "--set",
          "tensor-model-parallel-size=2", "--nproc", "2"], "num_query_groups=3"),
        (["10m", "cpu", "--set", "kv-shift-window=9"], "window=9"),
        (["10m", "cpu", "--set", "kv-shift-windows=3"], "arguments: --kv-shift-windows 3"),
        (["10m", "cpu", "--set", "kv-shift-window=3", "--set", "no-kv-shift"], "--no-kv-shift"),
        (["10m", "cpu", "--set", "reset-attention-mask"], "reset_attention_mask"),
]  # fmt: skip


@pytest.mark.parametrize("checked", [False, True], ids=["plain", "by-megatron"])
@pytest.mark.parametrize(("words", "message"), MISTAKES)
def test_a_mistake_is_one_sentence(words, message, checked, capsys):
    assert show.main([*words, "--check"] if checked else words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("error: ") and message in err and len(err.splitlines()) == 1


@pytest.mark.parametrize(("words", "message"), BY_MEGATRON)
def test_check_asks_megatrons_parser(words, message, capsys):
    assert show.main(words) == 0
    capsys.readouterr()
    test_a_mistake_is_one_sentence(words, message, True, capsys)


def test_a_size_that_is_no_number_is_refused(capsys):
    words = ["10m", "cpu", "--set", "num-layers=many"]
    assert show.main(words) == 2
    assert "num-layers must be a whole number, got 'many'" in capsys.readouterr().err


def test_a_job_under_slurm_asks_megatrons_parser_before_any_node_starts():
    """The batch script checks the arguments that it is given (examples/slurm/begin.py)."""
    script = (PROJECT / "examples/slurm/pretrain.sbatch").read_text()
    lines = [line.strip() for line in script.splitlines()]
    (asked,) = [line for line in lines if "kvshift_megatron.recipes" in line and line[0] != "#"]
    assert asked.startswith('here "$PYTHON" -m kvshift_megatron.recipes --check "${show[@]}"')
    assert asked.endswith('|| finish $? "$@"')
    assert lines.index(asked) < next(
        i for i, line in enumerate(lines) if line.startswith("srun --kill")
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[run]\nnproc = 1", "mine.toml: the tables must be common, models, run; found run"),
        ("[run]\n[common]\n[models.10m]", "mine.toml: [run] takes nproc, a positive integer"),
        ("[run]\nnproc = 0\n[common]\n[models.10m]", "mine.toml: [run] takes nproc"),
        ("[run]\nnproc = 1\n[common]\nlr = 1\n[models.10m]", "mine.toml sets lr, as 10m.toml does"),
        ("[run", "mine.toml: "),
    ],
)
def test_a_wrong_layout_file_is_named(text, message, tmp_path, capsys):
    path = tmp_path / "mine.toml"
    path.write_text(text)
    assert show.main(["10m", str(path)]) == 2
    assert message in capsys.readouterr().err
