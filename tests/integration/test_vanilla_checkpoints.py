"""Vanilla checkpoints for KV shifting and the reverse, through Megatron's own loop."""

import pytest

from kvshift_megatron.checks.checkpoint import stored_taps
from tests.integration.tiny_gpt import flags
from tests.support.forked_runs import Run, run_plan
from tests.support.odd_names import ODD

pytestmark = pytest.mark.slow

_STEPS = 2
_MICRO_BATCHES = 2  # per step
_TAPS = {"alpha_1", "alpha_2", "beta_1", "beta_2"}

_VANILLA = {"no_kv_shift": True}
_IDENTITY = {"kv_shift_init": "identity"}
_FINETUNE = {"finetune": True}
_LEGACY = {"ckpt_format": "torch"}
_TEMPORARY = {"non_persistent_ckpt_type": "global"}


def _plan(root) -> dict[str, dict]:
    """Return flags by name, in the order of the runs: later runs load what earlier ones saved."""

    def save(name):
        return {"save": root / name, "save_interval": _STEPS}

    def load(name):
        return {"load": root / name}

    def lenient(name):
        return {"dist_ckpt_strictness": name}

    return {
        "vanilla": {**_VANILLA, **save("of-vanilla")},
        "taps": save("of-taps"),
        # These train.
        "baseline-finetuned": {**_VANILLA, **_FINETUNE, **load("of-vanilla")},
        "identity-finetuned": {
            **_IDENTITY,
            **_FINETUNE,
            **load("of-vanilla"),
            **save("of-identity"),
        },
        "identity-pretrained": {**_IDENTITY, "pretrained_checkpoint": root / "of-vanilla"},
        "identity-no-optimizer": {**_IDENTITY, "no_load_optim": True, **load("of-vanilla")},
        "identity-resumed": {**_IDENTITY, **load("of-identity")},
        # These are refused.
        "uniform": load("of-vanilla"),
        "uniform-lenient": {**_FINETUNE, **load("of-vanilla"), **lenient("ignore_all")},
        "identity": {**_IDENTITY, **load("of-vanilla")},
        "identity-lenient": {**_IDENTITY, **load("of-vanilla"), **lenient("ignore_all")},
        "baseline": {**_VANILLA, **load("of-taps")},
        "baseline-lenient": {**_VANILLA, **_FINETUNE, **load("of-taps"), **lenient("ignore_all")},
        "baseline-schedule": {**_VANILLA, "train_iters": 8, **load("of-vanilla")},
        "other-window": {"kv_shift_window": 3, **load("of-taps"), **lenient("log_unexpected")},
        # Checkpoints that the next ones replace.
        "temporary": {
            **_TEMPORARY,
            **{"non_persistent_save_interval": 1, "save_interval": 100},
            "save": root / "of-temporary",
        },
        "temporary-resumed": {**_TEMPORARY, **load("of-temporary")},
        "temporary-baseline": {**_VANILLA, **_FINETUNE, **_TEMPORARY, **load("of-temporary")},
        "temporary-window": {"kv_shift_window": 3, **_TEMPORARY, **load("of-temporary")},
        # The format before distributed checkpoints: state dicts are checked as they are loaded.
        "legacy-vanilla": {**_VANILLA, **_LEGACY, **save("of-legacy")},
        "legacy-taps": {**_LEGACY, **save("of-legacy-taps")},
        "legacy-uniform": {**_LEGACY, **load("of-legacy")},
        "legacy-identity-finetuned": {**_IDENTITY, **_FINETUNE, **_LEGACY, **load("of-legacy")},
        "legacy-schedule": {**_LEGACY, "train_iters": 8, **load("of-legacy-taps")},
        "legacy-distributed": {
            **_LEGACY,
            "use_distributed_optimizer": True,
            **load("of-legacy-taps"),
        },
        "legacy-baseline": {**_VANILLA, **_FINETUNE, **_LEGACY, **load("of-legacy-taps")},
    }


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    return tmp_path_factory.mktemp(ODD)  # every path of these runs


@pytest.fixture(scope="module")
def runs(directory) -> dict[str, Run]:
    # The same learning-rate schedule for all, including those that resume.
    common = {"train_iters": 2 * _STEPS, "exit_interval": _STEPS}
    plan = {name: flags(**{**common, **given}) for name, given in _plan(directory).items()}
    return run_plan(directory, plan)


