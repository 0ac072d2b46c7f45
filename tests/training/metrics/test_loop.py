"""Watch Megatron's own loop on two ranks, and check every number against a second source."""

import json
import re
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp

from kvshift_megatron.config import KVShiftConfig
from kvshift_megatron.training.metrics import read_lines, read_metrics
from tests.integration.tiny_gpt import flags
from tests.support.forked_launch import Run, forked
from tests.training.metrics.float64_taps import assert_tags, effective
from tests.training.metrics.watched_ranks import wild_values

pytestmark = pytest.mark.slow

_RANKS = 2
_TP = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_PP = {"pipeline_model_parallel_size": 2}
# With a learning rate this large the taps change visibly.
_COMMON = {"train_iters": 2, "lr": 0.3, "lr_decay_style": "constant", "seed": 7}

# Name -> (flags, configuration). The first iteration has the taps that every run starts with.
LAYOUTS = {
    "tp": ({**_TP, "kv_shift_window": 3}, KVShiftConfig(window=3)),
    # The new parameters are gathered only during the next forward pass.
    "overlap": (
        {"use_distributed_optimizer": True, "overlap_grad_reduce": True,
         "overlap_param_gather": True},
        KVShiftConfig(),
    ),
    "one-group": (
        {**_TP, "num_query_groups": 1, "kv_shift_variant": "gate"},
        KVShiftConfig(variant="gate"),
    ),
    "mtp": ({**_PP, "mtp_num_layers": 1, "kv_shift_variant": "clamp"}, KVShiftConfig("clamp")),
    "virtual": (
        {**_PP, "num_layers": 4, "num_virtual_stages_per_pipeline_rank": 2,
         "no_kv_shift_keys": True},
        KVShiftConfig(shift_keys=False),
    ),
    # Tags number the attentions, not the layers, of which every second one is an MLP.
    "hybrid": (
        {**_TP, "num_layers": None, "hybrid_layer_pattern": "*-*-"}, KVShiftConfig(),
    ),
    "hybrid-stages": (
        {**_PP, "num_layers": None, "hybrid_layer_pattern": "*-|*-|*-|*-/*-",
         "kv_shift_variant": "gate"},
        KVShiftConfig(variant="gate"),
    ),
}  # fmt: skip
_SAVED = ("tp", "overlap")


