"""The induction driver without training: configurations, logs, claims, table, JSON and figure."""

import json
import math
import os
import sys
import time

import matplotlib.image
import pytest

from examples.induction import config, launch, report, run
from examples.induction.config import Claim, Model
from examples.induction.logs import Evaluation, TrainingLog

AT_LEAST = Claim("m", at_least=0.99, by_step=400)
NEVER_ABOVE = Claim("m", never_above=0.35)


def validation_line(step, loss, accuracy, where=""):
    """Return a line as megatron.training prints it (0.19.2)."""
    return (
        f" validation loss at iteration {step}{where} | lm loss value: {loss:.6E} | "
        f"lm loss PPL: {math.exp(loss):.6E} | induction accuracy value: {accuracy:.6E} | "
        f"induction accuracy PPL: {math.exp(accuracy):.6E} | "
    )


def curve(*accuracies, every=100):
    return [Evaluation(every * (i + 1), 3.0, a) for i, a in enumerate(accuracies)]


def finished(model, accuracies):
    log = TrainingLog(curve(*accuracies), parameters_per_rank=123456)
    return launch.Result(model, log, 12.3)


@pytest.fixture
def demo():
    return config.load("demo")


@pytest.fixture
def results(demo):
    return [
        finished(model, accuracies)
        for model, accuracies in zip(
            demo.models,
            ([0.02, 0.9, 1.0, 1.0], [0.02, 0.04, 0.05, 0.06], [0.02, 0.05, 0.1, 0.2]),
            strict=True,
        )
    ]


def test_log_lines_are_read():
    log = TrainingLog()
    rank = " > number of parameters on (tensor, gtp_remat, pipeline) model parallel rank (1, 0, 0)"
    lines = [
        f"{rank}: 196992",
        " [2026-01-01 00:00:00.0] iteration       50/      60 | lm loss: 6.1E+00 |",
        "-" * 80,
        validation_line(50, 6.125, 0.0203125),
        validation_line(60, 6.0, 0.25, " on validation set"),
        validation_line(60, 5.5, 0.5, " on test set"),
    ]
    new = [log.feed(line) for line in lines]
    assert new[3] == Evaluation(50, 6.125, 0.0203125)
    assert log.evaluations == [new[3], Evaluation(60, 6.0, 0.25)]
    assert log.test == Evaluation(60, 5.5, 0.5)
    assert log.parameters_per_rank == 196992


def test_the_validation_after_the_last_step_is_no_second_point():
    log = TrainingLog()
    log.feed(validation_line(50, 6.0, 0.5))
    assert log.feed(validation_line(50, 6.5, 0.1, " on validation set")) is None
    assert log.evaluations == [Evaluation(50, 6.0, 0.5)]


def test_a_validation_line_without_the_metric_is_an_error():
    with pytest.raises(ValueError, match="lacks induction accuracy"):
        TrainingLog().feed(" validation loss at iteration 50 | lm loss value: 6.0E+00 | ")


@pytest.mark.parametrize(
    ("claim", "accuracies", "holds"),
    [
        (AT_LEAST, (0.0, 0.5, 1.0, 0.99), True),
        (AT_LEAST, (0.0, 0.5, 1.0, 0.98), False),
        (AT_LEAST, (0.0, 0.5, 1.0, math.nan), False),
        (AT_LEAST, (0.0, 0.5, 1.0), None),
        (NEVER_ABOVE, (0.1, 0.35), True),
        (NEVER_ABOVE, (0.1, 0.351, 0.2), False),
        (NEVER_ABOVE, (0.1, math.nan, 0.2), False),
    ],
)
def test_claims_are_judged(claim, accuracies, holds):
    assert report.judge(claim, curve(*accuracies)).holds is holds


def test_table_is_aligned(results):
    lines = report.table(results).splitlines()
    assert lines[0].split()[:2] == ["model", "parameters/rank"]
    assert "TP 2, SP" in lines[2] and "123,456" in lines[2]
    assert len({len(line) for line in lines}) == 1


def test_json_is_strict_and_complete(tmp_path, demo, results):
    results[1].log.evaluations[0] = Evaluation(100, math.nan, 0.02)
    path = tmp_path / "results.json"
    report.write_json(path, demo, results, report.judge_all(demo, results), 99.0)
    content = json.loads(path.read_text(), parse_constant=pytest.fail)
    assert content["config"]["common"]["vocab-size"] == 512
    assert content["versions"]["torch"] and content["versions"]["megatron-core"]
    assert len(content["models"]["kv-shift-1-layer"]["evaluations"]) == 4
    assert content["models"]["vanilla-1-layer"]["evaluations"][0]["loss"] is None
    assert [claim["holds"] for claim in content["claims"]] == [True, True]
    assert os.listdir(tmp_path) == ["results.json"], "no temporary file is left"