def trained(run: Run) -> list[str]:
    assert run.code == 0, run.output[-5000:]
    assert len(run.losses) == _STEPS * _MICRO_BATCHES
    return run.losses


def refused(run: Run, *parts: str) -> None:
    assert run.code != 0 and not run.losses
    for part in parts:
        assert part in run.output, run.output[-5000:]
    assert "successfully loaded checkpoint" not in run.output


def test_the_checkpoints_hold_the_taps_that_the_other_tests_expect(runs, directory):
    assert trained(runs["vanilla"]) != trained(runs["taps"])
    assert stored_taps(directory / "of-vanilla" / "iter_0000002") == set()
    assert stored_taps(directory / "of-taps" / "iter_0000002") == _TAPS


@pytest.mark.parametrize("name", ["uniform", "uniform-lenient"])
def test_a_vanilla_checkpoint_is_not_loaded_without_being_asked_for(runs, name):
    refused(runs[name], "of-vanilla/iter_0000002 holds no taps", "--kv-shift-init identity")


@pytest.mark.parametrize("name", ["identity", "identity-lenient"])
def test_a_vanilla_optimizer_state_is_not_resumed(runs, name):
    refused(runs[name], "optimizer state of the vanilla checkpoint", "add --finetune")


@pytest.mark.parametrize("name", ["baseline", "baseline-lenient"])
def test_the_baseline_does_not_load_a_checkpoint_with_taps(runs, name):
    refused(runs[name], "of-taps/iter_0000002 was trained with KV shifting", "drop --no-kv-shift")


def test_other_taps_are_not_loaded(runs):
    refused(runs["other-window"], "holds the taps alpha_1", "alpha_3", "--kv-shift-*")


@pytest.mark.parametrize("name", ["baseline-schedule", "legacy-schedule"])
def test_another_schedule_is_refused_for_the_baseline_and_in_the_older_format(runs, name):
    refused(runs[name], "--train-iters was 4 and is 8", "add --override-opt_param-scheduler")


def test_another_kind_of_optimizer_is_refused_in_the_older_format(runs):
    refused(runs["legacy-distributed"], "saved without --use-distributed-optimizer")


@pytest.mark.parametrize("name", ["identity-finetuned", "identity-pretrained"])
def test_identity_taps_start_where_the_vanilla_model_stopped(runs, name):
    baseline, ours = trained(runs["baseline-finetuned"]), trained(runs[name])
    assert ours[:_MICRO_BATCHES] == baseline[:_MICRO_BATCHES]
    # The weights were loaded, and the taps learn from the first step on.
    assert ours[:_MICRO_BATCHES] != runs["vanilla"].losses[:_MICRO_BATCHES]
    assert ours[_MICRO_BATCHES:] != baseline[_MICRO_BATCHES:]
    assert "successfully loaded checkpoint" in runs[name].output


def test_identity_taps_go_on_at_the_vanilla_models_step_without_its_optimizer(runs):
    trained(runs["identity-no-optimizer"])
    assert "at iteration 2" in runs["identity-no-optimizer"].output


def test_the_next_checkpoint_holds_the_taps_and_is_resumed_like_any_other(runs, directory):
    assert stored_taps(directory / "of-identity" / "iter_0000002") == _TAPS
    trained(runs["identity-resumed"])
    assert "at iteration 2" in runs["identity-resumed"].output


def test_non_persistent_checkpoints_are_refused_and_loaded_in_the_same_cases(runs):
    assert trained(runs["temporary"]) == runs["taps"].losses
    refused(runs["temporary-baseline"], "non_persistent/iter_0000002 was trained with KV shifting")
    refused(runs["temporary-window"], "non_persistent/iter_0000002 holds the taps alpha_1")
    trained(runs["temporary-resumed"])
    assert "Loading from a non-persistent checkpoint" in runs["temporary-resumed"].output


def test_the_older_format_is_refused_and_loaded_in_the_same_cases(runs):
    assert trained(runs["legacy-vanilla"]) == runs["vanilla"].losses
    refused(runs["legacy-uniform"], "without its taps", "--kv-shift-init identity")
    refused(runs["legacy-baseline"], "holds taps of KV shifting", "drop --no-kv-shift")
    ours = trained(runs["legacy-identity-finetuned"])
    assert ours == runs["identity-finetuned"].losses
