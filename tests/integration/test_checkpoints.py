"""Megatron's own loop: checkpoints in the background, and ones that must not be loaded."""

import pytest

from tests.integration.tiny_gpt import flags
from tests.support.forked_launch import Run, forked
from tests.support.saved_tensors import tensors

pytestmark = pytest.mark.slow

_RANKS = 2
_STEPS = 2
_LAYOUT = {"tensor_model_parallel_size": 2, "sequence_parallel": True}
_OTHER_LAYOUT = {
    "tensor_model_parallel_size": 1, "sequence_parallel": None, "pipeline_model_parallel_size": 2,
}  # fmt: skip
_DATA_PARALLEL = {"tensor_model_parallel_size": 1, "sequence_parallel": None}
_ASYNC = {"async_save": True, "use_persistent_ckpt_worker": True, "async_strategy": "mcore"}
_DISTRIBUTED_OPTIMIZER = {**_DATA_PARALLEL, "use_distributed_optimizer": True}
_FULLY_RESHARDABLE = {**_DISTRIBUTED_OPTIMIZER, "dist_ckpt_optim_fully_reshardable": True}

# Loads of an undamaged checkpoint: name -> (other flags, parts of the refusal).
OTHER_MODELS = {
    "hidden size": (
        {"hidden_size": 32},
        ["decoder.final_layernorm.weight with the global shape [64]", "needs [32]"],
    ),
    "more layers": (
        {"num_layers": 4},
        ["decoder.layers.mlp.linear_fc1.", "with the global shape [2, 64]", "needs [4, 64]"],
    ),
    "fewer layers": (
        {"num_layers": 1},
        ["decoder.layers.mlp.linear_fc1.", "with the global shape [2, 64]", "needs [1, 64]"],
    ),
    "query groups": (
        {"num_query_groups": 4},
        ["self_attention.alpha_1 with the global shape [2, 2]", "needs [2, 4]"],
    ),
    "experts": (
        {"num_experts": 2},
        ["does not hold decoder.layers.", "which the model needs with the global shape ["],
    ),
    "window": ({"kv_shift_window": 3}, ["holds the taps alpha_1, alpha_2, beta_1", "alpha_3"]),
    "variant": ({"kv_shift_variant": "gate"}, ["holds the taps alpha_1", "has alpha_logit"]),
    "keys only": (
        {"no_kv_shift_values": True},
        ["holds the taps", "has alpha_1, alpha_2:"],
    ),
}
_OTHER_SCHEDULE = {"train_iters": 8, "weight_decay": 0.1}
_WHAT_TO_DO = "--override-opt_param-scheduler to go on with this run's"
_INSTEAD = "--no-load-optim to go on at its step"
# Loads of an undamaged checkpoint of this model: name -> (which, other flags, parts).
OTHER_OPTIMIZERS = {
    "schedule": (
        "whole",
        {**_OTHER_SCHEDULE, "lr_decay_style": "cosine"},
        ["--train-iters was 4 and is 8", "--weight-decay was 0.01 and is 0.1",
         "--lr-decay-style was linear and is cosine", _WHAT_TO_DO],
    ),
    "schedule of the distributed one": (
        "optimizer",
        {**_DISTRIBUTED_OPTIMIZER, "lr_warmup_iters": 1},
        ["--lr-warmup-iters was 0 and is 1", _WHAT_TO_DO],
    ),
    "rate": (
        "whole",
        {"lr": 2e-3, "override_opt_param_scheduler": True},
        ["--lr was 0.001 and is 0.002", "even with --override-opt_param-scheduler", _INSTEAD],
    ),
    "SGD": ("whole", {"optimizer": "sgd"}, ["--optimizer was adam and is sgd", _INSTEAD]),
    "plain as distributed": (
        "whole",
        {"use_distributed_optimizer": True},
        ["saved without --use-distributed-optimizer", "this run is with it", _INSTEAD],
    ),
    "distributed as plain": (
        "optimizer",
        _DATA_PARALLEL,
        ["saved with --use-distributed-optimizer", "this run is without it", _INSTEAD],
    ),
    "precision": ("whole", {"bf16": True}, ["precision was fp32 and is bf16", _INSTEAD]),
    "precision of the distributed one": (
        "optimizer",
        {**_DISTRIBUTED_OPTIMIZER, "bf16": True},
        ["precision was fp32 and is bf16", _INSTEAD],
    ),
}  # fmt: skip
# What the refusals say to do: name -> (which, other flags, the iteration to go on from).
AS_ADVISED = {
    "override": ("whole", {**_OTHER_SCHEDULE, "override_opt_param_scheduler": True}, 2),
    "the checkpoint's": (
        "whole",
        {**_OTHER_SCHEDULE, "use_checkpoint_opt_param_scheduler": True},
        2,
    ),
    "no optimizer": (
        "whole",
        {"use_distributed_optimizer": True, "no_load_optim": True, "lr": 2e-3},
        2,
    ),
    "finetune": ("optimizer", {**_DATA_PARALLEL, **_OTHER_SCHEDULE, "finetune": True}, 0),
}
# Loads of a damaged copy, by --ckpt-step: name -> (damage, parts of the refusal).
DAMAGED = {
    "no-shard": ("without_a_shard", ["the file __1_0.distcp of the checkpoint", "is missing"]),
    "short-shard": ("with_a_short_shard", ["the file __1_0.distcp", "bytes long and should be"]),
    "no-metadata": ("without_metadata", ["has no .metadata"]),
    "short-metadata": ("with_short_metadata", [".metadata of the checkpoint", "cannot be read"]),
    "flipped-bit": ("with_a_flipped_bit", ["file __1_0.distcp of", "is not what was saved"]),
}