def test_figure_shows_the_curves(tmp_path, demo, results):
    path = tmp_path / "induction.png"
    report.write_figure(path, demo, results)
    image = matplotlib.image.imread(path)[..., :3]
    assert image.shape[0] >= 600 and image.shape[1] >= 1000
    for red, green, blue in ((0xD5, 0x5E, 0x00), (0x00, 0x72, 0xB2), (0x00, 0x9E, 0x73)):
        distance = abs(image * 255 - (red, green, blue)).sum(axis=-1)
        assert (distance < 10).sum() > 500


@pytest.mark.parametrize("name", ["demo", "paper_fig1a"])
def test_shipped_configurations_are_complete(name):
    loaded = config.load(name)
    assert [model.name for model in loaded.models] == [
        "kv-shift-1-layer",
        "vanilla-1-layer",
        "vanilla-2-layers",
    ]
    widths = {model.flags["hidden-size"] for model in loaded.models}
    assert len(widths) == 1, "the models must have the same width"
    assert config.load(name, steps=7).steps == 7


def test_flags_become_a_command_line():
    flags = {"num-layers": 1, "swiglu": True, "bf16": False, "split": [1, 2]}
    assert Model("m", 1, flags).argv() == ["--num-layers", "1", "--swiglu", "--split", "1", "2"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[models.a]\nnproc = 0", "models.a.nproc"),
        ("[models.a]\nvocab-size = 8", "train-iters"),
        (
            "[run]\nmax_processes = 1\n[models.a]\nnproc = 2\ntrain-iters = 1\nvocab-size = 8",
            "run.",
        ),
        ("[modells.a]", "unknown sections: modells"),
        ("[common]", "models: at least one"),
        ('[models."a/b"]', "in the name"),
        ("[models.a]\ntrain-iters = 1\nvocab-size = 8\n[[claims]]\nmodel = 'b'", "'b' is not in"),
        ("[models.a]\ntrain-iters = 1\nvocab-size = 8\n[[claims]]\nmodel = 'a'", "never_above"),
        ("[models.a", "x.toml"),
    ],
)
def test_bad_configurations_name_the_field(tmp_path, text, message):
    path = tmp_path / "x.toml"
    path.write_text(text)
    with pytest.raises(ValueError, match=message):
        config.load(str(path))


def test_bad_arguments_end_with_status_2(tmp_path, capsys):
    assert run.main(["--config", "no-such", "--output", str(tmp_path)]) == 2
    assert "neither one of demo, paper_fig1a nor a file" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert run.main(["--output", str(tmp_path / "file")]) == 2
    assert run.main(["--steps", "0", "--output", str(tmp_path)]) == 2


def stand_in(monkeypatch, script):
    """Run `script` with the model's name as its argument, in place of the trainer."""
    monkeypatch.setattr(launch, "command", lambda m: [sys.executable, "-c", script, m.name])


def test_the_driver_end_to_end_with_a_stand_in(tmp_path, monkeypatch, capsys):
    accuracy = "1.0 if 'kv' in sys.argv[1] else 0.1"
    line = validation_line(400, 3.0, 0.0).replace("0.000000E+00", "{a}")
    stand_in(monkeypatch, f"import sys; a = {accuracy}; print(f'{line}')")
    assert run.main(["--output", str(tmp_path), "--steps", "400"]) == 0
    out = capsys.readouterr().out
    assert "kv-shift-1-layer  step  400/400  loss 3.000  induction accuracy 1.000" in out
    names = {"results.json", "induction.png"} | {f"{m}.log" for m in report.STYLES}
    assert set(os.listdir(tmp_path)) == names

    stand_in(monkeypatch, f"import sys; a = 0.1; print(f'{line}')")
    assert run.main(["--output", str(tmp_path), "--steps", "400"]) == 1
    assert "FAILS, 0.100 at step 400" in capsys.readouterr().out


def test_a_failing_run_stops_the_others_and_keeps_old_results(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text("old")
    line = validation_line(400, 3.0, 1.0)
    stand_in(
        monkeypatch,
        "import sys, time\n"
        f"print('''{line}''', flush=True)\n"
        "if sys.argv[1] == 'vanilla-1-layer': sys.exit('boom')\n"
        "if sys.argv[1] == 'vanilla-2-layers': time.sleep(60)\n",
    )
    start = time.monotonic()
    assert run.main(["--output", str(tmp_path)]) == 1
    assert time.monotonic() - start < 20
    error = capsys.readouterr().err
    assert "vanilla-1-layer: training ended with exit code 1" in error
    assert "boom" in error and str(tmp_path / "vanilla-1-layer.log") in error
    assert (tmp_path / "results.json").read_text() == "old"