def _plan(root: Path) -> dict[str, dict]:
    """Return {name: what to run}, in this order."""

    def run(name, **others):
        return {**_COMMON, "metrics_file": root / name / "metrics.jsonl", **others}

    plan = {name: run(name, **layout) for name, (layout, _) in LAYOUTS.items()}
    for name in _SAVED:
        plan[name] |= {"save": root / name / "checkpoints", "save_interval": 1}
    # From the checkpoint of the first step, with the second step's line truncated.
    first = {"load": root / "tp" / "checkpoints", "ckpt_step": 1}
    plan["resumed"] = run("resumed", **LAYOUTS["tp"][0], **first)
    # Without --metrics-file: into TensorBoard's folder.
    folder = root / "baseline"
    plan["baseline"] = run(
        "baseline", **_TP, no_kv_shift=True, metrics_file=None, tensorboard_dir=folder
    )
    interval = {"gpu_telemetry_interval": 0.05}
    plan["full-disk"] = run(
        "full-disk", **_PP, metrics_file="/dev/full", no_gpu_telemetry=True, **interval
    )
    plan["gpus"] = run("gpus", **_TP, train_iters=20, lr=1e-3, **interval)
    plan["interval"] = run(
        "interval", **_PP, train_iters=5, log_interval=2, timing_log_level=1, eval_iters=1,
        eval_interval=4, gpu_peak_tflops=0.5,
    )  # fmt: skip
    plan["folder"] = run("folder", **_TP, metrics_file=root)
    metrics = [root / name / "metrics.jsonl" for name in ("tp", "resumed")]
    before = {"resumed": ["copy_and_tear", *map(str, metrics)]}
    return {
        name: {"command": flags(**run), "before": before.get(name)} for name, run in plan.items()
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("watching")


@pytest.fixture(scope="module")
def runs(directory) -> dict[str, Run]:
    return forked(directory, _plan(directory), _RANKS, "tests.training.metrics.watched_ranks", 300)


def trained(run: Run) -> str:
    """Return what the writing rank printed."""
    assert run.codes == [0] * _RANKS, run.outputs[-1][-5000:]
    return run.outputs[-1]


def printed(output: str, what: str) -> dict[int, float]:
    """Return {iteration: a number in Megatron's log}."""
    pattern = rf"iteration +(\d+)/.* {re.escape(what)}: ([-+.\dE]+) \|"
    return {int(i): float(value) for i, value in re.findall(pattern, output)}


def saved_taps(checkpoint: Path, kv_shift: KVShiftConfig) -> dict[str, dict[str, list[float]]]:
    """Return the whole layers of a checkpoint, as float64_taps takes them."""
    reader = dcp.FileSystemReader(checkpoint)
    state = {
        key: torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, entry in reader.read_metadata().state_dict_metadata.items()
        if re.search(r"\.self_attention\.(alpha|beta)_\w+$", key)
        and not key.startswith(("optimizer.", "chained_"))
    }
    dcp.load(state, storage_reader=reader, no_dist=True)
    layers = {}
    for key, stacked in state.items():
        name = key.rpartition(".")[2]
        prefix = "mtp_layer" if key.startswith("mtp.") else "layer"
        rows = stacked if stacked.dim() == 2 else stacked[None]
        for number, row in enumerate(rows, start=1):
            layers.setdefault(f"{prefix}_{number}", {})[name] = row.double().tolist()
    return {name: effective(kv_shift.variant, stored) for name, stored in layers.items()}


def initial_taps(kv_shift: KVShiftConfig, layers: dict[str, int]) -> dict:
    """Return the whole layers that every run starts with.

    Args:
        kv_shift: Their configuration.
        layers: {layer: number of query groups}.
    """
    drawn = {}
    for layer, groups in layers.items():
        values = wild_values(kv_shift, 7, int(layer.rpartition("_")[2]), groups)
        stored = {tap: value.float().tolist() for tap, value in values.items()}
        drawn[layer] = effective(kv_shift.variant, stored)
    return drawn


LAYERS = {
    "tp": {"layer_1": 2, "layer_2": 2},
    "overlap": {"layer_1": 2, "layer_2": 2},
    "one-group": {"layer_1": 1, "layer_2": 1},
    "mtp": {"layer_1": 2, "layer_2": 2, "mtp_layer_1": 2},
    "virtual": {f"layer_{number}": 2 for number in range(1, 5)},
    "hybrid": {"layer_1": 2, "layer_2": 2},
    "hybrid-stages": {**{f"layer_{number}": 2 for number in range(1, 5)}, "mtp_layer_1": 2},
}


@pytest.mark.parametrize("name", LAYOUTS)
def test_statistics_are_those_of_all_layers_and_query_groups(runs, directory, name):
    trained(runs[name])
    metrics = read_metrics(directory / name / "metrics.jsonl")
    assert list(metrics) == [1, 2]
    taps = initial_taps(LAYOUTS[name][1], LAYERS[name])
    assert_tags(metrics[1], taps)
    # Planted errors: another layer's taps, and another step's.
    swapped = taps | {"layer_1": taps["layer_2"], "layer_2": taps["layer_1"]}
    with pytest.raises(AssertionError):
        assert_tags(metrics[1], swapped)
    with pytest.raises(AssertionError):
        assert_tags(metrics[2], taps)


@pytest.mark.parametrize("name", _SAVED)
def test_statistics_are_of_the_taps_that_the_loss_was_computed_with(runs, directory, name):
    """They are those of the checkpoint before the step, not of the one after it."""
    trained(runs[name])
    kv_shift = LAYOUTS[name][1]
    metrics = read_metrics(directory / name / "metrics.jsonl")
    before, after = (
        saved_taps(directory / name / "checkpoints" / f"iter_000000{step}", kv_shift)
        for step in (1, 2)
    )
    assert_tags(metrics[2], before)
    with pytest.raises(AssertionError):
        assert_tags(metrics[2], after)


def test_the_initial_taps_need_clamping():
    stored = initial_taps(KVShiftConfig(), LAYERS["mtp"])
    values = [value for layer in stored.values() for tap in layer.values() for value in tap]
    assert min(values) < 0 and max(values) > 1


def test_the_number_of_collectives_does_not_grow_with_the_layers(runs, directory):
    """One per log interval, and one more at the first to learn which rank holds what."""
    for name in LAYOUTS:
        trained(runs[name])
        for rank in range(_RANKS):
            file = directory / f"{name}-{rank}.collectives"
            calls = [json.loads(line) for line in file.read_text().splitlines()]
            if name == "overlap" and rank == 0:
                # Only the ranks of the last of the two model replicas do it.
                assert calls == [[], []]
            else:
                gather = ["all_gather_into_tensor"]
                assert calls == [["all_gather_object", *gather], gather], (name, rank)


@pytest.mark.parametrize("name", ["tp", "mtp", "overlap", "hybrid-stages", "baseline"])
def test_lines_hold_what_megatron_prints(runs, directory, name):
    output = trained(runs[name])
    file = directory / name / "metrics.jsonl"
    assert len(list(read_lines(file))) == len(read_metrics(file))
    metrics = read_metrics(file)
    losses = {iteration: values["lm loss"] for iteration, values in metrics.items()}
    shown = printed(output, "lm loss")
    # The second line that a process prints is the mean of its first two losses.
    wanted = {**losses, 2: (losses[1] + losses[2]) / 2}
    assert shown == pytest.approx(wanted, rel=1e-6)
    norms = {iteration: values["grad-norm"] for iteration, values in metrics.items()}
    assert printed(output, "grad norm") == pytest.approx(norms, abs=6e-4)
    rates = {iteration: values["learning-rate"] for iteration, values in metrics.items()}
    assert printed(output, "learning rate") == pytest.approx(rates, rel=1e-6)
    for iteration, values in metrics.items():
        assert values["samples"] == 4 * iteration and values["batch-size"] == 4
        assert not any("vs samples" in tag for tag in values)


def test_throughput_is_megatrons_time(runs, directory):
    output = trained(runs["interval"])
    metrics = read_metrics(directory / "interval" / "metrics.jsonl")
    milliseconds = printed(output, "elapsed time per iteration (ms)")
    assert set(milliseconds) == {1, 2, 4}
    for iteration, values in metrics.items():
        timed = iteration in (2, 4)
        assert ("iteration-time" in values) == ("mfu" in values) == timed
        assert ("taps/all_layers/alpha_1_mean" in values) == timed
        if not timed:
            continue
        seconds = values["iteration-time"]
        assert seconds * 1000 == pytest.approx(milliseconds[iteration], abs=0.051)
        # 4 samples of 32 tokens per step, 2 ranks, a peak of 0.5 TFLOP/s each.
        assert values["tokens-per-second"] == pytest.approx(4 * 32 / seconds)
        assert values["tokens-per-second/gpu"] == pytest.approx(4 * 32 / seconds / 2)
        assert values["mfu"] == pytest.approx(values["throughput"] / 0.5)
        # Megatron's FLOPs of a step do not depend on how long it took.
        assert values["throughput"] * seconds == pytest.approx(
            metrics[2]["throughput"] * metrics[2]["iteration-time"]
        )
    assert set(metrics) == {1, 2, 3, 4, 5}


def test_timers_and_evaluations_are_in_the_lines_too(runs, directory):
    output = trained(runs["interval"])
    lines = list(read_lines(directory / "interval" / "metrics.jsonl"))
    assert any("forward-backward-time" in line for line in lines)
    evaluations = {
        line["evaluated"]: line["lm loss validation"]
        for line in lines
        if "lm loss validation" in line
    }
    shown = re.findall(r"validation loss at (.*?) \| lm loss value: ([\dE+.]+)", output)
    assert len(shown) == 3
    assert {where for where, _ in shown} == evaluations.keys()
    for where, value in shown:
        assert evaluations[where] == pytest.approx(float(value), rel=1e-6)


def test_a_resumed_run_continues_the_file(runs, directory):
    """It has the losses and taps of an unbroken run, despite a line that a kill truncated."""
    trained(runs["resumed"])
    file = directory / "resumed" / "metrics.jsonl"
    torn = [line for line in file.read_bytes().splitlines() if not line.endswith(b"}")]
    assert len(torn) == 1
    assert [line["iteration"] for line in read_lines(file)] == [1, 2]

    def untimed(path):
        timed = ("time", "iteration-time", "tokens-per-second", "tokens-per-second/gpu",
                 "throughput")  # fmt: skip
        return {
            iteration: {tag: value for tag, value in values.items() if tag not in timed}
            for iteration, values in read_metrics(path).items()
        }

    assert untimed(file) == untimed(directory / "tp" / "metrics.jsonl")
    assert "lm loss" in untimed(file)[2] and "taps/layer_2/beta_3_max" in untimed(file)[2]


def test_the_baseline_model_has_no_taps(runs, directory):
    assert trained(runs["baseline"])
    metrics = read_metrics(directory / "baseline" / "metrics.jsonl")
    assert list(metrics) == [1, 2]
    assert not any(tag.startswith("taps/") for values in metrics.values() for tag in values)


def test_a_full_disk_is_one_warning_and_no_end(runs):
    output = trained(runs["full-disk"])
    assert output.count("No space left on device") == 1
    assert len(printed(output, "lm loss")) == 2
    # With --no-gpu-telemetry, although there are GPUs.
    assert "XID" not in runs["full-disk"].outputs[0]


def test_gpus_reach_the_lines_of_the_run(runs, directory):
    """From the node's sampler on rank 0 to the last rank's writers, through the node's file."""
    output = trained(runs["gpus"])
    folder = directory / "gpus"
    telemetry = [path for path in folder.iterdir() if ".telemetry." in path.name]
    assert len(telemetry) == 1
    lines = list(read_lines(telemetry[0]))
    assert {(line["gpu"], line["code"]) for line in lines if "event" in line} == {(1, 79)}
    assert all(line["iteration"] <= 20 for line in lines)
    last = list(read_metrics(folder / "metrics.jsonl").values())[-1]
    assert last["gpu/temperature_celsius_max"] == 90
    assert last["gpu/temperature_celsius_mean"] == 75
    assert last["gpu/hottest"].endswith(":1")
    assert last["gpu/throttled"] == 1
    assert last["gpu/xid_events"] == 1 and last["gpu/errors"][0].endswith(":1 xid 79")
    assert last["gpu/nodes"] == 1 and last["gpu/nodes_silent"] == 0
    # This metric failed during the run.
    assert last["gpu/power_watts_min"] == 651.0
    both = runs["gpus"].outputs[0] + output
    assert both.count("GPU 1 reports XID 79") == 1
    assert both.count("NVML does not report power (Unknown Error)") == 1


def test_a_folder_for_a_file_is_refused_at_the_start(runs, directory):
    assert runs["folder"].codes == [1, 1]
    for output in runs["folder"].outputs:
        assert f"metrics_file='{directory}' is a folder: give --metrics-file a file" in output