def _plan(root) -> dict[str, dict]:
    """Return the runs by name, in this order: later runs load what earlier ones saved."""
    # The same learning-rate schedule for all, including those that resume.
    common = {**_LAYOUT, "train_iters": 2 * _STEPS, "exit_interval": _STEPS}

    def save(name, **others):
        return {**common, "save": root / name, "save_interval": 1, **others}

    def load(name, **others):
        return {**common, "load": root / name, **others}

    plan = {
        "save": save("whole"),
        "save-async": save("async", **_ASYNC),
        "resume": load("whole"),
        "resume-async": load("async", **_ASYNC, save=root / "async-2", save_interval=1),
        "resume-elsewhere": load("whole", **_OTHER_LAYOUT),
        "unbroken-optimizer": {**common, **_DISTRIBUTED_OPTIMIZER, "exit_interval": 2 * _STEPS},
        "save-optimizer": save("optimizer", **_DISTRIBUTED_OPTIMIZER),
        "resume-optimizer": load("optimizer", **_DISTRIBUTED_OPTIMIZER),
        "save-reshardable": save("reshardable", **_FULLY_RESHARDABLE),
        "resume-reshardable": load("reshardable", **_FULLY_RESHARDABLE),
        "no folder": load("whole", ckpt_step=7),
    }
    plan |= {name: load("whole", **others) for name, (others, _) in OTHER_MODELS.items()}
    for name, (which, others, *_) in {**OTHER_OPTIMIZERS, **AS_ADVISED}.items():
        plan[name] = load(which, **others)
    before = {name: [damage, root / "whole", root / name] for name, (damage, _) in DAMAGED.items()}
    plan |= {name: load(name, ckpt_step=_STEPS) for name in DAMAGED}
    plan["fall back"] = load("short-shard")
    plan["fall back from a bit"] = load("flipped-bit")
    plan["load a bit"] = load("flipped-bit", ckpt_step=_STEPS, no_verify_integrity=True)
    return {
        name: {"command": flags(**run), "before": list(map(str, before.get(name, [])))}
        for name, run in plan.items()
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp("checkpoints")


@pytest.fixture(scope="module")
def runs(directory) -> dict[str, Run]:
    return forked(directory, _plan(directory), _RANKS)


def trained(run: Run, steps: int = _STEPS) -> list[str]:
    """Return each step's loss, as the last rank printed it."""
    assert run.codes == [0] * _RANKS, run.outputs[0][-5000:]
    lines = [line for line in run.outputs[-1].splitlines() if "lm loss" in line]
    assert len(lines) == steps, run.outputs[-1][-5000:]
    return [line.partition("lm loss: ")[2].partition("|")[0] for line in lines]


def refused(run: Run, *parts: str) -> None:
    """Require that every rank ended by itself, with one sentence, before it loaded anything."""
    assert all(code > 0 for code in run.codes), run.codes
    for output in run.outputs:
        # Before anything is built, or in the check of the built model.
        starts = ("kvshift_megatron: load: ", "ValueError: load: ")
        last = [line for line in output.splitlines() if line.startswith(starts)]
        assert len(last) == 1, output[-5000:]
        for part in ["the checkpoint ", *parts]:
            assert part in last[0]
        assert "successfully loaded checkpoint" not in output


@pytest.mark.parametrize("step", [1, 2])
def test_a_checkpoint_written_in_the_background_is_the_same(runs, directory, step):
    """The next step starts while the first checkpoint is being written."""
    assert trained(runs["save-async"]) == trained(runs["save"])
    assert "scheduled an async checkpoint save" in runs["save-async"].outputs[0]
    name = f"iter_000000{step}"
    ours, expected = tensors(directory / "async" / name), tensors(directory / "whole" / name)
    assert ours.keys() == expected.keys()
    assert [key for key in expected if not ours[key].equal(expected[key])] == []
    assert any(".alpha_1" in key and "exp_avg" in key for key in ours)


def test_a_checkpoint_written_in_the_background_is_resumed(runs):
    losses = trained(runs["resume-async"])
    assert losses == trained(runs["resume"]) != trained(runs["save"])


def test_a_whole_checkpoint_is_loaded_at_another_layout(runs):
    trained(runs["resume-elsewhere"])
    assert "successfully loaded checkpoint" in runs["resume-elsewhere"].outputs[0]


@pytest.mark.parametrize("name", ["optimizer", "reshardable"])
def test_the_distributed_optimizer_is_resumed(runs, name):
    """Both of its formats give the losses of an unbroken run."""
    unbroken = trained(runs["unbroken-optimizer"], 2 * _STEPS)
    assert trained(runs[f"save-{name}"]) == unbroken[:_STEPS]
    assert "at iteration 2" in runs[f"resume-{name}"].outputs[0]
    third, mean = trained(runs[f"resume-{name}"])
    assert third == unbroken[2]
    # A process's second line shows the mean of its first two losses.
    assert float(mean) == pytest.approx((float(third) + float(unbroken[3])) / 2, abs=1.01e-6)


@pytest.mark.parametrize("name", OTHER_MODELS)
def test_a_checkpoint_of_another_model_is_refused_with_key_and_shapes(runs, name):
    refused(runs[name], "whole/iter_0000002", *OTHER_MODELS[name][1])


@pytest.mark.parametrize("name", OTHER_OPTIMIZERS)
def test_another_optimizer_or_schedule_is_refused_with_the_flags(runs, name):
    which, _, parts = OTHER_OPTIMIZERS[name]
    refused(runs[name], f"{which}/iter_0000002", *parts)


@pytest.mark.parametrize("name", AS_ADVISED)
def test_what_the_refusals_advise_goes_on(runs, name):
    _, _, iteration = AS_ADVISED[name]
    trained(runs[name])
    assert f"at iteration {iteration}" in runs[name].outputs[0]


@pytest.mark.parametrize("name", DAMAGED)
def test_a_damaged_checkpoint_named_by_ckpt_step_is_refused(runs, name):
    refused(runs[name], f"{name}/iter_0000002", *DAMAGED[name][1])


def test_a_damaged_newest_checkpoint_is_passed_over(runs):
    """More of this: tests/training/faults."""
    (second,) = trained(runs["fall back"], 1)
    first, mean = trained(runs["save"])
    assert float(mean) == pytest.approx((float(first) + float(second)) / 2, abs=1.01e-6)
    warning = "WARNING: load: the file __1_0.distcp of the checkpoint"
    assert warning in runs["fall back"].outputs[0]
    assert "short-shard at iteration 1" in runs["fall back"].outputs[0]


def test_a_flipped_bit_is_passed_over(runs):
    """Megatron alone loads it: the file is as long as it was, and the losses are others."""
    run = runs["fall back from a bit"]
    assert trained(run, 1) == trained(runs["fall back"], 1)
    assert "file __1_0.distcp of the checkpoint" in run.outputs[0]
    assert "flipped-bit at iteration 1" in run.outputs[0]
    assert all(code == 0 for code in runs["load a bit"].codes)
    assert "flipped-bit at iteration 2" in runs["load a bit"].outputs[0]


def test_a_missing_folder_is_named(runs):
    run = runs["no folder"]
    assert all(code > 0 for code in run.codes)
    for output in run.outputs:
        assert "kvshift_megatron: load: there is no checkpoint folder" in output, output[-5000:]
        assert "iter_0000007" in output
